/* A few tokens against a matrix. Reads every weight once; a block of warps shares one tile of 16 rows and splits its
 * columns, so that also small matrices fill the GPU. Lane l of a warp holds rows 4 (l % 4) to 4 (l % 4) + 3. */
#include "linear.cuh"
#include "weights.cuh"

namespace {
enum { WARPS = 8, LANE_ROWS = 4 };

template <int TOKENS> struct gemv_shared {
  float partial[WARPS][TOKENS][TILE_ROWS];
};

/* One lane's results. Every loop over them is unrolled: they live in registers. */
template <int TOKENS> using sums = float[TOKENS][LANE_ROWS];

/* d += a b, by bytes: a unsigned, b signed. */
__device__ inline int dot_bytes(uint32_t a, uint32_t b, int sum) {
#ifdef __CUDACC__
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
#else
  for (int i = 0; i < 32; i += 8) sum += (int)(a >> i & 255) * (int8_t)(b >> i);
#endif
  return sum;
}

__device__ inline uint32_t component(const uint4 &x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

/* The block's warps and lanes have summed their columns: adds them up and writes the tile's rows. */
template <int TOKENS>
__device__ void finish_tile(const matrix &w, const float *bias, bool add, float *out, int32_t token, int32_t n,
                            const sums<TOKENS> &sum) {
  auto &s = block_shared<gemv_shared<TOKENS>>();
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int r = 0; r < LANE_ROWS; r++) {
      float x = sum[t][r];
      for (int bits = 4; bits < WARP; bits *= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
      if (lane < 4) s.partial[warp][t][4 * lane + r] = x;
    }
  __syncthreads();
  int32_t t = threadIdx.x / TILE_ROWS, row = blockIdx.x * TILE_ROWS + threadIdx.x % TILE_ROWS;
  if (t >= n || row >= w.rows) return;
  float x = 0;
  for (int i = 0; i < WARPS; i++) x += s.partial[i][t][threadIdx.x % TILE_ROWS];
  put(w, bias, add, out, token + t, row, x);
}

/* Adds one lane's share of a group of 32 columns: fours `first` (and, of nibbles, 4 + first) of its four rows. */
template <class Q, int TOKENS>
__device__ inline void add_group(const matrix &w, const unsigned char *scales, const unsigned char *quants_at,
                                 int32_t group, int first, int row, const quantized &x, int32_t n, sums<TOKENS> &sum) {
  constexpr int FOURS = Q::NIBBLES ? 2 : 1, HALVES = Q::GROUP == 16 && FOURS == 2 ? 2 : 1;
  const unsigned char *group_at = quants_at + (int64_t)group * Q::GROUP_BYTES;
  uint4 bytes = __ldg((const uint4 *)group_at + first * 4 + row / 4);
  row_scales<LANE_ROWS> s[HALVES];
  for (int h = 0; h < HALVES; h++) s[h] = load_scales<Q, LANE_ROWS>(scales, group, HALVES == 2 ? h : first / 4, row);
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    if (t >= n) break;
    int64_t at = (int64_t)t * (w.cols / ACT_GROUP) + group;
    float scale = x.scale[at];
#pragma unroll
    for (int f = 0; f < FOURS; f++) {
      uint2 planes = __ldg((const uint2 *)(x.planes + (at * 8 + first + 4 * f) * 8));
#pragma unroll
      for (int r = 0; r < LANE_ROWS; r++) {
        uint32_t q = component(bytes, r);
        if (Q::NIBBLES) q = (q >> 4 * f & 0x0f0f0f0f) | above_nibble<Q>(group_at, first + 4 * f, row + r);
        int dot = 256 * dot_bytes(q, planes.x, 0) + dot_bytes(q, planes.y, 0);
        sum[t][r] += scale * s[f % HALVES].scale[r] * (float)dot;
      }
    }
    /* Offset and minimum enter once per half of the group, by the lane that holds its first four. */
#pragma unroll
    for (int f = 0; f < FOURS; f++) {
      if (first % 4) continue;
      int half = FOURS == 2 ? f : first / 4;
      int offset = w.format.offset * x.sum[2 * at + half];
#pragma unroll
      for (int r = 0; r < LANE_ROWS; r++)
        sum[t][r] += s[f % HALVES].min[r] * x.product[2 * at + half] - scale * s[f % HALVES].scale[r] * (float)offset;
    }
  }
}

template <class Q, int TOKENS>
__device__ void multiply_tile(const matrix &w, const quantized &x, int32_t n, sums<TOKENS> &sum) {
  constexpr int LANES = (Q::NIBBLES ? 4 : 8) * 4 * TILE_ROWS / 16,
                AT_ONCE = WARP / LANES; /* lanes per group, groups per warp */
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const unsigned char *tile = w.data + (int64_t)blockIdx.x * w.tile_bytes, *quants_at = tile + scale_bytes<Q>(w.cols);
  int32_t groups = w.cols / ACT_GROUP;
  for (int32_t g = warp * AT_ONCE + lane / LANES; g < groups; g += WARPS * AT_ONCE)
    add_group<Q, TOKENS>(w, tile, quants_at, g, lane % LANES / 4, 4 * (lane % 4), x, n, sum);
}

/* Grid: (tiles). n <= TOKENS. */
template <int TOKENS>
__global__ void __launch_bounds__(WARPS *WARP)
    gemv_kernel(matrix w, quantized x, int32_t n, const float *bias, bool add, float *out) {
  sums<TOKENS> sum = {};
  with_format(w.format, [&](auto format) { multiply_tile<decltype(format), TOKENS>(w, x, n, sum); });
  finish_tile<TOKENS>(w, bias, add, out, 0, n, sum);
}

/* Grid: (strips of 16 rows, fours of tokens). Columns go in pairs: a warp takes 8 pairs at once. */
template <enum strip_type TYPE>
__global__ void __launch_bounds__(WARPS *WARP)
    floats_kernel(matrix w, const float *x, int32_t n_tokens, const float *bias, bool add, float *out) {
  int32_t token = blockIdx.y * FEW_TOKENS, n = min(n_tokens - token, (int32_t)FEW_TOKENS);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const unsigned char *strip = w.data + (int64_t)blockIdx.x * w.tile_bytes;
  sums<FEW_TOKENS> sum = {};
  for (int32_t pair = warp * 8 + lane / 4; pair < w.cols / 2; pair += WARPS * 8)
#pragma unroll
    for (int t = 0; t < FEW_TOKENS; t++) {
      if (t >= n) break;
      float2 v = __ldg((const float2 *)(x + (int64_t)(token + t) * w.cols) + pair);
#pragma unroll
      for (int r = 0; r < LANE_ROWS; r++) {
        int64_t at = ((int64_t)pair * STRIP + 4 * (lane % 4) + r) * 2;
        sum[t][r] += strip_value<TYPE>(strip, at) * v.x + strip_value<TYPE>(strip, at + 1) * v.y;
      }
    }
  finish_tile<FEW_TOKENS>(w, bias, add, out, token, n, sum);
}
} // namespace

void gemv_quantized(const backend *be, const activation *x, int32_t n, const linear_job *job) {
  auto *kernel = n == 1 ? gemv_kernel<1> : gemv_kernel<FEW_TOKENS>;
  size_t shared = n == 1 ? sizeof(gemv_shared<1>) : sizeof(gemv_shared<FEW_TOKENS>);
  launch(queue_of(be), kernel, dim3((unsigned)tiles_of_rows(job->w->rows)), dim3(WARPS * WARP), shared, *job->w, x->q,
         n, job->bias, job->add, job->out);
}

void gemv_floats(const backend *be, const activation *x, int32_t n, const linear_job *job) {
  auto *kernel = job->w->strip == STRIP_F32   ? floats_kernel<STRIP_F32>
                 : job->w->strip == STRIP_F16 ? floats_kernel<STRIP_F16>
                                              : floats_kernel<STRIP_BF16>;
  dim3 grid((unsigned)tiles_of_rows(job->w->rows), (unsigned)((n + FEW_TOKENS - 1) / FEW_TOKENS));
  launch(queue_of(be), kernel, grid, dim3(WARPS * WARP), sizeof(gemv_shared<FEW_TOKENS>), *job->w, x->values, n,
         job->bias, job->add, job->out);
}
