/* The AVX-512 that the kernels use, for a processor without it: included before the kernels' sources by `make wide`,
 * which tells them that it is there. Vectors of 64 bytes are GCC's own; what the instructions do is Intel's
 * Intrinsics Guide. */
#ifndef PYLLM_EMULATED_AVX512_H
#define PYLLM_EMULATED_AVX512_H
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int8_t emu_i8 __attribute__((vector_size(64)));
typedef uint8_t emu_u8 __attribute__((vector_size(64)));
typedef int16_t emu_i16 __attribute__((vector_size(64)));
typedef uint16_t emu_u16 __attribute__((vector_size(64)));
typedef int32_t emu_i32 __attribute__((vector_size(64)));
typedef uint32_t emu_u32 __attribute__((vector_size(64)));
typedef float emu_f32 __attribute__((vector_size(64)));

#define EMU static inline __attribute__((always_inline, unused))
#define EACH(n) for (int i = 0; i < (n); i++)

/* Whole vectors. */
EMU __m512i emu_loadu_si512(const void *p) {
  __m512i v;
  memcpy(&v, p, sizeof v);
  return v;
}
EMU __m512 emu_setzero_ps(void) { return (__m512)(emu_f32){0}; }
EMU __m512 emu_set1_ps(float x) { return (__m512)(x - (emu_f32){0}); }
EMU __m512i emu_set1_epi16(int x) { return (__m512i)((int16_t)x - (emu_i16){0}); }
EMU __m512i emu_set1_epi32(int x) { return (__m512i)(x - (emu_i32){0}); }
EMU __m512i emu_and_si512(__m512i a, __m512i b) { return a & b; }

/* 16 bits and their products. */
EMU __m512i emu_add_epi16(__m512i a, __m512i b) { return (__m512i)((emu_u16)a + (emu_u16)b); }
EMU __m512i emu_slli_epi16(__m512i a, int n) { return (__m512i)((emu_u16)a << n); }
EMU __m512i emu_srli_epi16(__m512i a, int n) { return (__m512i)((emu_u16)a >> n); }
EMU __m512i emu_srai_epi16(__m512i a, int n) { return (__m512i)((emu_i16)a >> n); }
EMU __m512i emu_madd_epi16(__m512i a, __m512i b) {
  emu_i32 out;
  EACH(16) out[i] = ((emu_i16)a)[2 * i] * ((emu_i16)b)[2 * i] + ((emu_i16)a)[2 * i + 1] * ((emu_i16)b)[2 * i + 1];
  return (__m512i)out;
}
EMU __m512i emu_maddubs_epi16(__m512i a, __m512i b) {
  emu_i16 out;
  EACH(32) {
    int sum = ((emu_u8)a)[2 * i] * ((emu_i8)b)[2 * i] + ((emu_u8)a)[2 * i + 1] * ((emu_i8)b)[2 * i + 1];
    out[i] = (int16_t)(sum > INT16_MAX ? INT16_MAX : sum < INT16_MIN ? INT16_MIN : sum);
  }
  return (__m512i)out;
}
EMU __m512i emu_dpbusd_epi32(__m512i acc, __m512i a, __m512i b) {
  emu_i32 out = (emu_i32)acc;
  EACH(64) out[i / 4] += ((emu_u8)a)[i] * ((emu_i8)b)[i];
  return (__m512i)out;
}
EMU __m512i emu_dpwssd_epi32(__m512i acc, __m512i a, __m512i b) {
  return (__m512i)((emu_i32)acc + (emu_i32)emu_madd_epi16(a, b));
}

/* Between widths. */
EMU __m512i emu_cvtepi8_epi16(__m256i a) {
  __m256i half[2] = {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)),
                     _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1))};
  __m512i out;
  memcpy(&out, half, sizeof out);
  return out;
}
EMU __m512i emu_cvtepi8_epi32(__m128i a) {
  emu_i32 out;
  int8_t bytes[16];
  memcpy(bytes, &a, sizeof bytes);
  EACH(16) out[i] = bytes[i];
  return (__m512i)out;
}
EMU __m512i emu_cvtepu8_epi32(__m128i a) { return (__m512i)((emu_i32)emu_cvtepi8_epi32(a) & 255); }
EMU __m512i emu_cvtepu16_epi32(__m256i a) {
  emu_i32 out;
  uint16_t words[16];
  memcpy(words, &a, sizeof words);
  EACH(16) out[i] = words[i];
  return (__m512i)out;
}
EMU __m128i emu_cvtepi32_epi8(__m512i a) {
  __m128i out;
  int8_t bytes[16];
  EACH(16) bytes[i] = (int8_t)((emu_i32)a)[i];
  memcpy(&out, bytes, sizeof out);
  return out;
}
EMU __m256i emu_cvtepi32_epi16(__m512i a) {
  __m256i out;
  int16_t words[16];
  EACH(16) words[i] = (int16_t)((emu_i32)a)[i];
  memcpy(&out, words, sizeof out);
  return out;
}
EMU __m512 emu_cvtph_ps(__m256i a) {
  __m256 half[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  __m512 out;
  memcpy(&out, half, sizeof out);
  return out;
}

/* Floats. */
EMU __m512i emu_cvtps_epi32(__m512 a) {
  emu_i32 out;
  EACH(16) out[i] = (int32_t)rintf(a[i]);
  return (__m512i)out;
}
EMU __m512 emu_max_ps(__m512 a, __m512 b) {
  __m512 out = b;
  EACH(16) out[i] = a[i] > b[i] ? a[i] : b[i];
  return out;
}
EMU __m512 emu_min_ps(__m512 a, __m512 b) {
  __m512 out = b;
  EACH(16) out[i] = a[i] < b[i] ? a[i] : b[i];
  return out;
}
EMU __m512 emu_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  __m512 out = a;
  EACH(16) out[i] = fmaf(a[i], b[i], -c[i]);
  return out;
}
EMU float emu_reduce_add_ps(__m512 v) {
  for (int n = 8; n; n /= 2) EACH(n) v[i] += v[i + n];
  return v[0];
}
EMU float emu_reduce_max_ps(__m512 v) {
  for (int n = 8; n; n /= 2) EACH(n) v[i] = v[i] > v[i + n] ? v[i] : v[i + n];
  return v[0];
}
/* a - floor(a); 0 for the infinite. (The one rounding in use.) */
EMU __m512 emu_reduce_ps(__m512 a) {
  EACH(16) a[i] = isinf(a[i]) ? 0 : a[i] - floorf(a[i]);
  return a;
}
EMU __m512 emu_scalef_ps(__m512 a, __m512 b) {
  EACH(16) {
    float exponent = fminf(fmaxf(floorf(b[i]), -1000), 1000);
    a[i] = isnan(b[i]) ? b[i] : ldexpf(a[i], (int)exponent);
  }
  return a;
}

