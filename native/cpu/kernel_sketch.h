/* Key sketch kernels: rounding a page, and estimating scores from it. Part of kernels.c; needs kernel_rows.h. */
#include "sketch.h"
#include <float.h>

enum { SKETCH_ROWS = 4, SKETCH_VECS = STRIP / VL, SKETCH_AHEAD = 8 }; /* rows at once; pages asked for ahead */

/* One channel of a page's keys. */
static void sketch_channel(const uint16_t *keys, int32_t bits, int32_t head_dim, int32_t channel, uint16_t *lo,
                           uint16_t *step, uint8_t codes[KV_BLOCK]) {
  float k[KV_BLOCK], top = (float)((1 << bits) - 1);
  for (int32_t t = 0; t < KV_BLOCK; t++) k[t] = f16_to_f32(keys[block_key_index(head_dim, t, channel)]);
  float low = k[0], high = k[0];
  for (int32_t t = 1; t < KV_BLOCK; t++) {
    low = k[t] < low ? k[t] : low;
    high = k[t] > high ? k[t] : high;
  }
  *lo = f32_to_f16(low);
  *step = f32_to_f16((high - low) / top);
  float width = f16_to_f32(*step);
  for (int32_t t = 0; t < KV_BLOCK; t++) {
    float code = width > 0 ? rintf((k[t] - low) / width) : 0;
    codes[t] = (uint8_t)(code < top ? code : top);
  }
}

static void put_code(uint8_t *page, const sketch_grade *grade, int32_t channel, int32_t t, uint8_t code) {
  int32_t strip = t / STRIP, at = 4 * (t % STRIP) + channel % 4, quad = channel / 4, width = grade->bits == 4 ? 4 : 2,
          per_byte = 8 / width;
  uint8_t *low = page + grade->low + (size_t)strip * sketch_low_bytes(grade->bits, grade->n) / KV_STRIPS + at,
          *high = page + grade->high + (size_t)strip * sketch_high_bytes(grade->bits, grade->n) / KV_STRIPS + at;
  low[quad / per_byte * 64] |= (uint8_t)((code & ((1 << width) - 1)) << (width * (quad % per_byte)));
  if (grade->bits == 3) high[quad / 8 * 64] |= (uint8_t)((code >> 2) << (quad % 8));
}

static uint16_t channel_mean(const uint16_t *keys, int32_t head_dim, int32_t channel) {
  float sum = 0;
  for (int32_t t = 0; t < KV_BLOCK; t++) sum += f16_to_f32(keys[block_key_index(head_dim, t, channel)]);
  return f32_to_f16(sum / KV_BLOCK);
}

static void sketch_fold(const uint16_t *keys, int32_t page_bits, int32_t head_dim, const uint16_t *channels,
                        uint8_t *page) {
  uint8_t codes[KV_BLOCK];
  memset(page, 0, sketch_page_bytes(page_bits, head_dim));
  uint16_t *lo = (uint16_t *)(void *)page, *step = lo + head_dim;
  for (int32_t i = 0; i < SKETCH_GRADES; i++) {
    sketch_grade grade = sketch_grade_at(page_bits, head_dim, i);
    for (int32_t c = 0, at = grade.first; c < grade.n; c++, at++) {
      sketch_channel(keys, grade.bits, head_dim, channels ? channels[at] : at, lo + at, step + at, codes);
      for (int32_t t = 0; t < KV_BLOCK; t++) put_code(page, &grade, c, t, codes[t]);
    }
  }
  for (int32_t at = sketch_channels(page_bits, head_dim); at < head_dim; at++)
    lo[at] = channel_mean(keys, head_dim, channels[at]);
}

/* A query, in the order of a page's channels, against it: weights q * step rounded to 8 bits; and, as powers of 2,
 * their scale, and what lo gives less the local mass. */
typedef struct sketch_query {
  int8_t weight[LARGEST_HEAD];
  float scale, base;
} sketch_query;

/* Of `rows` queries, local masses and results. */
static inline __attribute__((always_inline)) void sketch_weights(int rows, const float *q, const float *local_mass,
                                                                 const uint8_t *page, int32_t head_dim, int32_t n,
                                                                 sketch_query *out) {
  const uint16_t *lo = (const uint16_t *)(const void *)page, *step = lo + head_dim;
  float product[SKETCH_ROWS][LARGEST_HEAD], largest[4], low[4];
  vf top[4] = {0}, base[4] = {0};
  for (int32_t i = 0; i < n; i += VL) {
    vf width = vload_f16(step + i);
    for (int r = 0; r < rows; r++) {
      vf w = vload(q + r * head_dim + i) * width;
      vstore(product[r] + i, w);
      top[r] = vmax(top[r], (vf)((vi)w & INT32_MAX));
    }
  }
  for (int32_t i = 0; i < head_dim; i += VL) {
    vf least = vload_f16(lo + i);
    for (int r = 0; r < rows; r++) base[r] += vload(q + r * head_dim + i) * least;
  }
  vmax4(top, largest), vsum4(base, low);
  for (int r = 0; r < rows; r++) {
    float scale = largest[r] / 127.0f, inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
    out[r].base = (low[r] - local_mass[r]) * LOG2_E;
    out[r].scale = scale * LOG2_E;
    for (int32_t i = 0; i < n; i += VL) vstore_i8(out[r].weight + i, vround(vload(product[r] + i) * inverse));
  }
}

