/* Many tokens against a quantized matrix, on the matrix units. A warp has rows of its own and dequantizes them into
 * its registers, so a weight becomes a half once per tile of tokens and never passes through shared memory; the
 * block's warps share their tokens' halves there. What comes next is on its way while the present multiplies: tokens
 * by copies two steps ahead, packed weights in registers one step ahead. */
#include "linear.cuh"
#include "fragments.cuh"

namespace {
enum {
  WARPS = 4,
  STAGES = 3,          /* of tokens in shared memory: one that multiplies, two on their way */
  STAGE_HALVES = 4096, /* whatever the tile: fewer tokens go with more columns */
  HALF_BYTES = 2,
  CHUNK = 8, /* halves of a copy */
  ROW_CHUNKS = ACT_GROUP / CHUNK,
  BATCH = STAGE_HALVES / CHUNK / (WARPS * WARP), /* copies of a thread per stage */
  BATCH_TOKENS = WARPS * WARP / ROW_CHUNKS,      /* that the block copies at once */
};

/* What a block multiplies: 16 ROW_TILES rows per warp, TOKENS tokens, GROUPS groups of 32 columns per step. Small
 * matrices and few tokens want small blocks to fill the GPU; these have less to multiply per step, so their steps
 * are deeper, or the packed weights of the next step would come too late. BLOCKS: of a multiprocessor, which bounds
 * the registers. */
template <int ROW_TILES_, int TOKENS_, int BLOCKS_> struct tile {
  static constexpr int ROW_TILES = ROW_TILES_, TOKENS = TOKENS_, BLOCKS = BLOCKS_;
  static constexpr int ROWS = WARPS * ROW_TILES * TILE_ROWS, TOKEN_TILES = TOKENS / 8;
  static constexpr int GROUPS = STAGE_HALVES / (TOKENS * ACT_GROUP);
  typedef float sums[ROW_TILES][TOKEN_TILES][4];
};
typedef tile<2, 128, 2> large;
typedef tile<2, 64, 3> medium;
typedef tile<1, 32, 5> small;

/* A stage is (GROUPS, TOKENS, 32) halves. */
struct gemm_shared {
  alignas(16) uint16_t x[STAGES][STAGE_HALVES];
};

/* Where a token's chunk of a group is: every other pair of tokens has its halves of 16 columns swapped, so that the
 * 16 lanes that read at once, 4 tokens by 4 times 8 bytes, find all 32 banks. */
__device__ inline int chunk_at(int token, int chunk) { return (token * ROW_CHUNKS + (chunk ^ (token & 2))) * CHUNK; }

/* Columns from `group` on of the block's n tokens, at x. Tokens past n are zeros, columns past the last are not
 * copied. */
template <class T>
__device__ inline void copy_tokens(const int8_t *x, int32_t cols, int32_t n, int32_t group, uint16_t *stage) {
  int chunk = threadIdx.x % ROW_CHUNKS, first = threadIdx.x / ROW_CHUNKS;
  uint16_t *to = stage + chunk_at(first, chunk);
#pragma unroll
  for (int i = 0; i < BATCH; i++) {
    int next = i * BATCH_TOKENS, ahead = next / T::TOKENS, token = first + next % T::TOKENS;
    if (group + ahead >= cols / ACT_GROUP) break;
    uint32_t from = ((uint32_t)(token < n ? token : 0) * cols + chunk * CHUNK) * HALF_BYTES;
    copy_later(to + next * ACT_GROUP, x + (from + (group + ahead) * ACT_GROUP * HALF_BYTES), token < n);
  }
  end_copies();
}

/* One group of 32 columns: two matrix instructions deep. x: (TOKENS, 32) of the stage. */
template <class T>
__device__ inline void multiply(const uint16_t *x, const uint32_t (&a)[2][T::ROW_TILES][4], typename T::sums &sum) {
  int token = threadIdx.x % WARP / 4, column = threadIdx.x % 4 * 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint16_t *from = x + chunk_at(token, 2 * half + column / CHUNK) + column % CHUNK;
#pragma unroll
    for (int t = 0; t < T::TOKEN_TILES; t++) {
      uint2 four = *(const uint2 *)(from + t * 8 * ACT_GROUP);
      uint32_t b[2] = {four.x, four.y};
#pragma unroll
      for (int i = 0; i < T::ROW_TILES; i++) mma_f16(sum[i][t], a[half][i], b);
    }
  }
}

template <class T>
__device__ inline void write(const matrix &w, const quantized &x, int32_t n, const float *bias, bool add, float *out,
                             int32_t row, int32_t token, const typename T::sums &sum) {
#pragma unroll
  for (int t = 0; t < T::TOKEN_TILES; t++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int32_t to = token + 8 * t + threadIdx.x % 4 * 2 + j;
      if (to >= n) continue;
      float scale = x.scale[to];
#pragma unroll
      for (int i = 0; i < T::ROW_TILES; i++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          int32_t r = row + TILE_ROWS * i + threadIdx.x % WARP / 4 * 2 + k;
          if (r < w.rows) put(w, bias, add, out, to, r, sum[i][t][j + 2 * k] * scale);
        }
    }
}

