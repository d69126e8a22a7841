/* What the CUDA backend's files share. Stages: rows.cu, linear*.cu and the attention's files; the table: backend.cu.
 * Every pointer in the structs of ops.h is the device's here: kernels take the structs by value. */
#ifndef PYLLM_CUDA_CUDA_CUH
#define PYLLM_CUDA_CUDA_CUH
#include "common.cuh"
extern "C" {
#include "ops.h"
}
#include <float.h>

/* The batch that the stages work on, in the GPU's memory: kernels that run again from a graph read it there. */
struct step {
  int32_t position, n;
  int32_t overflowed; /* 0 as a batch begins; cuda_finite's */
};

/* backend.device: what belongs to one opened model. */
struct device {
  struct queue queue;
  int32_t number; /* of the GPU */
  int processors; /* that it has */
  bool writing;   /* a graph, and nothing had failed before */
  struct step *step;
  unsigned char
      *staging; /* (staging_bytes) of the host's memory that the GPU copies from: a step, behind it embeddings */
  size_t staging_bytes;
};

/* Up to this many tokens, activations are rounded to 16 bits as on the CPU, for products with bytes. More tokens go
 * through the matrix units as halves: quantized.planes then holds (n, cols) halves x / scale, and quantized.scale one
 * power of two per token, so that nothing overflows. Halves round at 11 bits, which costs no more than the 0.0001 nats
 * that docs/performance.md gives for them. All stages of a batch see the same n. */
enum { FEW_TOKENS = 4 };
ANYWHERE bool few_tokens(int32_t n) { return n <= FEW_TOKENS; }

/* Of a matrix: so many, 64 at least per block, are what one dimension of a grid counts (linear_gemm.cu). No vocabulary
 * comes near. */
enum { MOST_GRID_ROWS = 65535, MOST_ROWS = MOST_GRID_ROWS * 64 };

extern const attention_ops cuda_attention_ops; /* attention.cu */

/* The queue, at the head of every call that is no stage: whichever thread it comes from has used another GPU before.
 * Stages follow in the same thread and may be captured, which forbids that: they take queue_of. */
queue *cuda_enter(const backend *be);
inline queue *queue_of(const backend *be) { return &((device *)be->device)->queue; }
inline const step *step_of(const backend *be) { return ((device *)be->device)->step; }

/* Memory of the host, zeroed, that kernels read and write where it is: its address on the GPU, and on the host; NULL
 * when it is refused. Freed by its address on the host, which may be NULL. */
void *cuda_alloc_mapped(const backend *be, size_t bytes, void **host);
void cuda_free_mapped(const backend *be, void *host);
void cuda_begin(const backend *be, int32_t position, int32_t n);
int32_t cuda_embed(const backend *be, const quant_type *type, const void *table, int32_t cols, const int32_t *tokens,
                   int32_t n, float *x, pyllm_error *err);
void cuda_angles(const backend *be, const double *frequency, int32_t half, float mscale, int32_t position, int32_t n,
                 float *cosine, float *sine);
void cuda_linear(const backend *be, const activation *x, int32_t n, const linear_job *jobs, int32_t n_jobs);
bool cuda_finite(const backend *be, const float *x, int64_t n);
void cuda_swiglu(const backend *be, const float *gate, const float *up, int32_t n, int32_t bits, activation *out);
void cuda_norm(const backend *be, const float *x, const float *w, float eps, int32_t n, int32_t bits, activation *out);
#endif