/* Of 16 tokens with one row. */
typedef vi strip_products[SKETCH_VECS];

/* Four channels of VL tokens: the i-th four of the sixteen whose planes begin at low and high. Of 3 bits the odd
 * sixteen has the upper half of each byte of `high`. */
static inline __attribute__((always_inline)) vbytes sketch_codes(int bits, bool odd, const uint8_t *low,
                                                                 const uint8_t *high, int i) {
  if (bits == 4) return vshift(vload_bytes(low + i / 2 * 64), i % 2 * 4) & 15;
  vbytes codes = vshift(vload_bytes(low), 2 * i) & 3;
  return bits == 3 ? codes | (vshift(vload_bytes(high), odd ? 2 + i : i - 2) & 4) : codes;
}

/* sum += what sixteen channels give a strip's 16 tokens. `at`: the first of them, in the sketch's order. */
static inline __attribute__((always_inline)) void sketch_sixteen(int rows, int bits, bool odd, const uint8_t *low,
                                                                 const uint8_t *high, int32_t at, const sketch_query *q,
                                                                 strip_products sum[SKETCH_ROWS]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    vbytes codes[SKETCH_VECS];
    for (int v = 0; v < SKETCH_VECS; v++) codes[v] = sketch_codes(bits, odd, low + 4 * VL * v, high + 4 * VL * v, i);
    for (int r = 0; r < rows; r++) {
      int32_t weights;
      memcpy(&weights, q[r].weight + at + 4 * i, sizeof weights);
      for (int v = 0; v < SKETCH_VECS; v++) sum[r][v] = dot_bytes(sum[r][v], codes[v], weights);
    }
  }
}

/* A strip's part of one grade's planes. */
typedef struct strip_planes {
  const uint8_t *low, *high;
  int32_t first, n;
} strip_planes;

static inline strip_planes planes_of(const uint8_t *page, int32_t page_bits, int32_t head_dim, int32_t grade,
                                     int32_t strip) {
  sketch_grade g = sketch_grade_at(page_bits, head_dim, grade);
  return (strip_planes){page + g.low + (size_t)strip * sketch_low_bytes(g.bits, g.n) / KV_STRIPS,
                        page + g.high + (size_t)strip * sketch_high_bytes(g.bits, g.n) / KV_STRIPS, g.first, g.n};
}

/* What 32 channels give at most, those from place i of each grade; the sums of one sixteen of 4 bits and one of 2,
 * or of two of 3, have room in 16 bits: 4 * 2 * 127 * (15 + 3) < 2^15. */
static inline __attribute__((always_inline)) void sketch_step(int rows, int page_bits, const strip_planes *first,
                                                              const strip_planes *second, int32_t i,
                                                              const sketch_query *q, strip_products sum[SKETCH_ROWS]) {
  int bits = page_bits == PYLLM_GRADED ? 4 : page_bits;
  const uint8_t *low = first->low + i * (bits == 4 ? 8 : 4), *high = first->high + i * 2;
  sketch_sixteen(rows, bits, false, low, high, i, q, sum);
  if (bits == 3 && i + 16 < first->n) sketch_sixteen(rows, bits, true, low + 64, high, i + 16, q, sum);
  if (page_bits == PYLLM_GRADED && i < second->n)
    sketch_sixteen(rows, 2, false, second->low + i * 4, NULL, second->first + i, q, sum);
}

/* products (rows, 4 strips), of strip `strip`. */
static inline __attribute__((always_inline)) void sketch_products(int rows, int page_bits, const uint8_t *page,
                                                                  int32_t head_dim, int strip, const sketch_query *q,
                                                                  strip_products products[SKETCH_ROWS][KV_STRIPS]) {
  strip_planes first = planes_of(page, page_bits, head_dim, 0, strip),
               second = planes_of(page, page_bits, head_dim, 1, strip);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < SKETCH_VECS; v++) products[r][strip][v] = viset(0);
  for (int32_t i = 0; i < first.n; i += page_bits == 3 ? 32 : 16) {
    strip_products sum[SKETCH_ROWS];
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < SKETCH_VECS; v++) sum[r][v] = DOT_IN_32_BITS ? products[r][strip][v] : viset(0);
    sketch_step(rows, page_bits, &first, &second, i, q, sum);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < SKETCH_VECS; v++)
        products[r][strip][v] = DOT_IN_32_BITS ? sum[r][v] : products[r][strip][v] + dot_sum(sum[r][v]);
  }
}

