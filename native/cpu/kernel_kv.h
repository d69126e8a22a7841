/* Keys and values into KV blocks, and out of them. Part of kernels.c. */
#include "kernels.h"
#include "overflow.h"
#include "quant.h"
#include "vec.h"

/* STRIP halves. */
static inline void round_f16(const float *x, uint16_t out[STRIP]) {
#if VL == 4
  for (int i = 0; i < STRIP; i++) out[i] = f32_to_f16(x[i]);
#else
  for (int i = 0; i < STRIP; i += 8)
    _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
}

static inline void store_f16(const float *k, const float *v, int32_t head_dim, int32_t slot, uint16_t *block) {
  int32_t strip = slot / STRIP, t = slot % STRIP;
  uint16_t *keys = block + strip * STRIP * head_dim + 2 * t;
  uint16_t *values = block + (KV_BLOCK + strip * STRIP) * head_dim + t / 2 * 2 * STRIP + t % 2;
  uint16_t half[STRIP];
  for (int32_t i = 0; i < head_dim; i += STRIP) {
    round_f16(k + i, half);
    for (int32_t j = 0; j < STRIP; j++) half[j] = key_half(half[j]);
    for (int32_t j = 0; j < STRIP; j += 2) memcpy(keys + (i + j) / 2 * 2 * STRIP, half + j, 2 * sizeof *half);
    round_f16(v + i, half);
    for (int32_t j = 0; j < STRIP; j++) values[i / STRIP * STRIP * STRIP + 2 * j] = half[j];
  }
}

/* x (n) as scale * codes; n % 16 == 0. Returns the scale's half: NaN where x holds NaN or the half does not hold it. */
static inline uint16_t round_bytes(const float *x, int32_t n, int8_t *codes) {
  vf most = vset(127.0f);
  uint16_t half = key_half(f32_to_f16(vlargest(x, n) / 127.0f));
  float scale = f16_to_f32(half), inverse = scale > 0 ? 1.0f / scale : 0.0f; /* 0 for NaN, too */
  for (int32_t i = 0; i < n; i += VL) {
    vf code = inverse > 0 ? vload(x + i) * inverse : vset(0);
    vstore_i8(codes + i, vround(vmax(vmin(code, most), -most)));
  }
  return half;
}

static inline void store_bytes(const float *k, const float *v, int32_t head_dim, int32_t slot, unsigned char *block) {
  int32_t strip = slot / STRIP, t = slot % STRIP, key_bytes = key_strip_bytes(PYLLM_KV_Q8_0, head_dim);
  int8_t codes[LARGEST_HEAD], *keys = (int8_t *)block + strip * key_bytes;
  int8_t *values = (int8_t *)block + KV_STRIPS * key_bytes + strip * value_strip_bytes(PYLLM_KV_Q8_0, head_dim);
  uint16_t value_scale = round_bytes(v, head_dim, codes), nan = (value_scale & 0x7c00) == 0x7c00 ? 0x7e00 : 0;
  memcpy(values + STRIP * head_dim + 2 * t, &value_scale, sizeof value_scale);
  for (int32_t i = 0; i < head_dim; i++)
    values[(i / STRIP * 8 + t / 2) * 2 * STRIP + 2 * (i % STRIP) + t % 2] = codes[i];
  for (int32_t g = 0; g < head_dim / KEY_GROUP; g++) {
    uint16_t scale = (uint16_t)(round_bytes(k + g * KEY_GROUP, KEY_GROUP, codes) | nan);
    memcpy(keys + STRIP * head_dim + (g * STRIP + t) * 2, &scale, sizeof scale);
    for (int32_t i = 0; i < KEY_GROUP; i += 2)
      memcpy(keys + (g * KEY_GROUP + i) / 2 * 2 * STRIP + 2 * t, codes + i, 2 * sizeof *codes);
  }
}

static void kv_store(int32_t kv_type, const float *k, const float *v, int32_t head_dim, int32_t slot, void *block) {
  if (kv_type == PYLLM_KV_Q8_0) store_bytes(k, v, head_dim, slot, block);
  else store_f16(k, v, head_dim, slot, block);
}

/* A row pair of a strip, (16, 2) bytes, times scale (32). */
static inline void pair_halves(const int8_t *codes, const float *scale, uint16_t *halves) {
  float x[2 * STRIP];
  for (int i = 0; i < 2 * STRIP; i += VL)
    vstore(x + i, __builtin_convertvector(vload_i8(codes + i), vf) * vload(scale + i));
  round_f16(x, halves);
  round_f16(x + STRIP, halves + STRIP);
}

static inline const uint16_t *scales_of(const int8_t *strip, int32_t head_dim) {
  return (const uint16_t *)(const void *)(strip + STRIP * head_dim);
}

static void kv_halves(const void *block, int32_t head_dim, uint16_t *halves) {
  const int8_t *strip = block;
  for (int32_t s = 0; s < KV_STRIPS; s++, strip += key_strip_bytes(PYLLM_KV_Q8_0, head_dim))
    for (int32_t first = 0; first < head_dim; first += KEY_GROUP) {
      const uint16_t *of = scales_of(strip, head_dim) + first / KEY_GROUP * STRIP;
      float scale[2 * STRIP];
      for (int t = 0; t < STRIP; t++) scale[2 * t] = scale[2 * t + 1] = f16_to_f32(of[t]);
      for (int32_t i = first / 2; i < (first + KEY_GROUP) / 2; i++, halves += 2 * STRIP)
        pair_halves(strip + i * 2 * STRIP, scale, halves);
    }
  for (int32_t s = 0; s < KV_STRIPS; s++, strip += value_strip_bytes(PYLLM_KV_Q8_0, head_dim)) {
    float scale[STRIP / 2][2 * STRIP]; /* of two tokens each, by turns */
    for (int t = 0; t < STRIP; t++)
      for (int j = 0; j < STRIP; j++) scale[t / 2][2 * j + t % 2] = f16_to_f32(scales_of(strip, head_dim)[t]);
    for (int32_t i = 0; i < head_dim / 2; i++, halves += 2 * STRIP)
      pair_halves(strip + i * 2 * STRIP, scale[i % (STRIP / 2)], halves);
  }
}
