/* One section per format: its block as the file stores it, and the function that takes it apart. Blocks start
 * at any even address, so their structs are packed; integers are little-endian, as GGUF's are. */
#include "quant.h"
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blocks are read in place");

#define BLOCK __attribute__((packed, may_alias))

/* ---- conversions ---- */

static float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

float f16_to_f32(uint16_t bits) {
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  /* A subnormal counts units of 2^-24, which is what a float in [0.5, 1) gains with each step of its
   * mantissa. */
  if (magnitude < 0x0400) return float_of(sign | bits_of(float_of(0x3f000000 + magnitude) - 0.5f));
  if (magnitude < 0x7c00) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  return float_of(sign | 0x7f800000 | magnitude << 13); /* infinity, NaN */
}

uint16_t f32_to_f16(float x) {
  uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, half;
  if (magnitude > 0x7f800000) half = 0x7e00 | (magnitude >> 13 & 0x01ff); /* NaN, made quiet */
  else if (magnitude >= 0x477ff000) half = 0x7c00;                        /* 65520 and more round to infinity */
  else if (magnitude >= 0x38800000) /* 2^-14: normal; the carry of rounding may enter the exponent */
    half = (magnitude - (112u << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13;
  else half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000; /* the addition rounds to units of 2^-24 */
  return (uint16_t)((bits >> 16 & 0x8000) | half);
}

float bf16_to_f32(uint16_t bits) { return float_of((uint32_t)bits << 16); }

/* ---- parts that formats share ---- */

/* A block of one group: the formats of 32 values. */
static inline void set_simple(quant_block *out, uint16_t d, uint16_t m) {
  out->d = d;
  out->m = m;
  out->scale[0] = 1;
  out->min[0] = 1;
}

/* packed (n), q (2n): low nibbles, then high nibbles. */
static inline void nibbles(const uint8_t *restrict packed, uint8_t *restrict q, int n) {
  for (int i = 0; i < n; i++) q[i] = packed[i] & 15;
  for (int i = 0; i < n; i++) q[n + i] = packed[i] >> 4;
}

/* packed (32), q (128): the lowest bit pairs, then the next ones. */
static inline void bit_pairs(const uint8_t *restrict packed, uint8_t *restrict q) {
  for (int pair = 0; pair < 4; pair++)
    for (int i = 0; i < 32; i++) q[32 * pair + i] = packed[i] >> 2 * pair & 3;
}

/* packed (32), q (256): value 32 b + i gains bit b of byte i, moved to bit `to`. */
static inline void add_bit_planes(const uint8_t *restrict packed, uint8_t *restrict q, int to) {
  for (int bit = 0; bit < 8; bit++)
    for (int i = 0; i < 32; i++) q[32 * bit + i] |= (uint8_t)((packed[i] >> bit & 1) << to);
}

/* packed (4), q (32): value i gains bit i of the 32, moved to bit 4. Eight at a time: byte i of a word keeps
 * only bit i of its copy of the packed byte, and adding 127 brings it to bit 7 whichever bit it was. */
static inline void add_fifth_bits(const uint8_t *restrict packed, uint8_t *restrict q) {
  for (int byte = 0; byte < 4; byte++) {
    uint64_t bits = packed[byte] * 0x0101010101010101u & 0x8040201008040201u, word;
    memcpy(&word, q + 8 * byte, 8);
    word |= (bits + 0x7f7f7f7f7f7f7f7fu) >> 3 & 0x1010101010101010u;
    memcpy(q + 8 * byte, &word, 8);
  }
}

/* ---- 32 values, one scale ---- */

/* x = d (q - 8). Byte i of qs: value i low, value 16 + i high; so it is in all nibbles of 32 values. */
typedef struct block_q4_0 {
  uint16_t d;
  uint8_t qs[16];
} BLOCK block_q4_0;
_Static_assert(sizeof(block_q4_0) == 18, "Q4_0");

static void unpack_q4_0(const void *block, quant_block *out) {
  const block_q4_0 *b = block;
  set_simple(out, b->d, 0);
  nibbles(b->qs, out->q, 16);
}

/* x = d q + m */
typedef struct block_q4_1 {
  uint16_t d, m;
  uint8_t qs[16];
} BLOCK block_q4_1;
_Static_assert(sizeof(block_q4_1) == 20, "Q4_1");

static void unpack_q4_1(const void *block, quant_block *out) {
  const block_q4_1 *b = block;
  set_simple(out, b->d, b->m);
  nibbles(b->qs, out->q, 16);
}

/* x = d (q - 16). Bit i of the 32 in qh is bit 4 of value i. */
typedef struct block_q5_0 {
  uint16_t d;
  uint8_t qh[4], qs[16];
} BLOCK block_q5_0;
_Static_assert(sizeof(block_q5_0) == 22, "Q5_0");

static void unpack_q5_0(const void *block, quant_block *out) {
  const block_q5_0 *b = block;
  set_simple(out, b->d, 0);
  nibbles(b->qs, out->q, 16);
  add_fifth_bits(b->qh, out->q);
}

/* x = d q + m */
typedef struct block_q5_1 {
  uint16_t d, m;
  uint8_t qh[4], qs[16];
} BLOCK block_q5_1;
_Static_assert(sizeof(block_q5_1) == 24, "Q5_1");

static void unpack_q5_1(const void *block, quant_block *out) {
  const block_q5_1 *b = block;
  set_simple(out, b->d, b->m);
  nibbles(b->qs, out->q, 16);
  add_fifth_bits(b->qh, out->q);
}

/* x = d qs, qs signed */
typedef struct block_q8_0 {
  uint16_t d;
  uint8_t qs[32];
} BLOCK block_q8_0;
_Static_assert(sizeof(block_q8_0) == 34, "Q8_0");

static void unpack_q8_0(const void *block, quant_block *out) {
  const block_q8_0 *restrict b = block;
  uint8_t *restrict q = out->q;
  set_simple(out, b->d, 0);
  for (int i = 0; i < 32; i++) q[i] = b->qs[i] ^ 128; /* + 128 */
}

/* x = d codebook[q] */
typedef struct block_iq4_nl {
  uint16_t d;
  uint8_t qs[16];
} BLOCK block_iq4_nl;
_Static_assert(sizeof(block_iq4_nl) == 18, "IQ4_NL");

/* packed (16), q (32): as nibbles, through the codebook of IQ4_NL and IQ4_XS, whose entries are value + 128.
 */
static inline void codebook_nibbles(const uint8_t *restrict packed, uint8_t *restrict q) {
  static const uint8_t codebook[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
  for (int i = 0; i < 16; i++) {
    q[i] = codebook[packed[i] & 15];
    q[16 + i] = codebook[packed[i] >> 4];
  }
}

static void unpack_iq4_nl(const void *block, quant_block *out) {
  const block_iq4_nl *b = block;
  set_simple(out, b->d, 0);
  codebook_nibbles(b->qs, out->q);
}

/* ---- 256 values, small integer scales per group ---- */

/* x = d scale q - dmin min. Byte g of scales: scale of group g low, min high. qs: 128 values per 32 bytes. */
typedef struct block_q2_k {
  uint8_t scales[16], qs[64];
  uint16_t d, dmin;
} BLOCK block_q2_k;
_Static_assert(sizeof(block_q2_k) == 84, "Q2_K");

static void unpack_q2_k(const void *block, quant_block *out) {
  const block_q2_k *b = block;
  out->d = b->d;
  out->m = b->dmin ^ 0x8000;
  for (int g = 0; g < 16; g++) {
    out->scale[g] = b->scales[g] & 15;
    out->min[g] = b->scales[g] >> 4;
  }
  for (int half = 0; half < 2; half++) bit_pairs(b->qs + 32 * half, out->q + 128 * half);
}

/* x = d (scale - 32) (q - 4). hmask: bit 2 of q, 32 values per bit plane. scales: 6 bits for each of 16
 * groups, low nibbles in 8 bytes (groups 0-7 low, 8-15 high), upper bit pairs in 4 (group g: byte g % 4, pair
 * g / 4). */
typedef struct block_q3_k {
  uint8_t hmask[32], qs[64], scales[12];
  uint16_t d;
} BLOCK block_q3_k;
_Static_assert(sizeof(block_q3_k) == 110, "Q3_K");

static void unpack_q3_k(const void *block, quant_block *out) {
  const block_q3_k *b = block;
  out->d = b->d;
  out->m = 0;
  for (int g = 0; g < 16; g++) {
    int low = b->scales[g % 8] >> 4 * (g / 8) & 15;
    int high = b->scales[8 + g % 4] >> 2 * (g / 4) & 3;
    out->scale[g] = (int16_t)((low | high << 4) - 32);
    out->min[g] = 0;
  }
  for (int half = 0; half < 2; half++) bit_pairs(b->qs + 32 * half, out->q + 128 * half);
  add_bit_planes(b->hmask, out->q, 2);
}

/* The scales of Q4_K and Q5_K, 6 bits each for 8 groups: bytes 0-3 hold the scale of groups 0-3, bytes 4-7
 * the min; their upper bit pairs are the upper bits of groups 4-7, whose lower nibbles are in bytes 8-11
 * (scale low, min high). */
static inline void set_scale_min(const uint8_t *restrict packed, quant_block *restrict out) {
  for (int g = 0; g < 4; g++) {
    const uint8_t scale = packed[g], min = packed[4 + g], low = packed[8 + g];
    out->scale[g] = scale & 63;
    out->min[g] = min & 63;
    out->scale[4 + g] = (int16_t)((low & 15) | scale >> 6 << 4);
    out->min[4 + g] = (uint8_t)(low >> 4 | min >> 6 << 4);
  }
}

/* x = d scale q - dmin min. qs: 64 values per 32 bytes. */
typedef struct block_q4_k {
  uint16_t d, dmin;
  uint8_t scales[12], qs[128];
} BLOCK block_q4_k;
_Static_assert(sizeof(block_q4_k) == 144, "Q4_K");

static void unpack_q4_k(const void *block, quant_block *out) {
  const block_q4_k *b = block;
  out->d = b->d;
  out->m = b->dmin ^ 0x8000;
  set_scale_min(b->scales, out);
  for (int i = 0; i < 4; i++) nibbles(b->qs + 32 * i, out->q + 64 * i, 32);
}

/* x = d scale q - dmin min. qh: bit 4 of q, 32 values per bit plane. */
typedef struct block_q5_k {
  uint16_t d, dmin;
  uint8_t scales[12], qh[32], qs[128];
} BLOCK block_q5_k;
_Static_assert(sizeof(block_q5_k) == 176, "Q5_K");

static void unpack_q5_k(const void *block, quant_block *out) {
  const block_q5_k *b = block;
  out->d = b->d;
  out->m = b->dmin ^ 0x8000;
  set_scale_min(b->scales, out);
  for (int i = 0; i < 4; i++) nibbles(b->qs + 32 * i, out->q + 64 * i, 32);
  add_bit_planes(b->qh, out->q, 4);
}

/* x = d scale (q - 32). Per 128 values: lower nibbles in 64 bytes of ql, upper bit pairs in 32 bytes of qh.
 */
typedef struct block_q6_k {
  uint8_t ql[128], qh[64];
  int8_t scales[16];
  uint16_t d;
} BLOCK block_q6_k;
_Static_assert(sizeof(block_q6_k) == 210, "Q6_K");

static void unpack_q6_k(const void *block, quant_block *out) {
  const block_q6_k *b = block;
  out->d = b->d;
  out->m = 0;
  for (int g = 0; g < 16; g++) {
    out->scale[g] = b->scales[g];
    out->min[g] = 0;
  }
  for (int half = 0; half < 2; half++) {
    uint8_t high[128];
    uint8_t *q = out->q + 128 * half;
    bit_pairs(b->qh + 32 * half, high);
    nibbles(b->ql + 64 * half, q, 64);
    for (int i = 0; i < 128; i++) q[i] |= (uint8_t)(high[i] << 4);
  }
}

/* x = d (scale - 32) codebook[q]. scale of group g, 6 bits: nibble g of scales_l, bit pair g of scales_h. */
typedef struct block_iq4_xs {
  uint16_t d, scales_h;
  uint8_t scales_l[4], qs[128];
} BLOCK block_iq4_xs;
_Static_assert(sizeof(block_iq4_xs) == 136, "IQ4_XS");

static void unpack_iq4_xs(const void *block, quant_block *out) {
  const block_iq4_xs *b = block;
  out->d = b->d;
  out->m = 0;
  for (int g = 0; g < 8; g++) {
    int low = b->scales_l[g / 2] >> 4 * (g % 2) & 15, high = b->scales_h >> 2 * g & 3;
    out->scale[g] = (int16_t)((low | high << 4) - 32);
    out->min[g] = 0;
  }
  for (int g = 0; g < 8; g++) codebook_nibbles(b->qs + 16 * g, out->q + 32 * g);
}

/* ---- the table ---- */

static const quant_type TYPES[] = {
    /* id, name, block, bytes, bits, group, offset, has_min, scaled, unpack */
    {TYPE_F32, "F32", 1, 4, 0, 0, 0, false, false, NULL},
    {TYPE_F16, "F16", 1, 2, 0, 0, 0, false, false, NULL},
    {TYPE_BF16, "BF16", 1, 2, 0, 0, 0, false, false, NULL},
    {TYPE_Q4_0, "Q4_0", 32, sizeof(block_q4_0), 4, 32, 8, false, false, unpack_q4_0},
    {TYPE_Q4_1, "Q4_1", 32, sizeof(block_q4_1), 4, 32, 0, true, false, unpack_q4_1},
    {TYPE_Q5_0, "Q5_0", 32, sizeof(block_q5_0), 5, 32, 16, false, false, unpack_q5_0},
    {TYPE_Q5_1, "Q5_1", 32, sizeof(block_q5_1), 5, 32, 0, true, false, unpack_q5_1},
    {TYPE_Q8_0, "Q8_0", 32, sizeof(block_q8_0), 8, 32, 128, false, false, unpack_q8_0},
    {TYPE_Q2_K, "Q2_K", 256, sizeof(block_q2_k), 4, 16, 0, true, true, unpack_q2_k},
    {TYPE_Q3_K, "Q3_K", 256, sizeof(block_q3_k), 4, 16, 4, false, true, unpack_q3_k},
    {TYPE_Q4_K, "Q4_K", 256, sizeof(block_q4_k), 4, 32, 0, true, true, unpack_q4_k},
    {TYPE_Q5_K, "Q5_K", 256, sizeof(block_q5_k), 5, 32, 0, true, true, unpack_q5_k},
    {TYPE_Q6_K, "Q6_K", 256, sizeof(block_q6_k), 6, 16, 32, false, true, unpack_q6_k},
    {TYPE_IQ4_NL, "IQ4_NL", 32, sizeof(block_iq4_nl), 8, 32, 128, false, false, unpack_iq4_nl},
    {TYPE_IQ4_XS, "IQ4_XS", 256, sizeof(block_iq4_xs), 8, 32, 128, false, true, unpack_iq4_xs},
};

const quant_type *quant_find(int32_t id) {
  for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++)
    if (TYPES[i].id == id) return &TYPES[i];
  return NULL;
}

const char *quant_supported(void) {
  return "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS";
}

/* ---- dequantization ---- */

/* out: (type->block). d * scale is rounded before the value enters, as in the formula. */
static void dequantize_block(const quant_type *type, const quant_block *b, float *out) {
  float d = f16_to_f32(b->d), m = f16_to_f32(b->m);
  for (int32_t start = 0; start < type->block; start += type->group) {
    float scale = d * b->scale[start / type->group], min = m * b->min[start / type->group];
    const uint8_t *restrict q = b->q + start;
    float *restrict x = out + start;
    for (int32_t i = 0; i < type->group; i++) x[i] = scale * (float)(q[i] - type->offset);
    /* Adding a zero minimum would turn -0 into 0. */
    if (type->has_min)
      for (int32_t i = 0; i < type->group; i++) x[i] += min;
  }
}

static void dequantize_halves(const void *data, float *out, int64_t n, float (*convert)(uint16_t)) {
  const unsigned char *at = data;
  for (int64_t i = 0; i < n; i++, at += 2) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    out[i] = convert(bits);
  }
}

void quant_dequantize(const quant_type *type, const void *data, float *out, int64_t n) {
  if (type->id == TYPE_F32) memcpy(out, data, (size_t)n * sizeof *out);
  else if (type->id == TYPE_F16) dequantize_halves(data, out, n, f16_to_f32);
  else if (type->id == TYPE_BF16) dequantize_halves(data, out, n, bf16_to_f32);
  else {
    const unsigned char *block = data;
    for (int64_t i = 0; i < n; i += type->block, block += type->bytes) {
      quant_block b;
      type->unpack(block, &b);
      dequantize_block(type, &b, out + i);
    }
  }
}
