#include "hooks.h"
#include "quant.h"
#include <string.h>

int32_t hook_quant_type(int32_t type, hook_quant_traits *out) {
  const quant_type *t = quant_find(type);
  if (!t) return PYLLM_ERR_UNSUPPORTED;
  *out = (hook_quant_traits){t->name, t->block, t->bytes, t->bits, t->group, t->offset, t->has_min, t->scaled};
  return PYLLM_OK;
}

const char *hook_quant_supported(void) { return quant_supported(); }

int32_t hook_unpack(int32_t type, const void *block, uint16_t *d_m, int16_t *scale, uint8_t *min, uint8_t *q) {
  const quant_type *t = quant_find(type);
  if (!t) return PYLLM_ERR_UNSUPPORTED;
  if (!t->unpack) return PYLLM_ERR_ARGUMENT;
  quant_block b;
  t->unpack(block, &b);
  size_t groups = (size_t)(t->block / t->group);
  d_m[0] = b.d;
  d_m[1] = b.m;
  memcpy(scale, b.scale, groups * sizeof *scale);
  memcpy(min, b.min, groups * sizeof *min);
  memcpy(q, b.q, (size_t)t->block * sizeof *q);
  return PYLLM_OK;
}

int32_t hook_dequantize(int32_t type, const void *data, float *out, int64_t n) {
  const quant_type *t = quant_find(type);
  if (!t) return PYLLM_ERR_UNSUPPORTED;
  if (n < 0 || n % t->block) return PYLLM_ERR_ARGUMENT;
  quant_dequantize(t, data, out, n);
  return PYLLM_OK;
}

void hook_f16_to_f32(const uint16_t *x, float *out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = f16_to_f32(x[i]);
}

void hook_bf16_to_f32(const uint16_t *x, float *out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = bf16_to_f32(x[i]);
}

void hook_f32_to_f16(const float *x, uint16_t *out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = f32_to_f16(x[i]);
}