/* bfloat16: 16 bits of a float, rounded to nearest even. (Subnormals, which the instructions take for 0, are kept.) */
typedef uint16_t emu_bf16x32 __attribute__((vector_size(64)));
typedef uint16_t emu_bf16x16 __attribute__((vector_size(32)));

EMU uint16_t emu_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return isnan(x) ? (uint16_t)(bits >> 16 | 64) : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
EMU float emu_bf16_value(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
EMU emu_bf16x16 emu_cvtneps_pbh(__m512 a) {
  emu_bf16x16 out;
  EACH(16) out[i] = emu_bf16(a[i]);
  return out;
}
EMU emu_bf16x32 emu_cvtne2ps_pbh(__m512 high, __m512 low) {
  emu_bf16x32 out;
  EACH(16) {
    out[i] = emu_bf16(low[i]);
    out[16 + i] = emu_bf16(high[i]);
  }
  return out;
}
EMU __m512 emu_dpbf16_ps(__m512 acc, emu_bf16x32 a, emu_bf16x32 b) {
  EACH(16) {
    acc[i] = fmaf(emu_bf16_value(a[2 * i + 1]), emu_bf16_value(b[2 * i + 1]), acc[i]);
    acc[i] = fmaf(emu_bf16_value(a[2 * i]), emu_bf16_value(b[2 * i]), acc[i]);
  }
  return acc;
}

#define __m512bh emu_bf16x32
#define __m256bh emu_bf16x16
#define _mm512_add_epi16 emu_add_epi16
#define _mm512_and_si512 emu_and_si512
#define _mm512_cvtepi32_epi16 emu_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emu_cvtepi32_epi8
#define _mm512_cvtepi8_epi16 emu_cvtepi8_epi16
#define _mm512_cvtepi8_epi32 emu_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emu_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emu_cvtepu8_epi32
#define _mm512_cvtne2ps_pbh emu_cvtne2ps_pbh
#define _mm512_cvtneps_pbh emu_cvtneps_pbh
#define _mm512_cvtph_ps emu_cvtph_ps
#define _mm512_cvtps_epi32 emu_cvtps_epi32
#define _mm512_dpbf16_ps emu_dpbf16_ps
#define _mm512_dpbusd_epi32 emu_dpbusd_epi32
#define _mm512_dpwssd_epi32 emu_dpwssd_epi32
#define _mm512_fmsub_ps emu_fmsub_ps
#define _mm512_loadu_si512 emu_loadu_si512
#define _mm512_madd_epi16 emu_madd_epi16
#define _mm512_maddubs_epi16 emu_maddubs_epi16
#define _mm512_max_ps emu_max_ps
#define _mm512_min_ps emu_min_ps
#define _mm512_reduce_add_ps emu_reduce_add_ps
#define _mm512_reduce_max_ps emu_reduce_max_ps
#define _mm512_reduce_ps(a, how) emu_reduce_ps(a)
#define _mm512_scalef_ps emu_scalef_ps
#define _mm512_set1_epi16 emu_set1_epi16
#define _mm512_set1_epi32 emu_set1_epi32
#define _mm512_set1_ps emu_set1_ps
#define _mm512_setzero_ps emu_setzero_ps
#define _mm512_slli_epi16 emu_slli_epi16
#define _mm512_srai_epi16 emu_srai_epi16
#define _mm512_srli_epi16 emu_srli_epi16

#define __AVX512F__ 1
#ifdef EMULATED_VNNI
#define __AVX512VNNI__ 1
#endif
#ifdef EMULATED_BF16
#define __AVX512BF16__ 1
#endif

#endif
