/* Backends by name, and the library of the GPU's. */
#ifndef PYLLM_SRC_BACKEND_H
#define PYLLM_SRC_BACKEND_H
#include "ops.h"

/* device: "cpu" or NULL, "cuda", "cuda:1". isa NULL for the processor's best. Every backend has threads: they load the
 * weights. On success out is the caller's to close. */
int32_t backend_open(const char *device, int32_t n_threads, const char *isa, backend *out, pyllm_error *err);
void backend_close(backend *be);

/* Moves what is in the host's memory into the backend's: a copy of `bytes`, or NULL when memory is refused; a packed
 * matrix, for messages called `where`. */
void *backend_copy(const backend *be, const void *data, size_t bytes);
int32_t backend_place(const backend *be, matrix *m, const char *where, pyllm_error *err);
void backend_free_matrix(const backend *be, matrix *m);

/* What the CUDA library offers through its one exported function, `const cuda_library *pyllm_cuda(void)`. */
typedef struct cuda_library {
  /* CUDA_INTERFACE: a checksum of the headers and of what packs weights, so that libraries of two builds never meet. */
  uint32_t interface;
  const ops *ops;
  int32_t (*info)(int32_t number, pyllm_device_info *out, pyllm_error *err);
  int32_t (*open)(int32_t number, void **device, pyllm_error *err);
  void (*close)(void *device);
} cuda_library;

/* load_cuda.c, or the emulator's: NULL, with the reason, where it cannot be loaded. */
const cuda_library *load_cuda(pyllm_error *err);

#endif
