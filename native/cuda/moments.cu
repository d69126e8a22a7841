/* Running moments of the bulk keys, and the mass of the bulk that they predict for a query (arXiv 2502.09647). */
#include "blocks.cuh"

namespace {
enum { FOLD_THREADS = 256, JUDGE_WARPS = 16, JUDGE_ROWS = 8, JUDGE_AT_ONCE = 4 /* rows of a warp under way */ };

struct fold_shared {
  uint16_t keys[PYLLM_PAGE * MAX_HEAD_DIM];
  float page_mean[MAX_HEAD_DIM], mean[MAX_HEAD_DIM];
};

/* keys and page_mean of one page. */
__device__ void load_page(const uint16_t *block, int32_t d, fold_shared &s) {
  for (int32_t i = threadIdx.x; i < PYLLM_PAGE * d / 8; i += FOLD_THREADS)
    ((uint4 *)s.keys)[i] = ((const uint4 *)(block + kv_key_at(d, 0, 0)))[i];
  __syncthreads();
  for (int32_t i = threadIdx.x; i < d; i += FOLD_THREADS) {
    float sum = 0;
    for (int32_t t = 0; t < PYLLM_PAGE; t++) sum += half_to_float(s.keys[t * d + i]);
    s.page_mean[i] = sum / PYLLM_PAGE;
  }
  __syncthreads();
}

/* Chan, Golub, LeVeque (1979): merges a page's mean and centred squares into the running ones. m2: (16, d). */
__device__ void merge_page(int32_t n_pages, int32_t first_row, int32_t d, float *m2, fold_shared &s) {
  float before = (float)n_pages, share = 1.0f / (before + 1.0f), between = PYLLM_PAGE * before * share;
  for (int32_t at = threadIdx.x; at < MOMENT_ROWS * d; at += FOLD_THREADS) {
    int32_t i = first_row + at / d, j = at % d;
    float row_mean = s.page_mean[i], column_mean = s.page_mean[j], sum = 0;
    for (int32_t t = 0; t < PYLLM_PAGE; t++)
      sum += (half_to_float(s.keys[t * d + i]) - row_mean) * (half_to_float(s.keys[t * d + j]) - column_mean);
    float drift = between * (row_mean - s.mean[i]) * (column_mean - s.mean[j]);
    m2[at] = (n_pages ? m2[at] : 0) + sum + drift;
  }
  __syncthreads(); /* all have used the mean */
  for (int32_t i = threadIdx.x; i < d; i += FOLD_THREADS) s.mean[i] += share * (s.page_mean[i] - s.mean[i]);
  __syncthreads();
}

/* Grid (head_dim / 16, n_kv_heads): folds the pages that left the window since the last time, and keeps what each tile
 * but the last sees. Starts over where more is folded than the first tile sees: after a rewind, or a wider window.
 * Reads a page's keys, 128 head_dim bytes, head_dim / 16 times (from L2), and writes the covariance once per page. */
__global__ void fold_kernel(device_attention a, device_layer layer) {
  fold_shared &s = block_shared<fold_shared>();
  int32_t d = a.head_dim, g = blockIdx.y, parts = d / MOMENT_ROWS, part = blockIdx.x;
  int32_t *folded = layer.folded + g * parts + part;
  float *mean = layer.mean + (int64_t)(g * parts + part) * d;
  int64_t rows = (int64_t)part * MOMENT_ROWS * d; /* where this block's rows are in a (d, d) matrix */
  float *m2 = layer.m2 + (int64_t)g * d * d + rows;
  int32_t n = *folded;
  query_tile tile = tile_at(a, 0);
  head_blocks blocks(a, layer, g);
  if (n == tile.n_pages && is_last(a, tile)) return; /* in decode mostly */
  if (n > tile.n_pages) n = 0;
  for (int32_t i = threadIdx.x; i < d; i += FOLD_THREADS) s.mean[i] = n ? mean[i] : 0;
  __syncthreads();
  for (int32_t t = 0; tile.n; tile = tile_at(a, ++t)) {
    for (; n < tile.n_pages; n++) {
      load_page(blocks.at(1 + n), d, s);
      merge_page(n, part * MOMENT_ROWS, d, m2, s);
    }
    if (is_last(a, tile) || n == 0) continue;
    int64_t slot = (int64_t)t * a.n_kv_heads + g;
    for (int32_t i = threadIdx.x; i < MOMENT_ROWS * d; i += FOLD_THREADS) a.tile_m2[slot * d * d + rows + i] = m2[i];
    for (int32_t i = threadIdx.x; i < d && part == 0; i += FOLD_THREADS) a.tile_mean[slot * d + i] = s.mean[i];
  }
  for (int32_t i = threadIdx.x; i < d; i += FOLD_THREADS) mean[i] = s.mean[i];
  if (threadIdx.x == 0) *folded = n;
}

/* What a key/value head's keys are taken to be like for one tile: mean (head_dim), and weight times the covariance,
 * (head_dim, head_dim). */
struct key_model {
  const float *mean, *square;
  float weight;
};

__device__ key_model key_model_of(const device_attention &a, const device_layer &layer, const device_policy &p,
                                  const query_tile &tile, int32_t tile_index, int32_t g) {
  int64_t d = a.head_dim, slot = (int64_t)tile_index * a.n_kv_heads + g;
  if (p.means) return {p.means + g * d, p.covariances + g * d * d, 1};
  float n = (float)(tile.n_pages * PYLLM_PAGE);
  if (is_last(a, tile)) return {layer.mean + g * (d / MOMENT_ROWS) * d, layer.m2 + g * d * d, n};
  return {a.tile_mean + slot * d, a.tile_m2 + slot * d * d, n};
}

/* mean_score, deviation and bulk_mass of a row, from its q.mean and q'Sq. */
__device__ void judge_row(const device_attention &a, const device_policy &p, int32_t n_keys, int64_t row, float product,
                          float square) {
  float variance = a.scale * a.scale * square;
  if (variance < 0) variance = 0; /* by rounding */
  a.mean_score[row] = a.scale * product;
  a.deviation[row] = sqrtf(variance);
  const float *coefficients = p.coefficients ? p.coefficients + 3 * (row % a.n_heads) : NULL;
  a.bulk_mass[row] = bulk_estimate(p.gaussian, p.estimate, coefficients, n_keys, a.mean_score[row], variance);
}

struct judge_shared {
  float q[JUDGE_ROWS][MAX_HEAD_DIM];
  float square[JUDGE_WARPS][JUDGE_ROWS];
};

/* Grid (8 rows of a slot, n_kv_heads, tiles): bulk_mass of rows with a bulk. Warps share the rows of the covariance
 * among them, so that it is read once per block: 4 head_dim^2 bytes for 8 rows, in decode once for the head group. */
template <int D>
__global__ void __launch_bounds__(WARP *JUDGE_WARPS)
    judge_kernel(device_attention a, device_layer layer, device_policy policy) {
  judge_shared &s = block_shared<judge_shared>();
  constexpr int32_t COLUMNS = (D + WARP - 1) / WARP; /* of a lane */
  query_tile tile = tile_at(a, blockIdx.z);
  int32_t g = blockIdx.y, first = blockIdx.x * JUDGE_ROWS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int32_t n_rows = tile.n * group_of(a) - first;
  if (tile.n_pages == 0 || n_rows <= 0) return;
  if (n_rows > JUDGE_ROWS) n_rows = JUDGE_ROWS;
  key_model keys = key_model_of(a, layer, policy, tile, blockIdx.z, g);
#pragma unroll
  for (int32_t i = threadIdx.x; i < JUDGE_ROWS * D; i += WARP * JUDGE_WARPS) {
    int32_t r = i / D;
    s.q[r][i % D] = r < n_rows ? a.q[(int64_t)tile_row(a, tile, g, first + r) * D + i % D] : 0;
  }
  __syncthreads();
  float q[JUDGE_ROWS][COLUMNS], square[JUDGE_ROWS] = {}, product = 0;
#pragma unroll
  for (int32_t r = 0; r < JUDGE_ROWS; r++)
#pragma unroll
    for (int32_t k = 0; k < COLUMNS; k++) q[r][k] = k * WARP + lane < D ? s.q[r][k * WARP + lane] : 0;
#pragma unroll JUDGE_AT_ONCE
  for (int32_t i = warp; i < D; i += JUDGE_WARPS) {
    float row[COLUMNS];
#pragma unroll
    for (int32_t k = 0; k < COLUMNS; k++) row[k] = k * WARP + lane < D ? keys.square[i * D + k * WARP + lane] : 0;
#pragma unroll
    for (int32_t r = 0; r < JUDGE_ROWS; r++) {
      float sum = 0;
#pragma unroll
      for (int32_t k = 0; k < COLUMNS; k++) sum = fmaf(row[k], q[r][k], sum);
      square[r] = fmaf(s.q[r][i], sum, square[r]);
    }
  }
#pragma unroll
  for (int32_t r = 0; r < JUDGE_ROWS; r++) {
    float sum = warp_sum(square[r]);
    if (lane == 0) s.square[warp][r] = sum;
  }
  if (warp < JUDGE_ROWS) /* and that row's mean */
    for (int32_t i = lane; i < D; i += WARP) product = fmaf(s.q[warp][i], keys.mean[i], product);
  product = warp_sum(product);
  __syncthreads();
  if (lane != 0 || warp >= n_rows) return;
  float sum = 0;
  for (int32_t w = 0; w < JUDGE_WARPS; w++) sum += s.square[w][warp];
  judge_row(a, policy, tile.n_pages * PYLLM_PAGE, tile_row(a, tile, g, first + warp), product, sum / keys.weight);
}

struct judge_launch {
  queue *to;
  const device_attention &a;
  const device_layer &layer;
  const device_policy &policy;
  int32_t n;

  template <int D> void run() const {
    int32_t rows = (n < PYLLM_PAGE ? n : PYLLM_PAGE) * (a.n_heads / a.n_kv_heads);
    dim3 grid((unsigned)((rows + JUDGE_ROWS - 1) / JUDGE_ROWS), (unsigned)a.n_kv_heads, (unsigned)most_tiles(n));
    launch(to, judge_kernel<D>, grid, dim3(WARP * JUDGE_WARPS), sizeof(judge_shared), a, layer, policy);
  }
};
} // namespace

void cuda_fold_moments(queue *to, const device_attention &a, const device_layer &layer) {
  launch(to, fold_kernel, dim3((unsigned)(a.head_dim / MOMENT_ROWS), (unsigned)a.n_kv_heads), dim3(FOLD_THREADS),
         sizeof(fold_shared), a, layer);
}

void cuda_estimate_bulk_mass(queue *to, const device_attention &a, const device_layer &layer,
                             const device_policy &policy, int32_t n) {
  if (!policy.means) cuda_fold_moments(to, a, layer);
  with_head_dim(a.head_dim, judge_launch{to, a, layer, policy, n});
}
