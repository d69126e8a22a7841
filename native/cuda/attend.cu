/* attend_local and attend_bulk: the same walk of query rows over a list of keys.
 *
 * A warp takes a panel of 16 rows of one key/value head and folds spans of 128 keys with the matrix units, in decode as
 * in prefill: in decode the rows are the group's query heads, so keys and values stream once for all of them, and the
 * unused rows of the instruction cost nothing while memory is the limit. Scores need more than a half's 11 bits (they
 * are exponentiated), so a query is the sum of two halves and costs two products; weights, in 0..1, are one half.
 *
 * Operands go from global memory to registers, 16 bytes per lane and load. The order of keys within 32 and of dimensions
 * within 32 is free as long as both sides agree, and chosen so that these 16 bytes are the lane's operands of two
 * instructions. The panels of a block (prefill) read the same keys at about the same time and meet in L1.
 *
 * Bytes: per panel the list's keys and values once, 4 head_dim per key; per row 8 head_dim per span for merging. */
#include "blocks.cuh"
#include "rows.cuh"

namespace {

enum attend_pass {
  LOCAL, /* every row over its sinks and window: begins state and out */
  BULK,  /* the work list's rows over its strips: continues state and out */
  TRUTH, /* every row that has a bulk over all of it: mass_state and bulk_mass alone */
  AUDIT  /* the same for the audited queries */
};
__device__ bool without_values(enum attend_pass pass) { return pass == TRUTH || pass == AUDIT; }

/* One list's rows and strips under a pass. */
struct panel_list {
  query_tile tile;
  int32_t kv_head;
  const int32_t *rows, *strips; /* NULL: all rows of the tile; strip i is i, from `head` on moved by `jump` */
  int32_t n_rows, n_strips, head, jump;
};

__device__ int32_t strips_of(int32_t n_keys) { return (n_keys + PYLLM_READ_PAGE - 1) / PYLLM_READ_PAGE; }

/* Of the list that begins with this head; of no rows where none does. */
__device__ panel_list list_of(const device_attention &a, enum attend_pass pass, int32_t tile_index, int32_t head) {
  panel_list l = {tile_at(a, tile_index), head / group_of(a), NULL, NULL, 0, 0, 0, STRIPS_PER_PAGE};
  if (l.tile.n == 0 || (pass != LOCAL && l.tile.n_pages == 0)) return l;
  if (head % (pass == BULK ? sharing_of(a, l.tile) : group_of(a))) return l;
  l.n_rows = l.tile.n * group_of(a);
  l.n_strips = l.tile.n_pages * STRIPS_PER_PAGE;
  int64_t list = (int64_t)tile_index * a.n_heads + head;
  if (pass == LOCAL) {
    int32_t last = a.now->position + l.tile.first + l.tile.n - 1;
    int32_t behind = last + 1 - kv_block_start(a.n_sink, 1 + l.tile.n_pages); /* keys; none while all are sinks */
    l.head = strips_of(a.n_sink);
    l.jump = (1 + l.tile.n_pages) * STRIPS_PER_PAGE - l.head;
    l.n_strips = l.head + (behind > 0 ? strips_of(behind) : 0);
  } else if (pass == BULK) {
    l.rows = a.rows + list * PYLLM_PAGE;
    l.n_rows = a.counts[list].n_rows;
    l.n_strips = a.counts[list].n_strips;
    if (a.paged) l.strips = a.strips + list * a.max_strips;
  }
  return l;
}

__device__ int32_t row_at(const device_attention &a, const panel_list &l, int32_t i) {
  return l.rows ? l.rows[i] : tile_row(a, l.tile, l.kv_head, i);
}
__device__ int32_t strip_at(const panel_list &l, int32_t i) {
  return l.strips ? l.strips[i] : i < l.head ? i : i + l.jump;
}

/* A lane's place in the instruction: rows `group` and group + 8 of the panel, columns 2 pair and 2 pair + 1. */
__device__ int32_t lane_group() { return threadIdx.x % WARP / 4; }
__device__ int32_t lane_pair() { return threadIdx.x % 4; }

/* First of the 4 neighbouring dimensions that a lane has in 16 of the product's summands. */
template <int D> __device__ constexpr int32_t lane_dimension(int32_t sixteen, int32_t pair) {
  return sixteen == D / 16 - 1 && D % 32 ? 16 * sixteen + 4 * pair : 32 * (sixteen / 2) + 8 * pair + 4 * (sixteen % 2);
}

/* Queries of a panel as operands: [sixteen summands][high, low halves][lane]. */
template <int D> struct query_operands {
  uint4 q[D / 16][2][WARP];
};

/* Two neighbours as two pairs of halves whose sum they are. */
__device__ inline void split(float x, float y, uint32_t &high, uint32_t &low) {
  uint16_t a = float_to_half(x), b = float_to_half(y);
  high = pack_halves(a, b);
  low = pack_halves(float_to_half(x - half_to_float(a)), float_to_half(y - half_to_float(b)));
}

/* The lane's two rows of a panel, -1 where there is none, and their positions, before every key where there is none. */
struct lane_rows {
  int32_t row[2], position[2];
};

template <int D> __device__ void load_queries(const device_attention &a, const lane_rows &rows, query_operands<D> &to) {
  float scale = a.scale * 1.44269504f; /* scores to the base 2 */
  for (int32_t i = 0; i < D / 16; i++) {
    uint32_t word[2][4] = {};
    for (int32_t h = 0; h < 2; h++) {
      if (rows.row[h] < 0) continue;
      float4 x = *(const float4 *)(a.q + (int64_t)rows.row[h] * D + lane_dimension<D>(i, lane_pair()));
      split(x.x * scale, x.y * scale, word[0][h], word[1][h]);
      split(x.z * scale, x.w * scale, word[0][2 + h], word[1][2 + h]);
    }
    for (int32_t part = 0; part < 2; part++)
      to.q[i][part][threadIdx.x % WARP] = make_uint4(word[part][0], word[part][1], word[part][2], word[part][3]);
  }
}

/* What a warp holds of a span: the lane's rows, two columns of every 8 dimensions. */
template <int D> struct span_result {
  float out[D / 8][4];
  float max[2], sum[2]; /* sum: of the lane's own keys until the span ends */
};

/* Four strips: where they begin, and how many of the keys each lane's rows may see. */
struct key_step {
  const uint16_t *keys[2];   /* of the strips whose keys this lane loads: of the first two, and of the last two */
  const uint16_t *values[2]; /* of those whose values it loads */
  int32_t visible[2][2];     /* [first or last two][row] of the strip whose scores it holds */
};

template <int D>
__device__ bool find_keys(const device_attention &a, const head_blocks &blocks, const panel_list &l, int32_t first,
                          const lane_rows &rows, key_step &step) {
  bool seen = false;
  for (int32_t half = 0; half < 2; half++) {
    int32_t key_index = first + 2 * half + lane_group() / 4, index = first + 2 * half + lane_pair() / 2;
    /* A strip behind the list's end is masked; the address of its first one serves. */
    int32_t key_strip = strip_at(l, key_index < l.n_strips ? key_index : first);
    int32_t strip = strip_at(l, index < l.n_strips ? index : first);
    step.keys[half] =
        blocks.at(key_strip / STRIPS_PER_PAGE) + kv_key_at(D, key_strip % STRIPS_PER_PAGE * PYLLM_READ_PAGE, 0);
    step.values[half] =
        blocks.at(strip / STRIPS_PER_PAGE) + kv_value_at(D, strip % STRIPS_PER_PAGE * PYLLM_READ_PAGE, 0);
    for (int32_t h = 0; h < 2; h++) {
      step.visible[half][h] = index < l.n_strips ? strip_visible(a.n_sink, strip, rows.position[h]) : 0;
      seen |= step.visible[half][h] > 0;
    }
  }
  return __any_sync(ALL_LANES, seen);
}

/* scores[4 half + tile][..] of 64 keys. Within 32 keys the lane's column 2 pair + e of tile i is key 8 pair + 2 i + e. */
template <int D>
__device__ void multiply_keys(const query_operands<D> &q, const key_step &step, float (&scores)[8][4]) {
  int32_t lane = threadIdx.x % WARP, group = lane_group();
#pragma unroll
  for (int32_t t = 0; t < 8; t++)
    for (int32_t j = 0; j < 4; j++) scores[t][j] = 0;
#pragma unroll
  for (int32_t i = 0; i < D / 16; i += 2) {
    bool both = i + 1 < D / 16; /* 32 dimensions, or the last 16 */
    uint32_t k[8][4];
#pragma unroll
    for (int32_t t = 0; t < 8; t++) {
      int32_t token = 8 * (group / 2 % 2) + 2 * (t % 4) + group % 2;
      const uint16_t *at = step.keys[t / 4] + token * D + lane_dimension<D>(i, lane_pair());
      if (both) {
        uint4 x = *(const uint4 *)at;
        k[t][0] = x.x, k[t][1] = x.y, k[t][2] = x.z, k[t][3] = x.w;
      } else {
        uint2 x = *(const uint2 *)at;
        k[t][0] = x.x, k[t][1] = x.y;
      }
    }
#pragma unroll
    for (int32_t s = 0; s < (both ? 2 : 1); s++)
      for (int32_t part = 0; part < 2; part++) {
        uint4 x = q.q[i + s][part][lane];
        uint32_t row[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int32_t t = 0; t < 8; t++) {
          uint32_t key[2] = {k[t][2 * s], k[t][2 * s + 1]};
          mma_f16(scores[t], row, key);
        }
      }
  }
}

/* Scores of one of the lane's rows to weights; returns what rescales the sums so far. */
__device__ float soften(float (&scores)[8][4], const key_step &step, int32_t h, float &max, float &sum) {
  float top = max;
#pragma unroll
  for (int32_t t = 0; t < 8; t++)
    for (int32_t e = 0; e < 2; e++) {
      float &s = scores[t][2 * h + e];
      if (8 * (lane_pair() % 2) + 2 * (t % 4) + e >= step.visible[t / 4][h]) s = -INFINITY;
      top = fmaxf(top, s);
    }
  for (int32_t bits = 1; bits < 4; bits *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, bits));
  float rescale = exp2f(max - top);
  sum *= rescale;
#pragma unroll
  for (int32_t t = 0; t < 8; t++)
    for (int32_t e = 0; e < 2; e++) sum += scores[t][2 * h + e] = exp2f(scores[t][2 * h + e] - top);
  max = top;
  return rescale;
}

