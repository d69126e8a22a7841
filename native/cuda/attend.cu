/* attend_local and attend_bulk for many queries, and what stands behind them for any number: see attend.cuh. A warp
 * takes a panel and walks its spans; the panels of a block read the same keys at about the same time and meet in L1.
 *
 * Bytes: per panel the list's keys and values once, 4 head_dim per key; per row 8 head_dim per span for merging. */
#include "attend.cuh"
#include "rest.cuh"
#include "rows.cuh"

namespace {
/* What a warp holds of a span: the lane's rows, two columns of every 8 dimensions. */
template <int D> struct span_result {
  float out[D / 8][4];
  float max[2], sum[2]; /* sum: of the lane's own keys until the span ends */
};

/* Four strips: where they begin, and how many of their keys may be seen. */
struct key_step {
  const uint16_t *keys[2], *values[2]; /* of the first two strips, and of the last two */
  int32_t visible[2][2];               /* [row][first or last two] keys that the lane's rows may see */
};

template <int D>
__device__ bool find_keys(const device_attention &a, const head_blocks &blocks, const panel_list &l, int32_t first,
                          const lane_rows &rows, key_step &step) {
  bool seen = false;
  for (int32_t half = 0; half < 2; half++) {
    int32_t key_index = first + 2 * half + key_strip_of_lane(), index = first + 2 * half + strip_of_lane();
    int32_t strip = strip_within(l, index);
    step.keys[half] = keys_of<D>(blocks, strip_within(l, key_index));
    step.values[half] = values_of<D>(blocks, strip);
    for (int32_t h = 0; h < 2; h++) {
      step.visible[h][half] = index < l.n_strips ? strip_visible(a.n_sink, strip, rows.position[h]) : 0;
      seen |= step.visible[h][half] > 0;
    }
  }
  return __any_sync(ALL_LANES, seen);
}

/* scores[4 half + tile][..] of 64 keys. */
template <int D>
__device__ void score_step(const query_operands<D> &q, const key_step &step, float (&scores)[STEP_TILES][4]) {
#pragma unroll
  for (int32_t t = 0; t < STEP_TILES; t++)
    for (int32_t j = 0; j < 4; j++) scores[t][j] = 0;
#pragma unroll
  for (int32_t part = 0; part < (D + 31) / 32; part++) {
    uint4 keys[STEP_TILES];
#pragma unroll
    for (int32_t t = 0; t < STEP_TILES; t++) keys[t] = load_keys<D>(step.keys[t / 4], t, part);
    multiply_keys<D>(q, part, keys, scores);
  }
}

/* Fresh state and output of one span; without values the state alone. */
template <int D>
__device__ void fold_span(const device_attention &a, const head_blocks &blocks, const panel_list &l, int32_t span,
                          const lane_rows &rows, const query_operands<D> &q, bool with_values, span_result<D> &r) {
  for (int32_t h = 0; h < 2; h++) r.max[h] = NO_SCORE, r.sum[h] = 0;
#pragma unroll
  for (int32_t n = 0; n < D / 8; n++)
    for (int32_t j = 0; j < 4; j++) r.out[n][j] = 0;
  for (int32_t s = span * SPAN; s < (span + 1) * SPAN && s < l.n_strips; s += 4) {
    key_step step;
    if (!find_keys<D>(a, blocks, l, s, rows, step)) continue;
    float scores[STEP_TILES][4];
    score_step(q, step, scores);
    for (int32_t h = 0; h < 2; h++) {
      float rescale = soften(scores, step.visible[h], h, r.max[h], r.sum[h]);
#pragma unroll
      for (int32_t n = 0; n < D / 8; n++) r.out[n][2 * h] *= rescale, r.out[n][2 * h + 1] *= rescale;
    }
    if (!with_values) continue;
    uint32_t weights[4][4];
    pack_weights(scores, weights);
#pragma unroll
    for (int32_t n = 0; n < D / 8; n++)
#pragma unroll
      for (int32_t half = 0; half < 2; half++)
        multiply_values(weights, half, load_values(step.values[half], n), r.out[n]);
  }
  for (int32_t h = 0; h < 2; h++) r.sum[h] = sum_of_row(r.sum[h]);
}

/* One warp, spans in order: merges the span into the lane's rows. begins: nothing is there yet. */
template <int D>
__device__ void merge_in_place(const device_attention &a, enum attend_pass pass, const lane_rows &rows,
                               const span_result<D> &r, bool begins) {
  for (int32_t h = 0; h < 2; h++) {
    bool has_row = rows.row[h] >= 0;
    row_results to = results_of(a, pass, has_row ? rows.row[h] : 0);
    float keep, take;
    float2 before = has_row && !begins ? *to.state : make_float2(NO_SCORE, 0);
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

/* Warps of a block: head dimensions over 128 need most of the registers and twice the shared memory. */
__host__ __device__ constexpr int32_t warps_of(int D) { return D > 128 ? 2 : 4; }

template <int D> struct attend_shared {
  query_operands<D> queries[warps_of(D)];
};

__device__ int32_t panels_of(const panel_list &l) { return (l.n_rows + PANEL - 1) / PANEL; }

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

/* False for a panel of queries that are not audited. */
__device__ bool any_row(const lane_rows &rows) { return __any_sync(ALL_LANES, rows.row[0] >= 0 || rows.row[1] >= 0); }

/* Grid (x, lists of a tile at most, tiles): warp x of a list walks panel x. No warp waits for another. */
template <int D>
__global__ void __launch_bounds__(WARP *warps_of(D))
    attend_kernel(device_attention a, device_layer layer, enum attend_pass pass) {
  panel_list l = list_of(a, pass, blockIdx.z, head_of_row(a, blockIdx.y, gridDim.y));
  query_operands<D> &q = block_shared<attend_shared<D>>().queries[threadIdx.x / WARP];
  head_blocks blocks(a, layer, l.kv_head);
  int32_t warp = blockIdx.x * warps_of(D) + threadIdx.x / WARP, n_warps = gridDim.x * warps_of(D);
  for (int32_t panel = warp; panel < panels_of(l); panel += n_warps) {
    lane_rows rows = rows_of(a, l, pass, panel);
    if (!any_row(rows)) continue;
    load_queries<D, 1>(a, rows, 0, q);
    __syncwarp();
    for (int32_t span = 0; span < spans_of(l); span++) {
      span_result<D> r;
      fold_span(a, blocks, l, span, rows, q, !without_values(pass), r);
      merge_in_place(a, pass, rows, r, pass != BULK && span == 0);
    }
    __syncwarp();
  }
}

struct attend_launch {
  queue *to;
  const device_attention &a;
  const device_layer &layer;
  enum attend_pass pass;
  int32_t n;

  template <int D> void run() const {
    int32_t most_rows = (n < PYLLM_PAGE ? n : PYLLM_PAGE) * (a.n_heads / a.n_kv_heads);
    int32_t panels = (most_rows + PANEL - 1) / PANEL;
    unsigned lists = (unsigned)most_lists(a, a.paged && pass == BULK, n);
    dim3 grid((unsigned)((panels + warps_of(D) - 1) / warps_of(D)), lists, (unsigned)most_tiles(n));
    launch(to, attend_kernel<D>, grid, dim3(WARP * warps_of(D)), sizeof(attend_shared<D>), a, layer, pass);
  }
};

void attend(queue *to, const device_attention &a, const device_layer &layer, enum attend_pass pass, int32_t n) {
  if (n == 1) cuda_attend_apart(to, a, layer, pass);
  else with_head_dim(a.head_dim, attend_launch{to, a, layer, pass, n});
}

struct finish_shared {
  float partial[WARP];
};

/* The i-th weighted value of a row by its weight; what stands for what a lone query left out is one more span. */
__device__ float finished_value(const device_attention &a, int64_t row, int32_t i) {
  float2 state = a.state[row], rest = make_float2(a.local_mass[row] * 1.44269504f, 0);
  float value = a.out[row * a.head_dim + i], other = 0, keep, take;
  bool rests = a.rest > 0 && a.now->n == 1 && a.is_long[row];
  int32_t parts = rests ? rest_parts(bulk_pages(a.n_sink, a.n_window, a.now->position)) : 0;
  for (int64_t p = row * a.max_rest_parts, end = p + parts; p < end; p++) {
    rest.y += a.rest_weight[p] * a.rest;
    other += a.rest_out[p * a.head_dim + i] * a.rest;
  }
  state = merge_states(state, rest, keep, take);
  return merge_values(value, other, keep, take) * (1.0f / state.y);
}

/* Grid: row_grid of n queries, those from `first` on. Reads and writes 4 head_dim bytes per row of the attention; of
 * a lone query with a rest it reads 4 head_dim + 4 more per row and 32 pages. */
__global__ void finish_kernel(device_attention a, int32_t first, int32_t n, bool rounded, activation out) {
  int64_t token = first + blockIdx.x;
  write_row(out, n, rounded, block_shared<finish_shared>().partial,
            [=](int32_t i) { return finished_value(a, token * a.n_heads + i / a.head_dim, i % a.head_dim); });
}

/* Grid: enough threads for (n, n_heads). */
__global__ void mass_kernel(device_attention a, int32_t n, float *mass) {
  int32_t row = blockIdx.x * ROW_THREADS + threadIdx.x;
  if (row < n * a.n_heads) mass[row] = mass_of(a.state[row]);
}
} // namespace

void cuda_attend_local(queue *to, const device_attention &a, const device_layer &layer, int32_t n) {
  attend(to, a, layer, LOCAL, n);
}

void cuda_attend_bulk(queue *to, const device_attention &a, const device_layer &layer, int32_t n) {
  attend(to, a, layer, BULK, n);
}

void cuda_true_bulk_mass(queue *to, const device_attention &a, const device_layer &layer, int32_t n, bool audited) {
  attend(to, a, layer, audited ? AUDIT : TRUTH, n);
}

void cuda_read_mass(queue *to, const device_attention &a, int32_t n, float *mass) {
  unsigned blocks = (unsigned)(n * a.n_heads + ROW_THREADS - 1) / ROW_THREADS;
  launch(to, mass_kernel, dim3(blocks), dim3(ROW_THREADS), 0, a, n, mass);
}

void cuda_finish(queue *to, const device_attention &a, int32_t first, int32_t n, bool rounded, const activation &out) {
  launch(to, finish_kernel, row_grid(n - first, out.cols), dim3(ROW_THREADS), sizeof(finish_shared), a, first,
         n - first, rounded, out);
}
