/* Matrices on one input: which kernel multiplies. */
#include "linear.cuh"

void cuda_linear(const backend *be, const activation *x, int32_t n, const linear_job *jobs, int32_t n_jobs) {
  for (int32_t i = 0; i < n_jobs;) {
    const linear_job *job = &jobs[i];
    if (job->w->quantized && few_tokens(n)) i += gemv_quantized(be, x, n, job, n_jobs - i);
    else if (job->w->quantized) gemm(be, x, n, job), i++;
    else gemv_floats(be, x, n, job), i++;
  }
}
