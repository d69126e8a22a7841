/* The weight formats of GGUF, each described once: a row of the traits table and one unpack function.
 *
 * Every block format is an instance of one formula, so dequantizing, repacking and the tests need nothing else:
 *
 *     x[i] = d * scale[i / group] * (q[i] - offset) + m * min[i / group]        (f32, in this order, no contraction)
 *
 * with d, m halves stored in the block, q unsigned 8-bit, scale and min small integers (1 for the simple formats).
 * The k-quants subtract their minimum: for them m is the block's dmin with its sign flipped, which is exact. */
#ifndef PYLLM_SRC_QUANT_H
#define PYLLM_SRC_QUANT_H
#include "pyllm.h"
#include <stdbool.h>

enum { QUANT_MAX_BLOCK = 256, QUANT_MAX_GROUPS = 16 };

/* ggml type numbers this library reads. */
enum quant_id {
  TYPE_F32 = 0,
  TYPE_F16 = 1,
  TYPE_Q4_0 = 2,
  TYPE_Q4_1 = 3,
  TYPE_Q5_0 = 6,
  TYPE_Q5_1 = 7,
  TYPE_Q8_0 = 8,
  TYPE_Q2_K = 10,
  TYPE_Q3_K = 11,
  TYPE_Q4_K = 12,
  TYPE_Q5_K = 13,
  TYPE_Q6_K = 14,
  TYPE_IQ4_NL = 20,
  TYPE_IQ4_XS = 23,
  TYPE_BF16 = 30
};

typedef struct quant_block {
  uint16_t d, m;                   /* f16 bits; m is 0 for formats without a minimum */
  int16_t scale[QUANT_MAX_GROUPS]; /* in [-128, 127] */
  uint8_t min[QUANT_MAX_GROUPS];
  uint8_t q[QUANT_MAX_BLOCK];
} quant_block;

typedef struct quant_type {
  int32_t id; /* ggml type number */
  const char *name;
  int32_t block;  /* values in a block; 1 for F32, F16, BF16 */
  int32_t bytes;  /* bytes of a block */
  int32_t bits;   /* 4, 5, 6 or 8: every q is below 2^bits; 0 for F32, F16, BF16 */
  int32_t group;  /* values that share a scale: 16 or 32; 0 for F32, F16, BF16 */
  int32_t offset; /* 0..128 */
  bool has_min;
  bool scaled; /* scale and min vary inside the block (k-quants, IQ4_XS); otherwise they are 1 */
  void (*unpack)(const void *block, quant_block *out); /* NULL for F32, F16, BF16 */
} quant_type;

/* NULL when the library cannot read the type. */
const quant_type *quant_find(int32_t id);
/* "F32, F16, Q4_0, ...": for messages. */
const char *quant_supported(void);

/* Scalar dequantization of n values (a multiple of the type's block) into out (n). */
void quant_dequantize(const quant_type *type, const void *data, float *out, int64_t n);

float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float x); /* round to nearest even, as the processors do */
float bf16_to_f32(uint16_t bits);

#endif
