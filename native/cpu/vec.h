/* Vectors as the kernels see them: GCC vector types of VL lanes, and the few operations the language lacks.
 * Included by kernels.c only, which is compiled once per instruction set. */
#ifndef PYLLM_CPU_VEC_H
#define PYLLM_CPU_VEC_H
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint8_t vbytes __attribute__((vector_size(VL * 4)));
typedef uint16_t vwords __attribute__((vector_size(VL * 4)));
typedef double vpair __attribute__((vector_size(VL * 4))); /* VL / 2 pairs of floats moved as one */

/* Shuffles of two vectors of VL lanes read as one of 2 VL. */
#if VL == 16
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif VL == 4
#define EVENS 0, 2, 4, 6
#define ODDS 1, 3, 5, 7
#endif

#define LOG2_E 1.44269504088896341f

static inline vf vload(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void vstore(float *p, vf v) { memcpy(p, &v, sizeof v); }

static inline vf vset(float x) { return x - (vf){0}; }

static inline vi viset(int32_t x) { return x - (vi){0}; }

static inline vf vselect(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* b where either is NaN. */
static inline vf vmax(vf a, vf b) {
#if VL == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VL == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return vselect(a > b, a, b);
#endif
}

/* b where either is NaN. */
static inline vf vmin(vf a, vf b) {
#if VL == 16
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif VL == 8
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return vselect(a < b, a, b);
#endif
}

/* (x0, x1, x0, x1, ...) */
static inline vf vset_pair(const float *x) {
  double d;
  memcpy(&d, x, sizeof d);
#if VL == 16
  vpair v = {d, d, d, d, d, d, d, d};
#elif VL == 8
  vpair v = {d, d, d, d};
#else
  vpair v = {d, d};
#endif
  return (vf)v;
}

/* Sum of neighbouring lanes of (lo, hi): 2 VL lanes to VL. */
static inline vf vsum_pairs(vf lo, vf hi) {
#if VL == 8
  __m256d halves = _mm256_castps_pd(_mm256_hadd_ps((__m256)lo, (__m256)hi)); /* of each, sums from lo and from hi */
  return (vf)_mm256_permute4x64_pd(halves, 0xd8);
#else
  return __builtin_shufflevector(lo, hi, EVENS) + __builtin_shufflevector(lo, hi, ODDS);
#endif
}

/* Lane i with lane i + n of the first 2 n; what is in the others does not matter. */
#if VL == 8
#define vhalf(v, n) __builtin_shufflevector(v, v, (n), (n) + 1, (n) + 2, (n) + 3, 0, 1, 2, 3)
#elif VL == 4
#define vhalf(v, n) __builtin_shufflevector(v, v, (n), (n) + 1, 0, 1)
#endif

/* Halves are added onto each other: lane i and i + VL / 2 first. */
static inline float vsum(vf v) {
#if VL == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
#if VL == 8
  v += vhalf(v, 4);
#endif
  v += vhalf(v, 2);
  v += vhalf(v, 1);
  return v[0];
#endif
}

static inline float vreduce_max(vf v) {
#if VL == 16
  return _mm512_reduce_max_ps((__m512)v);
#else
#if VL == 8
  v = vmax(v, vhalf(v, 4));
#endif
  v = vmax(v, vhalf(v, 2));
  v = vmax(v, vhalf(v, 1));
  return v[0];
#endif
}

/* The sums of four vectors, and the maxima. */
#if VL == 8
/* (a0, b0, a1, b1) and (a2, b2, a3, b3) of each half; unpacked twice, a lane of four vectors lies side by side. */
static inline vf vzip_lo(vf a, vf b) { return (vf)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
static inline vf vzip_hi(vf a, vf b) { return (vf)_mm256_unpackhi_ps((__m256)a, (__m256)b); }

static inline void vsum4(const vf v[4], float out[4]) {
  vf a = vzip_lo(v[0], v[2]) + vzip_hi(v[0], v[2]), b = vzip_lo(v[1], v[3]) + vzip_hi(v[1], v[3]);
  __m256 sums = (__m256)(vzip_lo(a, b) + vzip_hi(a, b));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

static inline void vmax4(const vf v[4], float out[4]) {
  vf a = vmax(vzip_lo(v[0], v[2]), vzip_hi(v[0], v[2])), b = vmax(vzip_lo(v[1], v[3]), vzip_hi(v[1], v[3]));
  __m256 most = (__m256)vmax(vzip_lo(a, b), vzip_hi(a, b));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1)));
}
#else
static inline void vsum4(const vf v[4], float out[4]) {
  for (int i = 0; i < 4; i++) out[i] = vsum(v[i]);
}

static inline void vmax4(const vf v[4], float out[4]) {
  for (int i = 0; i < 4; i++) out[i] = vreduce_max(v[i]);
}
#endif

/* Of two words in one, the sum. */
static inline int32_t sum_of_words(int32_t words) { return (int16_t)words + (words >> 16); }

/* Of four vectors, the sums of the first and of the last two lanes of every four, as the low and the high word. */
static inline void vword_sums4(const vi v[4], int32_t out[4]) {
#if VL == 4
  for (int i = 0; i < 4; i++) {
    vu u = (vu)v[i];
    out[i] = (int32_t)((uint16_t)(u[0] + u[1]) | (u[2] + u[3]) << 16);
  }
#else
  __m256i eight[4];
  for (int i = 0; i < 4; i++) {
#if VL == 16
    __m256i halves[2];
    memcpy(halves, &v[i], sizeof halves);
    eight[i] = _mm256_add_epi32(halves[0], halves[1]);
#else
    eight[i] = (__m256i)v[i];
#endif
  }
  __m256i a = _mm256_hadd_epi32(eight[0], eight[1]), b = _mm256_hadd_epi32(eight[2], eight[3]);
  __m128i lo = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  __m128i hi = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  _mm_storeu_si128((__m128i *)(void *)out, _mm_packs_epi32(lo, hi));
#endif
}

/* The largest |x| of n, a multiple of VL: NaN where one is NaN or infinite, which rounding must not hide. */
static inline float vlargest(const float *x, int32_t n) {
  vf top = vset(0), poison = vset(0); /* 0 or NaN */
  for (int32_t i = 0; i < n; i += VL) {
    top = vmax(top, (vf)((vi)vload(x + i) & INT32_MAX));
    poison += vload(x + i) * 0.0f;
  }
  return vreduce_max(top) + vsum(poison);
}

/* VL halves. */
static inline vf vload_f16(const uint16_t *p) {
#if VL == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif VL == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  /* Move exponent and mantissa into place and multiply by 2^112: exact for normals and subnormals alike. */
  vu h = {p[0], p[1], p[2], p[3]};
  vu magnitude = (h & 0x7fff) << 13;
  vf scaled = (vf)magnitude * 0x1p112f;
  vu special = (vu)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (vf)((vu)scaled | special | (h & 0x8000) << 16);
#endif
}

static inline vbytes vload_bytes(const uint8_t *p) {
  vbytes v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* To nearest even, as rint does, in every instruction set; |x| below 2^22. */
static inline vi vround(vf x) {
#if VL == 16
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif VL == 8
  return (vi)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (vi)_mm_cvtps_epi32((__m128)x);
#else
  return __builtin_convertvector((x + 12582912.0f) - 12582912.0f, vi);
#endif
}

/* VL integers of -128 to 127, narrowed. */
static inline void vstore_i8(int8_t *p, vi v) {
#if VL == 16
  _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif VL == 8
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storeu_si64(p, _mm_packs_epi16(words, words));
#else
  for (int lane = 0; lane < VL; lane++) p[lane] = (int8_t)v[lane];
#endif
}

/* 16 integers of -32768 to 32767, narrowed. */
static inline void vstore_words(int16_t *p, const vi v[16 / VL]) {
#if VL == 16
  _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16((__m512i)v[0]));
#elif VL == 8
  __m256i words = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]); /* halves of both, and the other halves of both */
  _mm256_storeu_si256((__m256i *)(void *)p, _mm256_permute4x64_epi64(words, 0xd8));
