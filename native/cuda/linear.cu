/* Matrices on one input: which kernel multiplies. */
#include "linear.cuh"

void cuda_linear(const backend *be, const activation *x, int32_t n, const linear_job *jobs, int32_t n_jobs) {
  for (int32_t i = 0; i < n_jobs; i++) {
    const matrix *w = jobs[i].w;
    if (w->quantized && !few_tokens(n)) gemm(be, x, n, &jobs[i]);
    else if (w->quantized) gemv_quantized(be, x, n, &jobs[i]);
    else gemv_floats(be, x, n, &jobs[i]);
  }
}
