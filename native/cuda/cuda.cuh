/* What the CUDA backend's files share. Stages: rows.cu, linear*.cu and the attention's files; the table: backend.cu.
 * Every pointer in the structs of ops.h is the device's here: kernels take the structs by value. */
#ifndef PYLLM_CUDA_CUDA_CUH
#define PYLLM_CUDA_CUDA_CUH
#include "common.cuh"
extern "C" {
#include "ops.h"
}
#include <float.h>

/* backend.device: what belongs to one opened model. */
struct device {
  struct queue queue;
  int32_t number; /* of the GPU */
};

inline queue *queue_of(const backend *be) { return &((device *)be->device)->queue; }

void cuda_norm(const backend *be, const float *x, const float *w, float eps, int32_t n, bool rounded, activation *out);
#endif
