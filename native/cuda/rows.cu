/* Stages that work on one token at a time. */
#include "cuda.cuh"
#include "overflow.h"
#include "rows.cuh"

namespace {
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

/* Grid: row_grid; every block of a row sums up all its squares. */
__global__ void norm_kernel(const float *x, const float *w, float eps, int32_t n, bool rounded, activation out) {
  row_shared &s = block_shared<row_shared>();
  int32_t cols = out.cols;
  x += (int64_t)blockIdx.x * cols;
  float squares = 0;
#pragma unroll 8
  for (int32_t i = threadIdx.x; i < cols; i += ROW_THREADS) squares += x[i] * x[i];
  float scale = rms_scale(block_sum(squares, s.partial), cols, eps);
  write_row(out, n, rounded, s.partial, [=](int32_t i) { return x[i] * scale * w[i]; });
}

/* Grid: row_grid. */
__global__ void swiglu_kernel(const float *gate, const float *up, int32_t n, bool rounded, activation out) {
  int64_t first = (int64_t)blockIdx.x * out.cols;
  write_row(out, n, rounded, block_shared<row_shared>().partial, [=](int32_t i) {
    float g = gate[first + i], e = expf(-fabsf(g)), sigmoid = (g < 0 ? e : 1.0f) / (1.0f + e);
    return g * sigmoid * up[first + i];
  });
}

/* Any grid: all threads share x (n). */
__global__ void finite_kernel(const float *x, int64_t n, step *now) {
  float poison = 0;
  for (int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * ROW_THREADS)
    poison += x[i] * 0.0f;
  if (poison != 0) now->overflowed = 1; /* all write the same */
}
} // namespace

void cuda_angles(const backend *be, const double *frequency, int32_t half, float mscale, int32_t, int32_t n,
                 float *cosine, float *sine) {
  dim3 grid((unsigned)(n * half + ROW_THREADS - 1) / ROW_THREADS);
  launch(queue_of(be), angles_kernel, grid, dim3(ROW_THREADS), 0, frequency, half, mscale, step_of(be), cosine, sine);
}

void cuda_norm(const backend *be, const float *x, const float *w, float eps, int32_t n, int32_t bits, activation *out) {
  launch(queue_of(be), norm_kernel, row_grid(n, out->cols), dim3(ROW_THREADS), sizeof(row_shared), x, w, eps, n,
         bits != 0, *out);
}

void cuda_swiglu(const backend *be, const float *gate, const float *up, int32_t n, int32_t bits, activation *out) {
  launch(queue_of(be), swiglu_kernel, row_grid(n, out->cols), dim3(ROW_THREADS), sizeof(row_shared), gate, up, n,
         bits != 0, *out);
}

bool cuda_finite(const backend *be, const float *x, int64_t n) {
  device *d = (device *)be->device;
  launch(&d->queue, finite_kernel, dim3((unsigned)d->processors), dim3(ROW_THREADS), 0, x, n, d->step);
  int32_t overflowed;
  be->ops->read(be, &overflowed, &d->step->overflowed, sizeof overflowed);
  return !overflowed;
}
