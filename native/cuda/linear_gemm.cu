/* Many tokens against a quantized matrix, on the matrix units: a block dequantizes 128 weight rows to halves, 32 columns
 * at a time, and multiplies them with 128 tokens' halves. */
#include "linear.cuh"
#include "weights.cuh"

namespace {
enum {
  ROWS = 128,   /* of a block: a tile of 16 per warp to dequantize */
  TOKENS = 128, /* of a block */
  WARPS = 8,
  WARP_ROWS = 32, /* a warp multiplies 32 rows with 64 tokens */
  WARP_TOKENS = 64,
  ROW_TILES = WARP_ROWS / 16,
  TOKEN_TILES = WARP_TOKENS / 8,
  PITCH = ACT_GROUP + 8, /* halves; the rows of a fragment then lie in different banks */
};

struct gemm_shared {
  alignas(16) uint16_t w[ROWS][PITCH], x[TOKENS][PITCH];
};

/* Columns [32 group + 16 half, + 16) of one row of a tile, as halves. */
template <class Q>
__device__ inline void dequantize(const matrix &w, const unsigned char *tile, int32_t group, int half, int row,
                                  uint16_t *out) {
  const unsigned char *group_at = tile + scale_bytes<Q>(w.cols) + (int64_t)group * Q::GROUP_BYTES;
  const uint32_t *fours = (const uint32_t *)group_at + row;
  row_scales<1> s = load_scales<Q, 1>(tile, group, half, row);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t q = __ldg(fours + (Q::NIBBLES ? i : 4 * half + i) * TILE_ROWS);
    if (Q::NIBBLES) q = (q >> 4 * half & 0x0f0f0f0f) | above_nibble<Q>(group_at, 4 * half + i, row);
#pragma unroll
    for (int j = 0; j < 4; j++)
      out[4 * i + j] = float_to_half(s.scale[0] * (float)((int)(q >> 8 * j & 255) - w.format.offset) + s.min[0]);
  }
}

/* Every warp dequantizes one tile: a lane does half a row. Rows past the matrix stay as they are and are not written. */
template <class Q>
__device__ inline void load_weights(const matrix &w, int32_t first_row, int32_t group, gemm_shared &s) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int32_t tile = first_row / TILE_ROWS + warp;
  if (tile * TILE_ROWS >= w.rows) return;
  dequantize<Q>(w, w.data + (int64_t)tile * w.tile_bytes, group, lane % 2, lane / 2,
                &s.w[warp * TILE_ROWS + lane / 2][lane % 2 * 16]);
}

__device__ inline void load_tokens(const uint16_t *x, int32_t cols, int32_t first, int32_t n, int32_t group,
                                   gemm_shared &s) {
  for (int i = threadIdx.x; i < TOKENS * 4; i += WARPS * WARP) {
    int32_t token = first + i / 4, column = i % 4 * 8;
    uint4 zero = make_uint4(0, 0, 0, 0);
    const uint16_t *at = x + (int64_t)token * cols + group * ACT_GROUP + column;
    *(uint4 *)&s.x[i / 4][column] = token < n ? __ldg((const uint4 *)at) : zero;
  }
}

typedef float sums[ROW_TILES][TOKEN_TILES][4];

__device__ inline uint32_t two_halves(const uint16_t *at) { return *(const uint32_t *)at; }

/* One group of 32 columns: two matrix instructions deep. token_tiles: those that hold tokens. */
__device__ inline void multiply(const gemm_shared &s, int row, int token, int token_tiles, sums &sum) {
  int group = threadIdx.x % WARP / 4, pair = threadIdx.x % 4 * 2;
  for (int k = 0; k < ACT_GROUP; k += 16) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) a[i][j] = two_halves(&s.w[row + 16 * i + group + j % 2 * 8][k + j / 2 * 8 + pair]);
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++) {
      if (t >= token_tiles) break;
      const uint16_t *x = &s.x[token + 8 * t + group][k + pair];
      uint32_t b[2] = {two_halves(x), two_halves(x + 8)};
#pragma unroll
      for (int i = 0; i < ROW_TILES; i++) mma_f16(sum[i][t], a[i], b);
    }
  }
}

/* Grid: (rows / 128, tokens / 128). */
template <class Q>
__device__ void gemm_block(const matrix &w, const quantized &x, int32_t n, const float *bias, bool add, float *out) {
  gemm_shared &s = block_shared<gemm_shared>();
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int32_t first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
  int row = warp % 4 * WARP_ROWS, token = warp / 4 * WARP_TOKENS;
  int token_tiles = max(0, min((int)TOKEN_TILES, (n - first_token - token + 7) / 8));
  sums sum = {};
  for (int32_t group = 0; group < w.cols / ACT_GROUP; group++) {
    load_weights<Q>(w, first_row, group, s);
    load_tokens((const uint16_t *)x.planes, w.cols, first_token, n, group, s);
    __syncthreads();
    multiply(s, row, token, token_tiles, sum);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int32_t r = first_row + row + 16 * i + lane / 4 + j / 2 * 8,
                to = first_token + token + 8 * t + lane % 4 * 2 + j % 2;
        if (r < w.rows && to < n) put(w, bias, add, out, to, r, sum[i][t][j] * x.scale[to]);
      }
}

__global__ void __launch_bounds__(WARPS *WARP)
    gemm_kernel(matrix w, quantized x, int32_t n, const float *bias, bool add, float *out) {
  with_format(w.format, [&](auto format) { gemm_block<decltype(format)>(w, x, n, bias, add, out); });
}
} // namespace

void gemm(const backend *be, const activation *x, int32_t n, const linear_job *job) {
  dim3 grid((unsigned)(job->w->rows + ROWS - 1) / ROWS, (unsigned)(n + TOKENS - 1) / TOKENS);
  launch(queue_of(be), gemm_kernel, grid, dim3(WARPS * WARP), sizeof(gemm_shared), *job->w, x->q, n, job->bias,
         job->add, job->out);
}