#else
  for (int i = 0; i < 16; i++) p[i] = (int16_t)v[i / VL][i % VL];
#endif
}

/* Bytes shifted by n bits; what comes over from the neighbour means nothing. */
static inline vbytes vshift(vbytes v, int right) {
  return right >= 0 ? (vbytes)((vwords)v >> right) : (vbytes)((vwords)v << -right);
}

/* VL integers, widened. (GCC 12 would convert vectors of bytes one by one.) */
#if VL == 16
static inline vi vload_i8(const int8_t *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vi vload_u8(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vu vload_u16(const uint16_t *p) {
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
#elif VL == 8
static inline vi vload_i8(const int8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadu_si64(p)); }
static inline vi vload_u8(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadu_si64(p)); }
static inline vu vload_u16(const uint16_t *p) { return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
#else
static inline vi vload_i8(const int8_t *p) { return (vi){p[0], p[1], p[2], p[3]}; }
static inline vi vload_u8(const uint8_t *p) { return (vi){p[0], p[1], p[2], p[3]}; }
static inline vu vload_u16(const uint16_t *p) { return (vu){p[0], p[1], p[2], p[3]}; }
#endif

/* 2 VL bytes as words. */
static inline vbytes vload_words(const int8_t *p) {
#if VL == 16
  return (vbytes)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)p));