template <int D>
__device__ void multiply_values(const float (&weights)[8][4], const key_step &step, float (&out)[D / 8][4]) {
  uint32_t w[4][4];
#pragma unroll
  for (int32_t i = 0; i < 4; i++)
    for (int32_t j = 0; j < 4; j++) {
      const float *x = weights[2 * i + j / 2] + 2 * (j % 2);
      w[i][j] = pack_halves(float_to_half(x[0]), float_to_half(x[1]));
    }
#pragma unroll
  for (int32_t n = 0; n < D / 8; n++)
#pragma unroll
    for (int32_t half = 0; half < 2; half++) {
      const uint16_t *at = step.values[half] + (8 * n + lane_group()) * PYLLM_READ_PAGE + 8 * (lane_pair() % 2);
      uint4 x = *(const uint4 *)at;
      uint32_t first[2] = {x.x, x.y}, second[2] = {x.z, x.w};
      mma_f16(out[n], w[2 * half], first);
      mma_f16(out[n], w[2 * half + 1], second);
    }
}

/* Fresh state and output of one span; without values the state alone. */
template <int D>
__device__ void fold_span(const device_attention &a, const head_blocks &blocks, const panel_list &l, int32_t span,
                          const lane_rows &rows, const query_operands<D> &q, bool with_values, span_result<D> &r) {
  for (int32_t h = 0; h < 2; h++) r.max[h] = -1e30f, r.sum[h] = 0;
#pragma unroll
  for (int32_t n = 0; n < D / 8; n++)
    for (int32_t j = 0; j < 4; j++) r.out[n][j] = 0;
  for (int32_t s = span * SPAN; s < (span + 1) * SPAN && s < l.n_strips; s += 4) {
    key_step step;
    if (!find_keys<D>(a, blocks, l, s, rows, step)) continue;
    float scores[8][4];
    multiply_keys(q, step, scores);
    for (int32_t h = 0; h < 2; h++) {
      float rescale = soften(scores, step, h, r.max[h], r.sum[h]);
#pragma unroll
      for (int32_t n = 0; n < D / 8; n++) r.out[n][2 * h] *= rescale, r.out[n][2 * h + 1] *= rescale;
    }
    if (with_values) multiply_values<D>(scores, step, r.out);
  }
  for (int32_t h = 0; h < 2; h++)
    for (int32_t bits = 1; bits < 4; bits *= 2) r.sum[h] += __shfl_xor_sync(ALL_LANES, r.sum[h], bits);
}

