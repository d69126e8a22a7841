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

/* 16 values times inverse, rounded into the first columns of `planes`; returns sums of them, each of lanes that are the
 * same part of a four. */
static inline __attribute__((always_inline)) vi round_half_group(int32_t bits, const float *x, float inverse,
                                                                 int8_t *planes) {
  vu sum = {0}; /* of NaN, which is no number here, it may overflow */
  for (int i = 0; i < ACT_HALF; i += VL) {
    vi q = vround(vload(x + i) * inverse);
    if (bits == 8) vstore_i8(planes + i, q);
    else store_q(q, planes + 2 * i);
    sum += (vu)q;
  }
  return (vi)sum;
}

/* Of four half groups' lanes, the sums as `quantized` holds them, and whole. */
static inline __attribute__((always_inline)) void sums_of_halves(int32_t bits, const vi lanes[4], int32_t sum[4],
                                                                 float whole[4]) {
  if (bits == 8) {
    vword_sums4(lanes, sum);
    for (int h = 0; h < 4; h++) whole[h] = (float)sum_of_words(sum[h]);
    return;
  }
  vf exact[4];
  for (int h = 0; h < 4; h++) exact[h] = __builtin_convertvector(lanes[h], vf);
  vsum4(exact, whole);
  for (int h = 0; h < 4; h++) sum[h] = (int32_t)whole[h];
}

/* Of 4 groups that share a scale, n of which there are, the largest |x|: NaN where one is NaN or infinite, which
 * rounding must not hide. */
static inline __attribute__((always_inline)) void largest_of_groups(const float *x, int32_t group, int n,
                                                                    float most[4]) {
  vf top[4] = {0}, poison[4] = {0}; /* 0 or NaN */
  float not_finite[4];
  for (int g = 0; g < n; g++)
    for (int32_t i = g * group; i < (g + 1) * group; i += VL) {
      top[g] = vmax(top[g], (vf)((vi)vload(x + i) & INT32_MAX));
      poison[g] += vload(x + i) * 0.0f;
    }
  vmax4(top, most);
  vsum4(poison, not_finite);
  for (int g = 0; g < 4; g++) most[g] += not_finite[g];
}

/* The first n <= 4 groups, side by side: most steps of one would wait for themselves. */
static inline __attribute__((always_inline)) void round_groups(int32_t bits, const float *x, int n,
                                                               const quantized *out) {
  int32_t group = act_group(bits), halves = group / ACT_HALF;
  float scale[4], inverse[4];
  largest_of_groups(x, group, n, scale);
  for (int g = 0; g < 4; g++) {
    scale[g] /= bits == 8 ? ACT_MAX8 : ACT_MAX;
    if (scale[g] < FLT_MIN) scale[g] = 0; /* its inverse would overflow */
    inverse[g] = scale[g] > 0 ? 1.0f / scale[g] : 0.0f;
  }
  memcpy(out->scale, scale, (size_t)n * sizeof *scale);
  vi lanes[8] = {0};
  int32_t sum[8];
  float whole[8];
  for (int h = 0; h < n * halves; h++)
    lanes[h] = round_half_group(bits, x + h * ACT_HALF, inverse[h / halves], out->planes + h * ACT_HALF * bits / 8);
  for (int h = 0; h < 4 * halves; h += 4) sums_of_halves(bits, lanes + h, sum + h, whole + h);
  for (int h = 0; h < n * halves; h++) {
    float of = scale[h / halves];
    bool finite = of == of;
    if (!finite) memset(out->planes + h * ACT_HALF * bits / 8, 0, (size_t)(ACT_HALF * bits / 8));
    out->sum[h] = finite ? sum[h] : 0;
    out->product[h] = finite ? of * whole[h] : of;
  }
  for (int h = 0; h + 1 < n * halves; h += 2) out->both[h / 2] = out->product[h] + out->product[h + 1];
}

static inline __attribute__((always_inline)) void quantize_to(int32_t bits, const float *x, int32_t cols,
                                                              const quantized *out) {
  int32_t group = act_group(bits), n = cols / group, g = 0;
  for (; g + 4 <= n; g += 4) {
    quantized to = quantized_after(out, group, g);
    round_groups(bits, x + g * group, 4, &to);
  }
  if (g == n) return;
  quantized to = quantized_after(out, group, g);
  round_groups(bits, x + g * group, n - g, &to);
}

static void quantize(const float *x, int32_t cols, const quantized *out) {
  if (out->bits == 8) quantize_to(8, x, cols, out);
  else quantize_to(16, x, cols, out);
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
