#include "peak.h"
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Independent sums: enough to cover the latency of two multiply units, and no more than 16 registers hold. */
enum { CHAINS = 12, STEPS = 10000 };

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX2__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif

typedef float floats __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));

static volatile float seed_f32 = 0.5f;
static volatile int32_t seed_i32 = 0x01010101, sink;

static double f32_peak(void *context, int thread) {
  (void)context, (void)thread;
  floats acc[CHAINS], a = seed_f32 - (floats){0}, b = a;
  for (int c = 0; c < CHAINS; c++) acc[c] = a * (float)c;
  for (int i = 0; i < STEPS; i++)
    for (int c = 0; c < CHAINS; c++) acc[c] = acc[c] * a + b;
  for (int c = 1; c < CHAINS; c++) acc[0] += acc[c];
  sink = (int32_t)acc[0][0];
  return (double)STEPS * CHAINS * BYTES / sizeof(float);
}

#if defined(__AVX512BF16__)
static double bf16_peak(void *context, int thread) {
  (void)context, (void)thread;
  __m512bh a = (__m512bh)_mm512_set1_epi32(seed_i32);
  __m512 acc[CHAINS];
  for (int c = 0; c < CHAINS; c++) acc[c] = _mm512_set1_ps((float)c);
  for (int i = 0; i < STEPS; i++)
    for (int c = 0; c < CHAINS; c++) acc[c] = _mm512_dpbf16_ps(acc[c], a, a);
  for (int c = 1; c < CHAINS; c++) acc[0] += acc[c];
  sink = (int32_t)acc[0][0];
  return (double)STEPS * CHAINS * 32;
}
#endif

#if defined(__AVX512VNNI__)
#define INT8_INSTRUCTION "AVX-512 VNNI"
static inline ints dot(ints acc, ints a, ints b) {
  return (ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}
#elif defined(__AVXVNNI__)
#define INT8_INSTRUCTION "AVX-VNNI"
static inline ints dot(ints acc, ints a, ints b) {
  return (ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
}
#elif defined(__AVX2__)
#define INT8_INSTRUCTION "AVX2 maddubs"
static inline ints dot(ints acc, ints a, ints b) {
  __asm__ volatile("" : "+x"(a)); /* the product must not leave the loop */
  return acc + (ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), _mm256_set1_epi16(1));
}
#else
#define INT8_INSTRUCTION "32-bit integers"
#define INT8_PRODUCTS_PER_LANE 1
static inline ints dot(ints acc, ints a, ints b) { return acc * a + b; }
#endif
#ifndef INT8_PRODUCTS_PER_LANE
#define INT8_PRODUCTS_PER_LANE 4
#endif

static double int8_peak(void *context, int thread) {
  (void)context, (void)thread;
  ints acc[CHAINS], a = seed_i32 - (ints){0}, b = a;
  for (int c = 0; c < CHAINS; c++) acc[c] = a * c;
  for (int i = 0; i < STEPS; i++)
    for (int c = 0; c < CHAINS; c++) acc[c] = dot(acc[c], a, b);
  for (int c = 1; c < CHAINS; c++) acc[0] += acc[c];
  sink = acc[0][0];
  return (double)STEPS * CHAINS * INT8_PRODUCTS_PER_LANE * (BYTES / sizeof(int32_t));
}

const peak peaks[] = {
    {"int8", INT8_INSTRUCTION, int8_peak},
#if defined(__AVX512BF16__)
    {"bf16", "AVX-512 BF16", bf16_peak},
#endif
    {"f32", "multiply-add", f32_peak},
    {0},
};
