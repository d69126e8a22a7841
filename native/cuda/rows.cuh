/* Rounding of activations to 16 bits in two planes, as on the CPU (kernels.h). */
#ifndef PYLLM_CUDA_ROWS_CUH
#define PYLLM_CUDA_ROWS_CUH
#include "cuda.cuh"

/* One warp: group `g` of 32 columns of a row whose values are written, one column per lane. */
__device__ inline void round_group(const activation &a, int64_t row, int32_t g) {
  int lane = threadIdx.x % WARP;
  float x = a.values[row * a.cols + g * ACT_GROUP + lane];
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
#endif
