#include "backend.h"
#include "error.h"
#include <stdlib.h>
#include <string.h>

/* The number of "cuda" or "cuda:N". */
static int32_t cuda_number(const char *device, int32_t *number, pyllm_error *err) {
  long n = 0;
  char *end = (char *)device;
  if (strncmp(device, "cuda", 4) == 0) {
    end += 4;
    if (end[0] == ':' && end[1] >= '0' && end[1] <= '9') n = strtol(end + 1, &end, 10);
  }
  if (end == device || *end || n > 1023)
    return fail(err, PYLLM_ERR_ARGUMENT, "device '%.32s' is unknown: cpu, cuda and cuda:N are possible", device);
  *number = (int32_t)n;
  return PYLLM_OK;
}

static int32_t open_cuda(const char *device, backend *out, pyllm_error *err) {
  int32_t number = 0, status = cuda_number(device, &number, err);
  if (status) return status;
  const cuda_library *library = load_cuda(err);
  if (!library) return PYLLM_ERR_DEVICE;
  status = library->open(number, &out->device, err);
  if (!status) out->ops = library->ops;
  return status;
}

int32_t backend_open(const char *device, int32_t n_threads, const char *isa, backend *out, pyllm_error *err) {
  if (n_threads < 1 || n_threads > 256)
    return fail(err, PYLLM_ERR_ARGUMENT, "n_threads is %d, expected 1 to 256", n_threads);
  const kernels *k = kernels_find(isa);
  if (!k)
    return fail(err, PYLLM_ERR_UNSUPPORTED, "instruction set '%.16s' is not available here; this processor runs %s",
                isa, kernels_available());
  *out = (backend){&cpu_ops, pool_new(n_threads), k, NULL, &cpu_ops};
  if (!out->pool) return fail(err, PYLLM_ERR_MEMORY, "%d threads refused", n_threads);
  if (!device || strcmp(device, "cpu") == 0) return PYLLM_OK;
  int32_t status = open_cuda(device, out, err);
  if (status) backend_close(out);
  return status;
}

void backend_close(backend *be) {
  if (be->device) load_cuda(NULL)->close(be->device);
  pool_free(be->pool);
  *be = (backend){0};
}

void *backend_copy(const backend *be, const void *data, size_t bytes) {
  void *memory = be->ops->alloc(be, bytes);
  if (memory) be->ops->write(be, memory, data, bytes);
  return memory;
}

int32_t backend_place(const backend *be, matrix *m, const char *where, pyllm_error *err) {
  if (be->ops->on_host) return PYLLM_OK;
  if (m->rows > be->ops->most_rows) {
    pack_free(m);
    return fail(err, PYLLM_ERR_UNSUPPORTED, "%s has %d rows: on a GPU at most %d are supported", where, m->rows,
                be->ops->most_rows);
  }
  size_t bytes = (size_t)tiles_of_rows(m->rows) * m->tile_bytes;
  unsigned char *host = m->data;
  m->data = backend_copy(be, host, bytes);
  free(host);
  if (m->data) return be->ops->sync(be, err);
  return alloc_failure(be, fail(err, PYLLM_ERR_MEMORY, "%s: %zu bytes of the GPU's memory refused", where, bytes), err);
}

void backend_free_matrix(const backend *be, matrix *m) {
  if (be->ops->on_host) pack_free(m);
  else be->ops->release(be, m->data);
}

int32_t pyllm_device_get_info(const char *device, pyllm_device_info *out, pyllm_error *err) {
  if (strcmp(device, "cpu") == 0) return fail(err, PYLLM_ERR_ARGUMENT, "device 'cpu' is not a GPU");
  int32_t number = 0, status = cuda_number(device, &number, err);
  if (status) return status;
  const cuda_library *library = load_cuda(err);
  return library ? library->info(number, out, err) : PYLLM_ERR_DEVICE;
}