/* Merges a span into a row. What was accumulated before is to be multiplied by keep, the span's by take; written so that
 * no compiler joins products and sums in two ways: prefill and decode must give the same bits. */
__device__ float2 merge_states(float2 into, float2 span, float &keep, float &take) {
  keep = 1, take = 0;
  if (span.y == 0) return into;
  float max = fmaxf(into.x, span.x);
  keep = exp2f(into.x - max), take = exp2f(span.x - max);
  return make_float2(max, fmaf(into.y, keep, __fmul_rn(span.y, take)));
}
__device__ float merge_values(float into, float span, float keep, float take) {
  return fmaf(into, keep, __fmul_rn(span, take));
}

__device__ float mass_of(float2 state) { return (state.x + log2f(state.y)) * 0.693147181f; }

/* What a pass leaves behind for a row. */
struct row_results {
  float2 *state;
  float *out;  /* (head_dim) or NULL */
  float *mass; /* or NULL */
};

__device__ row_results results_of(const device_attention &a, enum attend_pass pass, int64_t row) {
  if (without_values(pass)) return {a.mass_state + row, NULL, a.bulk_mass + row};
  return {a.state + row, a.out + row * a.head_dim, pass == LOCAL ? a.local_mass + row : NULL};
}

/* One warp, spans in order: merges the span into the lane's rows. begins: nothing is there yet. */
template <int D>
__device__ void merge_in_place(const device_attention &a, enum attend_pass pass, const lane_rows &rows,
                               const span_result<D> &r, bool begins) {
  for (int32_t h = 0; h < 2; h++) {
    bool has_row = rows.row[h] >= 0;
    row_results to = results_of(a, pass, has_row ? rows.row[h] : 0);
    float keep, take;
    float2 before = has_row && !begins ? *to.state : make_float2(-1e30f, 0);
    float2 state = merge_states(before, make_float2(r.max[h], r.sum[h]), keep, take);
    __syncwarp(); /* a row's four lanes have read its state */
    if (!has_row) continue;
    if (lane_pair() == 0) {
      *to.state = state;
      if (to.mass) *to.mass = mass_of(state);
    }
    if (!to.out) continue;
#pragma unroll
    for (int32_t n = 0; n < D / 8; n++) {
      float2 *at = (float2 *)(to.out + 8 * n + 2 * lane_pair());
      float2 x = begins ? make_float2(0, 0) : *at;
      *at = make_float2(merge_values(x.x, r.out[n][2 * h], keep, take),
                        merge_values(x.y, r.out[n][2 * h + 1], keep, take));
    }
  }
  __syncwarp(); /* the next span reads the state */
}

