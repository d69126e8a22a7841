/* Stages that work on one token at a time: a block of threads per token. */
#include "cuda.cuh"
#include "rows.cuh"

namespace {
enum { THREADS = 256 };

/* The input of a stage's second half: rounds row `row` of a, whose values the block has written. cols % 32 == 0. */
__device__ void round_row(const activation &a, int64_t row) {
  __syncthreads();
  for (int32_t g = threadIdx.x / WARP; g < a.cols / ACT_GROUP; g += THREADS / WARP) round_group(a, row, g);
}

struct norm_shared {
  float partial[WARP];
};

/* One block per row. */
__global__ void norm_kernel(const float *x, const float *w, float eps, bool rounded, activation out) {
  norm_shared &s = block_shared<norm_shared>();
  int64_t row = blockIdx.x;
  int32_t cols = out.cols;
  x += row * cols;
  float squares = 0;
  for (int32_t i = threadIdx.x; i < cols; i += THREADS) squares += x[i] * x[i];
  float scale = 1.0f / sqrtf(block_sum(squares, s.partial) / (float)cols + eps);
  for (int32_t i = threadIdx.x; i < cols; i += THREADS) out.values[row * cols + i] = x[i] * scale * w[i];
  if (rounded) round_row(out, row);
}
} // namespace

void cuda_norm(const backend *be, const float *x, const float *w, float eps, int32_t n, bool rounded, activation *out) {
  launch(queue_of(be), norm_kernel, dim3((unsigned)n), dim3(THREADS), sizeof(norm_shared), x, w, eps, rounded, *out);
}