#elif VL == 8
  return (vbytes)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
#elif defined(__SSE2__)
  __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)p);
  return (vbytes)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#else
  vwords w = {0};
  for (int i = 0; i < 2 * VL; i++) w[i] = (uint16_t)p[i];
  return (vbytes)w;
#endif
}

static inline vf vload_bf16(const uint16_t *p) { return (vf)(vload_u16(p) << 16); }

/* 2^y for y up to 100, relative error under 2e-7; 0 below -126. */
static inline vf vexp2(vf y) {
#if VL == 16
  vf r = (vf)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* y - floor(y) */
  vf p = vset(1.8775759963e-3f);                                                     /* 2^r within 8e-8 on [0, 1] */
  p = p * r + 8.9893415570e-3f;
  p = p * r + 5.5826317519e-2f;
  p = p * r + 2.4015361071e-1f;
  p = p * r + 6.9315308332e-1f;
  p = p * r + 9.9999994040e-1f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)y); /* p 2^floor(y) */
#else
  vi tiny = y < -126.0f;        /* NaN is not */
  vf shifted = y + 12582912.0f; /* 1.5 * 2^23: the low bits are y's nearest whole number */
  vf r = y - (shifted - 12582912.0f);
  vf p = vset(1.3264727313e-03f); /* 2^r within 2e-7 on [-1/2, 1/2] */
  p = p * r + 9.6715129912e-03f;
  p = p * r + 5.5507335812e-02f;
  p = p * r + 2.4022242427e-01f;
  p = p * r + 6.9314700365e-01f;
  p = p * r + 1.0f;
  return (vf)(~(vu)tiny & ((vu)p + ((vu)shifted << 23)));
#endif
}

/* y = 2^y for y in [-126, 100], relative error under 8e-5: of four vectors side by side, for in each of these steps
 * one alone would wait for itself. */