/* Many warps, a span each: leaves it for merge_spans. */
template <int D>
__device__ void leave_span(const device_attention &a, const lane_rows &rows, int32_t span, bool with_values,
                           const span_result<D> &r) {
  for (int32_t h = 0; h < 2; h++) {
    if (rows.row[h] < 0) continue;
    int64_t at = (int64_t)rows.row[h] * a.max_spans + span;
    if (lane_pair() == 0) a.span_state[at] = make_float2(r.max[h], r.sum[h]);
#pragma unroll
    for (int32_t n = 0; n < D / 8 && with_values; n++)
      *(float2 *)(a.span_out + at * D + 8 * n + 2 * lane_pair()) = make_float2(r.out[n][2 * h], r.out[n][2 * h + 1]);
  }
}

/* Warps of a block: head dimensions over 128 need most of the registers and twice the shared memory. */
__host__ __device__ constexpr int32_t warps_of(int D) { return D > 128 ? 2 : 4; }

template <int D> struct attend_shared {
  query_operands<D> queries[warps_of(D)];
};

__device__ lane_rows rows_of(const device_attention &a, const panel_list &l, enum attend_pass pass, int32_t panel) {
  lane_rows rows;
  for (int32_t h = 0; h < 2; h++) {
    int32_t i = panel * PANEL + lane_group() + 8 * h, row = i < l.n_rows ? row_at(a, l, i) : -1;
    if (pass == AUDIT && row >= 0 && !a.audited[row / a.n_heads]) row = -1;
    rows.row[h] = row;
    rows.position[h] = row < 0 ? -1 : a.now->position + row / a.n_heads;
  }
  return rows;
}

