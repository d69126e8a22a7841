/* Activations as the linear stage wants them: see FEW_TOKENS in cuda.cuh. */
#ifndef PYLLM_CUDA_ROWS_CUH
#define PYLLM_CUDA_ROWS_CUH
#include "cuda.cuh"

/* One warp: group `g` of 32 columns of a row, of which each lane has one value x, to 16 bits in two planes as on the
 * CPU (kernels.h). */
__device__ inline void round_group(const activation &a, int64_t row, int32_t g, float x) {
  int lane = threadIdx.x % WARP;
  /* 0, or NaN where x holds NaN or infinity: rounding must not hide it */
  float scale = warp_max(fabsf(x)) / (float)ACT_MAX + warp_sum(x * 0.0f);
  if (scale < FLT_MIN) scale = 0; /* its inverse would overflow */
  float inverse = scale > 0 ? 1.0f / scale : 0.0f;
  int q = scale == scale ? __float2int_rn(x * inverse) : 0, high = (q + 128) >> 8;
  int8_t *planes = a.q.planes + row * a.cols * 2 + g * 2 * ACT_GROUP + lane / 4 * 8 + lane % 4;
  planes[0] = (int8_t)high;
  planes[4] = (int8_t)(q - high * 256);
  int sum = q;
  for (int bits = ACT_HALF / 2; bits; bits /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, bits);
  if (lane == 0) a.q.scale[row * (a.cols / ACT_GROUP) + g] = scale;
  if (lane % ACT_HALF == 0) {
    int64_t half = row * (a.cols / ACT_HALF) + 2 * g + lane / ACT_HALF;
    a.q.sum[half] = sum;
    a.q.product[half] = scale * (float)sum;
  }
}

/* The power of two at or below x; NaN where x is no finite number, and nothing smaller than what has an inverse. */
__device__ inline float power_of_two(float x) {
  if (!(x <= FLT_MAX)) return x - x;
  uint32_t exponent = __float_as_uint(fmaxf(x, FLT_MIN)) & 0x7f800000u;
  return __uint_as_float(exponent);
}

enum { ROW_THREADS = 256 };

/* The grid of a kernel that writes rows. A few tokens' rounding needs no more than 32 columns at once, so their rows
 * are cut up: a block has so many columns as threads. */
inline dim3 row_grid(int32_t n, int32_t cols) {
  return dim3((unsigned)n, few_tokens(n) ? (unsigned)(cols + ROW_THREADS - 1) / ROW_THREADS : 1u);
}

/* A block of row_grid's: column i of row blockIdx.x = value(i), and in the form for n tokens where `rounded`; cols %
 * 32 == 0 then. partial: (32) shared floats. Contains barriers. */
template <class F>
__device__ inline void write_row(const activation &a, int32_t n, bool rounded, float *partial, F value) {
  int64_t row = blockIdx.x;
  float *values = a.values + row * a.cols;
  if (few_tokens(n)) {
    int32_t i = blockIdx.y * ROW_THREADS + threadIdx.x;
    if (i >= a.cols) return; /* whole warps where they are rounded */
    float x = value(i);
    values[i] = x;
    if (rounded) round_group(a, row, i / ACT_GROUP, x);
    return;
  }
  float top = 0, poison = 0;
  for (int32_t i = threadIdx.x; i < a.cols; i += ROW_THREADS) {
    float x = value(i);
    values[i] = x;
    top = fmaxf(top, fabsf(x));
    poison += x * 0.0f;
  }
  if (!rounded) return;
  uint16_t *halves = (uint16_t *)a.q.planes + row * a.cols;
  float scale = power_of_two(block_max(top, partial) + block_sum(poison, partial));
  for (int32_t i = threadIdx.x; i < a.cols; i += ROW_THREADS) halves[i] = float_to_half(values[i] / scale);
  if (threadIdx.x == 0) a.q.scale[row] = scale;
}
#endif
