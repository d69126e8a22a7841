/* Hooks into the CPU backend, on the caller's arrays. */
#include "cpu.h"
#include "error.h"
#include "estimate.h"
#include "hooks.h"

int32_t hook_rounded(const char *isa, const float *x, float *out, int32_t n, pyllm_error *err) {
  const kernels *k = kernels_find(isa);
  if (!k || n % ACT_GROUP) return fail(err, PYLLM_ERR_ARGUMENT, "no such instruction set, or %d values", n);
  int8_t planes[2 * ACT_GROUP];
  int32_t sum[2];
  float scale, product[2];
  for (int32_t i = 0; i < n; i += ACT_GROUP) {
    k->quantize(x + i, ACT_GROUP, planes, &scale, sum, product);
    for (int32_t j = 0; j < ACT_GROUP; j++) out[i + j] = scale * (float)quantized_at(planes, k->words, (size_t)j);
  }
  return PYLLM_OK;
}

int32_t hook_strip_sums(const char *isa, const float *scores, int32_t n_strips, float local_mass, float *sums,
                        pyllm_error *err) {
  const kernels *k = kernels_find(isa);
  if (!k) return fail(err, PYLLM_ERR_ARGUMENT, "no such instruction set");
  k->strip_sums(scores, n_strips, local_mass, sums);
  return PYLLM_OK;
}

int32_t hook_bulk_estimate(int32_t gaussian, int32_t estimate, const float *coefficients, int32_t n_keys,
                           const float *mean_score, const float *variance, int32_t n, float *out) {
  for (int32_t i = 0; i < n; i++)
    out[i] = bulk_estimate(gaussian, estimate, coefficients, n_keys, mean_score[i], variance[i]);
  return PYLLM_OK;
}