/* sums (4) of the strips' e^(score - local mass). Rough, for the scores are; a sum decides whether a strip is read,
 * and what stands for it. */
static inline void sketch_masses(const sketch_query *q, const strip_products products[KV_STRIPS], float *sums) {
  vf sum[KV_STRIPS] = {0};
  for (int i = 0; i < KV_STRIPS * SKETCH_VECS; i += 4) {
    vf y[4];
    for (int j = 0; j < 4; j++) {
      vi whole = products[(i + j) / SKETCH_VECS][(i + j) % SKETCH_VECS];
      y[j] = q->base + q->scale * __builtin_convertvector(whole, vf);
      y[j] = vmin(vset(100.0f), vmax(vset(-120.0f), y[j])); /* in this order NaN stays NaN */
    }
    vexp2_rough(y);
    for (int j = 0; j < 4; j++) sum[(i + j) / SKETCH_VECS] += y[j];
  }
  vsum4(sum, sums);
}

/* sums (rows, 4) of one page. */
static inline __attribute__((always_inline)) void sketch_rows(int rows, int page_bits, const uint8_t *page,
                                                              int32_t head_dim, const float *q, const float *local_mass,
                                                              float *sums, int64_t ld) {
  size_t bytes = sketch_page_bytes(page_bits, head_dim), per_strip = bytes / KV_STRIPS;
  const uint8_t *later = page + SKETCH_AHEAD * bytes;
  sketch_query queries[SKETCH_ROWS];
  strip_products products[SKETCH_ROWS][KV_STRIPS];
  sketch_weights(rows, q, local_mass, page, head_dim, sketch_channels(page_bits, head_dim), queries);
  for (int strip = 0; strip < KV_STRIPS; strip++) {
    for (size_t line = 0; line < per_strip; line += 64)
      __builtin_prefetch(later + per_strip * (size_t)strip + line, 0, 1);
    sketch_products(rows, page_bits, page, head_dim, strip, queries, products);
  }
  for (int r = 0; r < rows; r++) sketch_masses(queries + r, products[r], sums + r * ld);
}

static inline __attribute__((always_inline)) void sketch_sums_of(int page_bits, const uint8_t *page, int32_t head_dim,
                                                                 const float *q, const float *local_mass, int32_t n,
                                                                 float *sums, int64_t ld) {
  for (int32_t r = 0, rows; r < n; r += rows) {
    const float *of = q + r * head_dim;
    rows = n - r >= 4 ? 4 : n - r == 3 ? 3 : 1;
    if (rows == 4) sketch_rows(4, page_bits, page, head_dim, of, local_mass + r, sums + r * ld, ld);
    else if (rows == 3) sketch_rows(3, page_bits, page, head_dim, of, local_mass + r, sums + r * ld, ld);
    else sketch_rows(1, page_bits, page, head_dim, of, local_mass + r, sums + r * ld, ld);
  }
}

static void sketch_sums(const uint8_t *page, int32_t page_bits, int32_t head_dim, const float *q,
                        const float *local_mass, int32_t n, float *sums, int64_t ld) {
  switch (page_bits) {
  case PYLLM_GRADED:
    if (head_dim == 64) sketch_sums_of(PYLLM_GRADED, page, 64, q, local_mass, n, sums, ld);
    else sketch_sums_of(PYLLM_GRADED, page, head_dim, q, local_mass, n, sums, ld);
    break;
  case 2: sketch_sums_of(2, page, head_dim, q, local_mass, n, sums, ld); break;
  case 3: sketch_sums_of(3, page, head_dim, q, local_mass, n, sums, ld); break;
  default: sketch_sums_of(4, page, head_dim, q, local_mass, n, sums, ld); break;
  }
}

static float strip_shares(float *sums, int32_t n_strips) {
  float partial[4] = {0}; /* four chains of additions */
  for (int32_t s = 0; s < n_strips; s += 4)
    for (int32_t j = 0; j < 4; j++) partial[j] += sums[s + j];
  float total = 1.0f + ((partial[0] + partial[1]) + (partial[2] + partial[3])), inverse = 1.0f / total;
  for (int32_t s = 0; s < n_strips; s++) sums[s] *= inverse;
  return total;
}
