/* Stages that work on one token at a time: a block of threads per token. */
#include "cuda.cuh"
#include "rows.cuh"

namespace {
enum { THREADS = 256 };

struct row_shared {
  float partial[WARP];
};

/* Grid: enough threads for (n, half). */
__global__ void angles_kernel(const double *frequency, int32_t half, float mscale, const step *now, float *cosine,
                              float *sine) {
  int32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= now->n * half) return;
  double angle = (now->position + i / half) * frequency[i % half];
  cosine[i] = (float)cos(angle) * mscale;
  sine[i] = (float)sin(angle) * mscale;
}

/* Grid: (n). */
__global__ void norm_kernel(const float *x, const float *w, float eps, int32_t n, bool rounded, activation out) {
  row_shared &s = block_shared<row_shared>();
  int64_t row = blockIdx.x;
  int32_t cols = out.cols;
  x += row * cols;
  float squares = 0;
  for (int32_t i = threadIdx.x; i < cols; i += THREADS) squares += x[i] * x[i];
  float scale = 1.0f / sqrtf(block_sum(squares, s.partial) / (float)cols + eps);
  for (int32_t i = threadIdx.x; i < cols; i += THREADS) out.values[row * cols + i] = x[i] * scale * w[i];
  round_row(out, row, n, rounded, s.partial);
}

/* Grid: (n). */
__global__ void swiglu_kernel(const float *gate, const float *up, int32_t n, bool rounded, activation out) {
  row_shared &s = block_shared<row_shared>();
  int64_t row = blockIdx.x, first = row * out.cols;
  for (int32_t i = threadIdx.x; i < out.cols; i += THREADS) {
    float g = gate[first + i], e = expf(-fabsf(g)), sigmoid = (g < 0 ? e : 1.0f) / (1.0f + e);
    out.values[first + i] = g * sigmoid * up[first + i];
  }
  round_row(out, row, n, rounded, s.partial);
}
} // namespace

void cuda_angles(const backend *be, const double *frequency, int32_t half, float mscale, int32_t, int32_t n,
                 float *cosine, float *sine) {
  dim3 grid((unsigned)(n * half + THREADS - 1) / THREADS);
  launch(queue_of(be), angles_kernel, grid, dim3(THREADS), 0, frequency, half, mscale, step_of(be), cosine, sine);
}

void cuda_norm(const backend *be, const float *x, const float *w, float eps, int32_t n, bool rounded, activation *out) {
  launch(queue_of(be), norm_kernel, dim3((unsigned)n), dim3(THREADS), sizeof(row_shared), x, w, eps, n, rounded, *out);
}

void cuda_swiglu(const backend *be, const float *gate, const float *up, int32_t n, bool rounded, activation *out) {
  launch(queue_of(be), swiglu_kernel, dim3((unsigned)n), dim3(THREADS), sizeof(row_shared), gate, up, n, rounded, *out);
}
