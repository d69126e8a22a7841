/* The linear stage's kernels. A few tokens multiply with weights as they are read, which is what decode waits for: a
 * warp's lanes hold four weight rows each. Many tokens multiply on the matrix units. */
#ifndef PYLLM_CUDA_LINEAR_CUH
#define PYLLM_CUDA_LINEAR_CUH
#include "cuda.cuh"

/* linear_gemv.cu: n <= FEW_TOKENS, or float weights. gemv_quantized takes as many of the jobs, of which the first is
 * for it, as it does in one launch, and returns how many these are. */
int32_t gemv_quantized(const backend *be, const activation *x, int32_t n, const linear_job *list, int32_t n_jobs);
void gemv_floats(const backend *be, const activation *x, int32_t n, const linear_job *job);
/* linear_gemm.cu: quantized weights, any n that is not few. */
void gemm(const backend *be, const activation *x, int32_t n, const linear_job *job);

/* Writes out[token, row] as linear_job asks. */
__device__ inline void put(const matrix &w, const float *bias, bool add, float *out, int32_t token, int32_t row,
                           float x) {
  float *at = out + (int64_t)token * w.rows + row;
  *at = (add ? *at : 0.0f) + (x + (bias ? bias[row] : 0.0f));
}
#endif