/* Grid (x, lists of a tile at most, tiles). Prefill: warp x of a list walks panel x. Decode (apart): the warps of a list
 * take its spans by turns, panel after panel. No warp waits for another. */
template <int D>
__global__ void __launch_bounds__(WARP *warps_of(D))
    attend_kernel(device_attention a, device_layer layer, enum attend_pass pass, bool apart) {
  panel_list l = list_of(a, pass, blockIdx.z, head_of_row(a, blockIdx.y, gridDim.y));
  query_operands<D> &q = block_shared<attend_shared<D>>().queries[threadIdx.x / WARP];
  head_blocks blocks(a, layer, l.kv_head);
  int32_t warp = blockIdx.x * warps_of(D) + threadIdx.x / WARP, n_warps = gridDim.x * warps_of(D);
  int32_t n_panels = (l.n_rows + PANEL - 1) / PANEL, n_spans = (l.n_strips + SPAN - 1) / SPAN;
  for (int32_t panel = apart ? 0 : warp; panel < n_panels; panel += apart ? 1 : n_warps) {
    lane_rows rows = rows_of(a, l, pass, panel);
    if (!__any_sync(ALL_LANES, rows.row[0] >= 0 || rows.row[1] >= 0)) continue;
    load_queries(a, rows, q);
    __syncwarp();
    for (int32_t span = apart ? warp : 0; span < n_spans; span += apart ? n_warps : 1) {
      span_result<D> r;
      fold_span(a, blocks, l, span, rows, q, !without_values(pass), r);
      if (apart) leave_span(a, rows, span, !without_values(pass), r);
      else merge_in_place(a, pass, rows, r, pass != BULK && span == 0);
    }
    __syncwarp();
  }
}

/* Decode: merges the spans of a row in order. Grid (rows of a list, lists), one thread per dimension, each of which
 * follows the states for itself. Reads 4 head_dim + 8 bytes per span. */
