/* What prefill and decode do alike (attend.cu, attend_decode.cu): whose rows and keys, and the products of a warp.
 *
 * A panel of 16 rows of one key/value head folds spans of 128 keys with the matrix units, in decode as in prefill:
 * in decode the rows are the group's query heads, so keys and values stream once for all of them, and the unused
 * rows of the instruction cost nothing while memory is the limit. Scores need more than a half's 11 bits (they are
 * exponentiated), so a query is the sum of two halves and costs two products; weights, in 0..1, are one half.
 * However the work is dealt out, every score, weight and output is made by the same operations in the same order:
 * what prefill and decode give is equal to the last bit.
 *
 * Operands go from global memory to registers, 16 bytes per lane and load. The order of keys within 32 and of
 * dimensions within 32 is free as long as both sides agree, and chosen so that these 16 bytes are the lane's
 * operands of two instructions. */
#ifndef PYLLM_CUDA_ATTEND_CUH
#define PYLLM_CUDA_ATTEND_CUH
#include "blocks.cuh"

enum attend_pass {
  LOCAL, /* every row over its sinks and window: begins state and out */
  BULK,  /* the work list's rows over its strips: continues state and out */
  TRUTH, /* every row that has a bulk over all of it: mass_state and bulk_mass alone */
  AUDIT  /* the same for the audited queries */
};
__device__ inline bool without_values(enum attend_pass pass) { return pass == TRUTH || pass == AUDIT; }

/* One list's rows and strips under a pass. */
struct panel_list {
  query_tile tile;
  int32_t kv_head;
  const int32_t *rows, *strips; /* NULL: all rows of the tile; strip i is i, from `head` on moved by `jump` */
  int32_t n_rows, n_strips, head, jump;
};

__device__ inline int32_t strips_of(int32_t n_keys) { return (n_keys + PYLLM_READ_PAGE - 1) / PYLLM_READ_PAGE; }

