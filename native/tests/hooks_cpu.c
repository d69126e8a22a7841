/* Hooks into the CPU backend, on the caller's arrays. */
#include "cpu.h"
#include "error.h"
#include "estimate.h"
#include "hooks.h"
#include "sketch.h"
#include <stdlib.h>

int32_t hook_rounded(const char *isa, int32_t bits, const float *x, float *out, int32_t n, pyllm_error *err) {
  const kernels *k = kernels_find(isa);
  if (!k || n % ACT_GROUP) return fail(err, PYLLM_ERR_ARGUMENT, "no such instruction set, or %d values", n);
  int8_t planes[2 * ACT_GROUP];
  int32_t sum[2];
  float scale[2], product[2], both;
  quantized q = {bits, planes, scale, sum, product, &both};
  for (int32_t i = 0; i < n; i += ACT_GROUP) {
    k->quantize(x + i, ACT_GROUP, &q);
    for (int32_t j = 0; j < ACT_GROUP; j++)
      out[i + j] = scale[j / act_group(bits)] * (float)quantized_at(&q, k->words, (size_t)j);
  }
  return PYLLM_OK;
}

int32_t hook_sketch_sums(const char *isa, const float *k, int32_t head_dim, int32_t page_bits, const uint16_t *channels,
                         const float *q, const float *local_mass, int32_t n, float *sums, pyllm_error *err) {
  const kernels *with = kernels_find(isa);
  if (!with) return fail(err, PYLLM_ERR_ARGUMENT, "no such instruction set");
  half_block block;
  uint8_t *page = malloc(sketch_page_bytes(page_bits, head_dim));
  if (!page) return fail(err, PYLLM_ERR_MEMORY, "no memory for a page's sketch");
  for (int32_t t = 0; t < KV_BLOCK; t++)
    with->kv_store(PYLLM_KV_F16, k + t * head_dim, k + t * head_dim, head_dim, t, block);
  with->sketch_fold(block, page_bits, head_dim, channels, page);
  with->sketch_sums(page, page_bits, head_dim, q, local_mass, n, sums, KV_STRIPS);
  free(page);
  return PYLLM_OK;
}

int32_t hook_bulk_estimate(int32_t gaussian, int32_t estimate, const float *coefficients, int32_t n_keys,
                           const float *mean_score, const float *variance, int32_t n, float *out) {
  for (int32_t i = 0; i < n; i++)
    out[i] = bulk_estimate(gaussian, estimate, coefficients, n_keys, mean_score[i], variance[i]);
  return PYLLM_OK;
}