static inline void vexp2_rough(vf y[4]) {
#if VL == 16
  for (int i = 0; i < 4; i++) {
    vf r = (vf)_mm512_reduce_ps((__m512)y[i], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = vset(7.8024357557e-2f); /* on [0, 1] */
    p = p * r + 2.2606773674e-1f;
    p = p * r + 6.9583314657e-1f;
    p = p * r + 9.9992525578e-1f;
    y[i] = (vf)_mm512_scalef_ps((__m512)p, (__m512)y[i]);
  }
#else
  vf shifted[4], r[4], p[4];
  for (int i = 0; i < 4; i++) shifted[i] = y[i] + 12582912.0f;
  for (int i = 0; i < 4; i++) r[i] = y[i] - (shifted[i] - 12582912.0f);
  for (int i = 0; i < 4; i++) p[i] = 5.5171553045e-2f * r[i] + 2.4261136353e-1f; /* on [-1/2, 1/2] */
  for (int i = 0; i < 4; i++) p[i] = p[i] * r[i] + 6.9326102734e-1f;
  for (int i = 0; i < 4; i++) p[i] = p[i] * r[i] + 9.9992805719e-1f;
  for (int i = 0; i < 4; i++) y[i] = (vf)((vu)p[i] + ((vu)shifted[i] << 23));
#endif
}

/* e^x for x <= 0, relative error under 2e-7 (1 + |x|); 0 below -88. */
static inline vf vexp(vf x) { return vexp2(x * LOG2_E); }

/* e^(x - max) for x <= max, relative error under 2e-7 (1 + |x| + |max|). */
static inline vf vexp_below(vf x, float max) {
#if VL == 16
  return vexp2((vf)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(LOG2_E), _mm512_set1_ps(max * LOG2_E)));
#else
  return vexp(x - max);
#endif
}

/* Has a sum made where it stands. GCC would make sums after all of their products, more than registers hold. */
#if VL == 16 && defined(EMULATED_AVX512)
#define MAKE_NOW(v) (void)(v)
#elif VL == 16
#define MAKE_NOW(v) __asm__("" : "+v"(v))
#elif VL == 8
#define MAKE_NOW(v) __asm__("" : "+x"(v))
#endif

/* Has a pointer stand in a register of its own. GCC would rather keep one for every offset that is used from it. */
#define KEEP_POINTER(p) __asm__("" : "+r"(p))

/* acc[lane] += sum over j < 4 of w[4 lane + j] * x[j], w unsigned bytes, x signed ones. Without DOT_IN_32_BITS a lane of
 * acc is two sums of 16 bits, of j < 2 and of the others, which hold up to 8 of these with w of 4 bits, and 4 with w of
 * 5; dot_sum makes 32 bits of them. dot_start is an acc whose sums count w from `offset` on: with it they may pass their
 * 16 bits meanwhile, and 4 products with w of 6 bits from 32 on fit in the end. sums: of x, as vword_sums4 has them. */
#if defined(__AVX512VNNI__) || VL == 4
enum { DOT_IN_32_BITS = 1 };
#else
enum { DOT_IN_32_BITS = 0 };
#endif

static inline vi dot_bytes(vi acc, vbytes w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif VL == 16
  acc = (vi)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(x)));
  MAKE_NOW(acc);
  return acc;
#elif VL == 8
  acc = (vi)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x)));
  MAKE_NOW(acc);
  return acc;
#else
  int8_t four[4];
  uint8_t weights[4 * VL];
  memcpy(four, &x, sizeof four);
  memcpy(weights, &w, sizeof weights);
  for (int lane = 0; lane < VL; lane++)
    for (int j = 0; j < 4; j++) acc[lane] += weights[4 * lane + j] * four[j];
  return acc;
#endif
}

static inline vi dot_sum(vi acc) {
#if VL == 16 && !defined(__AVX512VNNI__)
  return (vi)_mm512_madd_epi16((__m512i)acc, _mm512_set1_epi16(1));
#elif VL == 8
  return (vi)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1));
#else
  return acc;
#endif
}

static inline vi dot_start(int32_t sums, int32_t offset) {
  if (DOT_IN_32_BITS) return viset(-offset * sum_of_words(sums));
  return (vi)((vwords)viset(sums) * (uint16_t)-offset);
}

/* acc[lane] += sum over j < 2 of w[2 lane + j] * x[j], words. */
static inline vi dot_words(vi acc, vbytes w, int32_t x) {
#if defined(__AVX512VNNI__)
  acc = (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif VL == 16
  acc += (vi)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
  MAKE_NOW(acc);
#elif VL == 8
  acc += (vi)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
  MAKE_NOW(acc);
#elif defined(__SSE2__)
  acc += (vi)_mm_madd_epi16((__m128i)w, _mm_set1_epi32(x));
#else
  vi words = (vi)w;
  acc += (words << 16 >> 16) * (int16_t)x + (words >> 16) * (x >> 16);
#endif
  return acc;
}

#endif
