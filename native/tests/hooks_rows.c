/* Hooks into stages that work on one token at a time, on any backend. */
#include "backend.h"
#include "error.h"
#include "hooks.h"
#include <stdlib.h>
#include <string.h>

static void *upload(const backend *be, const void *data, size_t bytes) {
  void *memory = be->ops->alloc(be, bytes);
  if (memory) be->ops->write(be, memory, data, bytes);
  return memory;
}

static activation new_activation(const backend *be, int32_t n, int32_t cols) {
  size_t count = (size_t)n * (size_t)cols;
  return (activation){cols,
                      be->ops->alloc(be, count * 4),
                      {be->ops->alloc(be, 2 * count), be->ops->alloc(be, count / ACT_GROUP * 4),
                       be->ops->alloc(be, count / ACT_HALF * 4), be->ops->alloc(be, count / ACT_HALF * 4)}};
}

static void free_activation(const backend *be, activation *a) {
  void *parts[] = {a->values, a->q.planes, a->q.scale, a->q.sum, a->q.product};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) be->ops->release(be, parts[i]);
}

/* The rounded form as floats; false where its sums and products are not those of its planes. */
static bool read_rounded(const backend *be, const activation *a, int32_t n, float *out) {
  size_t count = (size_t)n * (size_t)a->cols, groups = count / ACT_GROUP, halves = count / ACT_HALF;
  int8_t *planes = malloc(2 * count + 1);
  float *scale = malloc(groups * 4 + 1), *product = malloc(halves * 4 + 1);
  int32_t *sum = malloc(halves * 4 + 1);
  be->ops->read(be, planes, a->q.planes, 2 * count);
  be->ops->read(be, scale, a->q.scale, groups * 4);
  be->ops->read(be, sum, a->q.sum, halves * 4);
  be->ops->read(be, product, a->q.product, halves * 4);
  bool consistent = true;
  for (size_t h = 0; h < halves; h++) {
    int32_t total = 0;
    for (size_t i = h * ACT_HALF; i < (h + 1) * ACT_HALF; i++) {
      int32_t q = 256 * planes[i / 4 * 8 + i % 4] + planes[i / 4 * 8 + 4 + i % 4];
      out[i] = scale[h / 2] * (float)q;
      total += q;
    }
    float expected = scale[h / 2] * (float)total;
    consistent &= total == sum[h] && memcmp(&expected, &product[h], sizeof expected) == 0;
  }
  free(planes), free(scale), free(sum), free(product);
  return consistent;
}

int32_t hook_norm(const char *device, const char *isa, const float *x, const float *w, float eps, int32_t n,
                  int32_t cols, float *values, float *rounded, pyllm_error *err) {
  backend be;
  int32_t status = backend_open(device, 1, isa, &be, err);
  if (status) return status;
  size_t bytes = (size_t)n * (size_t)cols * sizeof *x;
  activation out = new_activation(&be, n, cols);
  void *input = upload(&be, x, bytes), *weight = upload(&be, w, (size_t)cols * sizeof *w);
  pool_begin(be.pool);
  be.ops->norm(&be, input, weight, eps, n, rounded != NULL, &out);
  pool_end(be.pool);
  be.ops->read(&be, values, out.values, bytes);
  if (rounded && !read_rounded(&be, &out, n, rounded))
    status = fail(err, PYLLM_ERR_NUMERIC, "sums do not belong to the rounded values");
  if (!status) status = be.ops->sync(&be, err);
  free_activation(&be, &out);
  be.ops->release(&be, input);
  be.ops->release(&be, weight);
  backend_close(&be);
  return status;
}