/* Of the list that begins with this head; of no rows where none does. */
__device__ inline panel_list list_of(const device_attention &a, enum attend_pass pass, int32_t tile_index,
                                     int32_t head) {
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

__device__ inline int32_t row_at(const device_attention &a, const panel_list &l, int32_t i) {
  return l.rows ? l.rows[i] : tile_row(a, l.tile, l.kv_head, i);
}
__device__ inline int32_t strip_at(const panel_list &l, int32_t i) {
  return l.strips ? l.strips[i] : i < l.head ? i : i + l.jump;
}
/* One behind the list's end is masked; the address of the last one serves. */
__device__ inline int32_t strip_within(const panel_list &l, int32_t i) {
  return strip_at(l, i < l.n_strips ? i : l.n_strips - 1);
}

/* A lane's place in the instruction: rows `group` and group + 8 of the panel, columns 2 pair and 2 pair + 1. */
__device__ inline int32_t lane_group() { return threadIdx.x % WARP / 4; }
__device__ inline int32_t lane_pair() { return threadIdx.x % 4; }

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

/* By this warp, the warp-th of WARPS that share the operands. */
template <int D, int WARPS>
__device__ void load_queries(const device_attention &a, const lane_rows &rows, int32_t warp, query_operands<D> &to) {
  float scale = a.scale * 1.44269504f; /* scores to the base 2 */
#pragma unroll
  for (int32_t turn = 0; turn < (D / 16 + WARPS - 1) / WARPS; turn++) {
    int32_t i = turn * WARPS + warp;
    if (i >= D / 16) break;
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

constexpr float NO_SCORE = -1e30f; /* a maximum before any key */

/* Where a strip's keys begin, and its values. */
template <int D> __device__ const uint16_t *keys_of(const head_blocks &blocks, int32_t strip) {
  return blocks.at(strip / STRIPS_PER_PAGE) + kv_key_at(D, strip % STRIPS_PER_PAGE * PYLLM_READ_PAGE, 0);
}
template <int D> __device__ const uint16_t *values_of(const head_blocks &blocks, int32_t strip) {
  return blocks.at(strip / STRIPS_PER_PAGE) + kv_value_at(D, strip % STRIPS_PER_PAGE * PYLLM_READ_PAGE, 0);
}

/* Of two strips a lane loads keys of one, and has scores and loads values of another. */
__device__ inline int32_t key_strip_of_lane() { return lane_group() / 4; }
__device__ inline int32_t strip_of_lane() { return lane_pair() / 2; }

/* Tiles of 8 keys: within 32 keys, four tiles, the lane's column 2 pair + e of tile i is key 8 pair + 2 i + e. */
enum { STEP_TILES = 8 }; /* of the 64 keys of four strips */

/* A tile's keys as operands, of 32 dimensions or the last 16. keys: the lane's strip. */
template <int D> __device__ uint4 load_keys(const uint16_t *keys, int32_t tile, int32_t part) {
  int32_t token = 8 * (lane_group() / 2 % 2) + 2 * (tile % 4) + lane_group() % 2;
  const uint16_t *at = keys + token * D + lane_dimension<D>(2 * part, lane_pair());
  if (32 * part + 16 < D) return *(const uint4 *)at;
  uint2 x = *(const uint2 *)at;
  return make_uint4(x.x, x.y, 0, 0);
}

/* Adds to the scores of tiles what these dimensions give. */
template <int D, int TILES>
__device__ void multiply_keys(const query_operands<D> &q, int32_t part, const uint4 (&keys)[TILES],
                              float (&scores)[TILES][4]) {
#pragma unroll
  for (int32_t i = 2 * part; i < 2 * part + 2 && i < D / 16; i++)
#pragma unroll
    for (int32_t half = 0; half < 2; half++) {
      uint4 x = q.q[i][half][threadIdx.x % WARP];
      uint32_t row[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int32_t t = 0; t < TILES; t++) {
        uint32_t key[2] = {i % 2 ? keys[t].z : keys[t].x, i % 2 ? keys[t].w : keys[t].y};
        mma_f16(scores[t], row, key);
      }
    }
}

/* Scores of one of the lane's rows to weights; returns what rescales the sums so far. visible: of the
 * first two strips and of the last two, how many keys the row may see of the one that the lane has. */
__device__ inline float soften(float (&scores)[STEP_TILES][4], const int32_t (&visible)[2], int32_t h, float &max,
                               float &sum) {
  float top = max;
#pragma unroll
  for (int32_t t = 0; t < STEP_TILES; t++)
    for (int32_t e = 0; e < 2; e++) {
      float &s = scores[t][2 * h + e];
      if (8 * (lane_pair() % 2) + 2 * (t % 4) + e >= visible[t / 4]) s = -INFINITY;
      top = fmaxf(top, s);
    }
  for (int32_t bits = 1; bits < 4; bits *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, bits));
  float rescale = exp2f(max - top);
  sum = __fmul_rn(sum, rescale);
#pragma unroll
  for (int32_t t = 0; t < STEP_TILES; t++)
    for (int32_t e = 0; e < 2; e++) sum += scores[t][2 * h + e] = exp2f(scores[t][2 * h + e] - top);
  max = top;
  return rescale;
}

/* Of what a row's four lanes have. */
__device__ inline float sum_of_row(float x) {
  for (int32_t bits = 1; bits < 4; bits *= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
  return x;
}

/* Weights of 64 keys as operands, 16 keys each. */
__device__ inline void pack_weights(const float (&weights)[STEP_TILES][4], uint32_t (&packed)[4][4]) {
#pragma unroll
  for (int32_t i = 0; i < 4; i++)
    for (int32_t j = 0; j < 4; j++) {
      const float *x = weights[2 * i + j / 2] + 2 * (j % 2);
      packed[i][j] = pack_halves(float_to_half(x[0]), float_to_half(x[1]));
    }
}

/* Dimensions 8 n to 8 n + 8 of two strips' values as operands. values: the lane's strip. */
__device__ inline uint4 load_values(const uint16_t *values, int32_t n) {
  return *(const uint4 *)(values + (8 * n + lane_group()) * PYLLM_READ_PAGE + 8 * (lane_pair() % 2));
}

__device__ inline void multiply_values(const uint32_t (&weights)[4][4], int32_t half, uint4 values, float (&out)[4]) {
  uint32_t first[2] = {values.x, values.y}, second[2] = {values.z, values.w};
  mma_f16(out, weights[2 * half], first);
  mma_f16(out, weights[2 * half + 1], second);
}

/* Merges a span into a row. What was accumulated before is to be multiplied by keep, the span's by take; written so
 * that no compiler joins products and sums in two ways: prefill and decode must give the same bits. */
__device__ inline float2 merge_states(float2 into, float2 span, float &keep, float &take) {
  keep = 1, take = 0;
  if (span.y == 0) return into;
  float max = fmaxf(into.x, span.x);
  keep = exp2f(into.x - max), take = exp2f(span.x - max);
  return make_float2(max, fmaf(into.y, keep, __fmul_rn(span.y, take)));
}
__device__ inline float merge_values(float into, float span, float keep, float take) {
  return fmaf(into, keep, __fmul_rn(span, take));
}

__device__ inline float mass_of(float2 state) { return (state.x + log2f(state.y)) * 0.693147181f; }

/* What a pass leaves behind for a row. */
struct row_results {
  float2 *state;
  float *out;  /* (head_dim) or NULL */
  float *mass; /* or NULL */
};

__device__ inline row_results results_of(const device_attention &a, enum attend_pass pass, int64_t row) {
  if (without_values(pass)) return {a.mass_state + row, NULL, a.bulk_mass + row};
  return {a.state + row, a.out + row * a.head_dim, pass == LOCAL ? a.local_mass + row : NULL};
}

__device__ inline int32_t spans_of(const panel_list &l) { return (l.n_strips + SPAN - 1) / SPAN; }

/* attend_decode.cu: a pass for one query. */
void cuda_attend_apart(queue *to, const device_attention &a, const device_layer &layer, enum attend_pass pass);
#endif
