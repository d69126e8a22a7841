/* Element-wise and row kernels. Part of kernels.c. Tails shorter than a vector are done one by one. */
#include "kernels.h"
#include "overflow.h"
#include "quant.h"
#include "vec.h"
#include <float.h>
#include <math.h>

static float dot(const float *x, const float *y, int32_t n) {
  vf sum = vset(0);
  int32_t i = 0;
  for (; i + VL <= n; i += VL) sum += vload(x + i) * vload(y + i);
  float total = vsum(sum);
  for (; i < n; i++) total += x[i] * y[i];
  return total;
}

static void rms_norm(const float *x, const float *w, float eps, int32_t n, float *y) {
  float scale = rms_scale(dot(x, x, n), n, eps);
  for (int32_t i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

/* VL values as `quantized` holds them. (GCC 12 would convert lanes one by one.) */
static inline void store_q(vi q, int8_t *planes) {
#if defined(__AVX512VNNI__)
  vi high = (q + 128) >> 8;
  __m128i h = _mm512_cvtepi32_epi8((__m512i)high), l = _mm512_cvtepi32_epi8((__m512i)(q - (high << 8)));
  _mm_storeu_si128((__m128i *)(void *)planes, _mm_unpacklo_epi32(h, l));
  _mm_storeu_si128((__m128i *)(void *)(planes + 16), _mm_unpackhi_epi32(h, l));
#elif VL == 16
  __m256i words = _mm256_shufflelo_epi16(_mm512_cvtepi32_epi16((__m512i)q), _MM_SHUFFLE(3, 1, 2, 0));
  _mm256_storeu_si256((__m256i *)(void *)planes, _mm256_shufflehi_epi16(words, _MM_SHUFFLE(3, 1, 2, 0)));
#elif VL == 8
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)q), _mm256_extracti128_si256((__m256i)q, 1));
  words = _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, _MM_SHUFFLE(3, 1, 2, 0)), _MM_SHUFFLE(3, 1, 2, 0));
  _mm_storeu_si128((__m128i *)(void *)planes, words);
#else
  int16_t words[VL] = {(int16_t)q[0], (int16_t)q[2], (int16_t)q[1], (int16_t)q[3]};
  memcpy(planes, words, sizeof words);
#endif
}

/* 16 values times inverse, rounded; returns their sum. */
static inline int32_t round_half_group(const float *x, float inverse, int8_t *planes) {
  vi sum = viset(0);
  for (int i = 0; i < ACT_HALF; i += VL) {
    vi q = vround(vload(x + i) * inverse);
    store_q(q, planes + 2 * i);
    sum += q;
  }
  int32_t total = 0;
  for (int lane = 0; lane < VL; lane++) total += sum[lane];
  return total;
}

static void quantize(const float *x, int32_t cols, int8_t *planes, float *scale, int32_t *sum, float *product) {
  for (int32_t g = 0; g < cols / ACT_GROUP; g++, x += ACT_GROUP, planes += 2 * ACT_GROUP) {
    scale[g] = vlargest(x, ACT_GROUP) / ACT_MAX;
    if (scale[g] != scale[g]) {
      memset(planes, 0, 2 * ACT_GROUP);
      sum[2 * g] = sum[2 * g + 1] = 0;
      product[2 * g] = product[2 * g + 1] = scale[g];
      continue;
    }
    if (scale[g] < FLT_MIN) scale[g] = 0; /* its inverse would overflow */
    float inverse = scale[g] > 0 ? 1.0f / scale[g] : 0.0f;
    for (int h = 0; h < 2; h++) {
      sum[2 * g + h] = round_half_group(x + h * ACT_HALF, inverse, planes + 2 * h * ACT_HALF);
      product[2 * g + h] = scale[g] * (float)sum[2 * g + h];
    }
  }
}

static void swiglu(const float *gate, const float *up, int32_t n, float *y) {
  for (int32_t i = 0; i + VL <= n; i += VL) {
    vf g = vload(gate + i);
    vi negative = g < vset(0);
    vf e = vexp((vf)((vi)g | INT32_MIN)); /* e^-|g| */
    vf sigmoid = vselect(negative, e, vset(1)) / (1.0f + e);
    vstore(y + i, g * sigmoid * vload(up + i));
  }
}

static void rope(float *x, const float *cosine, const float *sine, int32_t n_rot, bool pairs) {
  int32_t half = n_rot / 2, step = pairs ? 2 : 1, other = pairs ? 1 : half;
  for (int32_t i = 0; i < half; i++) {
    float a = x[i * step], b = x[i * step + other];
    x[i * step] = a * cosine[i] - b * sine[i];
    x[i * step + other] = a * sine[i] + b * cosine[i];
  }
}