__global__ void merge_spans(device_attention a, enum attend_pass pass) {
  panel_list l = list_of(a, pass, 0, head_of_row(a, blockIdx.y, gridDim.y));
  int32_t i = threadIdx.x, n_spans = (l.n_strips + SPAN - 1) / SPAN;
  if ((int32_t)blockIdx.x >= l.n_rows) return;
  int64_t row = row_at(a, l, blockIdx.x);
  row_results to = results_of(a, pass, row);
  bool begins = pass != BULK, has_out = to.out && i < a.head_dim;
  float2 state = begins ? make_float2(-1e30f, 0) : *to.state;
  float value = begins || !has_out ? 0 : to.out[i];
  for (int32_t span = 0; span < n_spans; span++) {
    float keep, take;
    int64_t at = row * a.max_spans + span;
    state = merge_states(state, a.span_state[at], keep, take);
    if (has_out) value = merge_values(value, a.span_out[at * a.head_dim + i], keep, take);
  }
  if (has_out) to.out[i] = value;
  __syncthreads(); /* all have read the state */
  if (i != 0) return;
  *to.state = state;
  if (to.mass) *to.mass = mass_of(state);
}

/* Decode's spans are dealt to so many warps per list at most: enough to fill a GPU, few enough that those with nothing
 * to do cost little. */
enum { SPAN_WARPS = 512 };

struct attend_launch {
  queue *to;
  const device_attention &a;
  const device_layer &layer;
  enum attend_pass pass;
  int32_t n;

  template <int D> void run() const {
    bool apart = n == 1;
    int32_t group = a.n_heads / a.n_kv_heads, spans = a.max_spans < SPAN_WARPS ? a.max_spans : SPAN_WARPS;
    int32_t most_rows = (n < PYLLM_PAGE ? n : PYLLM_PAGE) * group;
    int32_t warps = apart ? spans : (most_rows + PANEL - 1) / PANEL;
    unsigned lists = (unsigned)most_lists(a, a.paged && pass == BULK, n);
    dim3 grid((unsigned)((warps + warps_of(D) - 1) / warps_of(D)), lists, (unsigned)most_tiles(n));
    launch(to, attend_kernel<D>, grid, dim3(WARP * warps_of(D)), sizeof(attend_shared<D>), a, layer, pass, apart);
    if (apart) launch(to, merge_spans, dim3((unsigned)group, lists), dim3((D + WARP - 1) / WARP * WARP), 0, a, pass);
  }
};

struct finish_shared {
  float partial[WARP];
};

/* Grid: row_grid. Reads and writes 4 head_dim bytes per row of the attention. */
__global__ void finish_kernel(device_attention a, int32_t n, bool rounded, activation out) {
  int64_t token = blockIdx.x, first = token * out.cols;
  write_row(out, n, rounded, block_shared<finish_shared>().partial,
            [=](int32_t i) { return a.out[first + i] * (1.0f / a.state[token * a.n_heads + i / a.head_dim].y); });
}

/* Grid: enough threads for (n, n_heads). */
__global__ void mass_kernel(device_attention a, int32_t n, float *mass) {
  int32_t row = blockIdx.x * ROW_THREADS + threadIdx.x;
  if (row < n * a.n_heads) mass[row] = mass_of(a.state[row]);
}
} // namespace

void cuda_attend_local(queue *to, const device_attention &a, const device_layer &layer, int32_t n) {
  with_head_dim(a.head_dim, attend_launch{to, a, layer, LOCAL, n});
}

void cuda_attend_bulk(queue *to, const device_attention &a, const device_layer &layer, int32_t n) {
  with_head_dim(a.head_dim, attend_launch{to, a, layer, BULK, n});
}

void cuda_true_bulk_mass(queue *to, const device_attention &a, const device_layer &layer, int32_t n, bool audited) {
  with_head_dim(a.head_dim, attend_launch{to, a, layer, audited ? AUDIT : TRUTH, n});
}

void cuda_read_mass(queue *to, const device_attention &a, int32_t n, float *mass) {
  unsigned blocks = (unsigned)(n * a.n_heads + ROW_THREADS - 1) / ROW_THREADS;
  launch(to, mass_kernel, dim3(blocks), dim3(ROW_THREADS), 0, a, n, mass);
}

void cuda_finish(queue *to, const device_attention &a, int32_t n, bool rounded, const activation &out) {
  launch(to, finish_kernel, row_grid(n, out.cols), dim3(ROW_THREADS), sizeof(finish_shared), a, n, rounded, out);
}