/* The block's sums, from zero. That of an element takes its columns in order, one instruction after another, in
 * every tile: it does not depend on the tokens around. */
template <class Q, class T>
__device__ inline void sum_products(const matrix &w, const quantized &x, int32_t n, int32_t first_row,
                                    typename T::sums &sum) {
  gemm_shared &s = block_shared<gemm_shared>();
  int32_t groups = w.cols / ACT_GROUP, first_token = blockIdx.x * T::TOKENS, block_row = blockIdx.y * T::ROWS;
  const int8_t *tokens = opaque(x.planes + (int64_t)first_token * w.cols * HALF_BYTES);
  const unsigned char *tiles = opaque(w.data + (int64_t)(block_row / TILE_ROWS) * w.tile_bytes);
  uint32_t offsets = two_of(w.format.offset);
  packed_tile<Q> mine[T::ROW_TILES];
  packed_group<Q> packed[T::GROUPS][T::ROW_TILES];
#pragma unroll
  for (int i = 0; i < T::ROW_TILES; i++) {
    int32_t row = min(first_row + i * TILE_ROWS, w.rows - 1); /* past the last: not written */
    mine[i] = packed_tile<Q>::at((uint32_t)((row - block_row) / TILE_ROWS) * (uint32_t)w.tile_bytes, w.cols);
#pragma unroll
    for (int g = 0; g < T::GROUPS; g++) packed[g][i] = mine[i].load(tiles, min(g, groups - 1));
  }
  for (int i = 0; i < STAGES - 1; i++) copy_tokens<T>(tokens, w.cols, n - first_token, i * T::GROUPS, s.x[i]);
  int stage = 0;
  for (int32_t group = 0; group < groups; group += T::GROUPS) {
    wait_for_copies<STAGES - 2>();
    __syncthreads(); /* this stage is there, and the one before it is free */
    copy_tokens<T>(tokens, w.cols, n - first_token, group + (STAGES - 1) * T::GROUPS,
                   s.x[stage ? stage - 1 : STAGES - 1]);
#pragma unroll
    for (int g = 0; g < T::GROUPS; g++) {
      if (g && group + g >= groups) break;
      uint32_t a[2][T::ROW_TILES][4];
#pragma unroll
      for (int i = 0; i < T::ROW_TILES; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) load_fragment(packed[g][i], half, offsets, a[half][i]);
        packed[g][i] = mine[i].load(tiles, min(group + g + T::GROUPS, groups - 1));
      }
      multiply<T>(s.x[stage] + g * T::TOKENS * ACT_GROUP, a, sum);
    }
    stage = stage + 1 < STAGES ? stage + 1 : 0;
  }
}

/* Grid: (tokens / TOKENS, rows / ROWS), so that neighbours in time read the same weights. */
template <class T>
__global__ void __launch_bounds__(WARPS *WARP, T::BLOCKS)
    gemm_kernel(matrix w, quantized x, int32_t n, const float *bias, bool add, float *out) {
  int32_t row = blockIdx.y * T::ROWS + threadIdx.x / WARP * (T::ROW_TILES * TILE_ROWS);
  typename T::sums sum = {};
  with_format(w.format, [&](auto format) { sum_products<decltype(format), T>(w, x, n, row, sum); });
  write<T>(w, x, n, bias, add, out, row, blockIdx.x * T::TOKENS, sum);
}

template <class T> dim3 grid_of(int32_t rows, int32_t n) {
  static_assert((int64_t)T::ROWS * MOST_GRID_ROWS >= MOST_ROWS, "a grid has blocks for all rows");
  return dim3((unsigned)(n + T::TOKENS - 1) / T::TOKENS, (unsigned)(rows + T::ROWS - 1) / T::ROWS);
}

/* Whether blocks of this tile have tokens enough and are three for every two multiprocessors, or more. */
template <class T> bool fills(int32_t rows, int32_t n, int processors) {
  dim3 grid = grid_of<T>(rows, n);
  return n > T::TOKENS / 2 && (int64_t)grid.x * grid.y * 2 >= (int64_t)processors * 3;
}

template <class T> void gemm_with(const backend *be, const activation *x, int32_t n, const linear_job *job) {
  launch(queue_of(be), gemm_kernel<T>, grid_of<T>(job->w->rows, n), dim3(WARPS * WARP), sizeof(gemm_shared), *job->w,
         x->q, n, job->bias, job->add, job->out);
}
} // namespace

void gemm(const backend *be, const activation *x, int32_t n, const linear_job *job) {
  int processors = ((const device *)be->device)->processors;
  if (fills<large>(job->w->rows, n, processors)) gemm_with<large>(be, x, n, job);
  else if (fills<medium>(job->w->rows, n, processors)) gemm_with<medium>(be, x, n, job);
  else gemm_with<small>(be, x, n, job);
}
