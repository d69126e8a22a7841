/* Key sketch kernels: rounding a page, and estimating scores from it. Part of kernels.c; needs kernel_rows.h. */
#include "sketch.h"
#include <float.h>

enum { SKETCH_ROWS = 16, SKETCH_VECS = STRIP / VL };

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
  uint8_t *low = page + grade->low, *high = page + grade->high;
  int32_t strip = t / STRIP, at = 4 * (t % STRIP) + channel % 4, quad = channel / 4;
  int32_t byte = (strip * (grade->n / 16) + quad / 4) * 64 + at;
  low[byte] |= (uint8_t)((code & 3) << (2 * (quad % 4)));
  if (grade->bits == 4) high[byte] |= (uint8_t)((code >> 2) << (2 * (quad % 4)));
  if (grade->bits == 3)
    high[(strip * ((grade->n + 31) / 32) + quad / 8) * 64 + at] |= (uint8_t)((code >> 2) << (quad % 8));
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

/* A query, in the order of a page's channels, against it: weights q * step rounded to 8 bits, their scale, and the part that lo gives. */
typedef struct sketch_query {
  int8_t weight[LARGEST_HEAD];
  float scale, base;
} sketch_query;

static inline void sketch_weights(const float *q, const uint8_t *page, int32_t head_dim, int32_t n, sketch_query *out) {
  const uint16_t *lo = (const uint16_t *)(const void *)page, *step = lo + head_dim;
  float product[LARGEST_HEAD];
  vf top = vset(0), base = vset(0);
  for (int32_t i = 0; i < n; i += VL) {
    vf w = vload(q + i) * vload_f16(step + i);
    vstore(product + i, w);
    top = vmax(top, (vf)((vi)w & INT32_MAX));
  }
  for (int32_t i = 0; i < head_dim; i += VL) base += vload(q + i) * vload_f16(lo + i);
  out->base = vsum(base);
  out->scale = vreduce_max(top) / 127.0f;
  float inverse = out->scale >= FLT_MIN ? 1.0f / out->scale : 0.0f;
  for (int32_t i = 0; i < n; i += VL) vstore_i8(out->weight + i, vround(vload(product + i) * inverse));
}

/* Sixteen channels of a strip's 16 tokens, by fours. `at`: the first of them, in the sketch's order. */
static inline __attribute__((always_inline)) void sketch_sixteen(int rows, int bits, bool odd, const uint8_t *low,
                                                                 const uint8_t *high, int32_t at, const sketch_query *q,
                                                                 vi acc[4][SKETCH_VECS]) {
  vbytes l[SKETCH_VECS], h[SKETCH_VECS];
  vi part[4][SKETCH_VECS];
  for (int v = 0; v < SKETCH_VECS; v++) {
    l[v] = vload_bytes(low + 4 * VL * v);
    if (bits > 2) h[v] = vload_bytes(high + 4 * VL * v);
    for (int r = 0; r < rows; r++) part[r][v] = DOT_IN_32_BITS ? acc[r][v] : viset(0);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    vbytes codes[SKETCH_VECS];
    for (int v = 0; v < SKETCH_VECS; v++) {
      vbytes b = vshift(l[v], 2 * i) & 3;
      if (bits == 3) b |= vshift(h[v], odd ? 2 + i : i - 2) & 4;
      if (bits == 4) b |= vshift(h[v], 2 * i - 2) & 12;
      codes[v] = b;
    }
    for (int r = 0; r < rows; r++) {
      int32_t weights;
      memcpy(&weights, q[r].weight + at + 4 * i, sizeof weights);
      for (int v = 0; v < SKETCH_VECS; v++) part[r][v] = dot_bytes(part[r][v], codes[v], weights);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < SKETCH_VECS; v++) acc[r][v] = DOT_IN_32_BITS ? part[r][v] : acc[r][v] + dot_sum(part[r][v]);
}

/* Adds what one grade's channels give a strip. */
static inline __attribute__((always_inline)) void sketch_grade_sums(int rows, int bits, const uint8_t *page,
                                                                    const sketch_grade *grade, int32_t strip,
                                                                    const sketch_query *q, vi acc[4][SKETCH_VECS]) {
  const uint8_t *low = page + grade->low + (size_t)strip * sketch_low_bytes(grade->n) / 4,
                *high = page + grade->high + (size_t)strip * sketch_high_bytes(bits, grade->n) / 4;
  int32_t at = grade->first, end = at + grade->n;
  if (bits == 3) {
    for (; at + 32 <= end; at += 32, low += 128, high += 64) {
      sketch_sixteen(rows, bits, false, low, high, at, q, acc);
      sketch_sixteen(rows, bits, true, low + 64, high, at + 16, q, acc);
    }
    if (at < end) sketch_sixteen(rows, bits, false, low, high, at, q, acc);
  } else
    for (; at < end; at += 16, low += 64, high += 64) sketch_sixteen(rows, bits, false, low, high, at, q, acc);
}

static inline __attribute__((always_inline)) void sketch_rows(int rows, int page_bits, const uint8_t *page,
                                                              int32_t head_dim, const sketch_query *q, float *scores,
                                                              int64_t ld) {
  size_t ahead = 8 * sketch_page_bytes(page_bits, head_dim); /* the next page is asked for */
  sketch_grade first = sketch_grade_at(page_bits, head_dim, 0), second = sketch_grade_at(page_bits, head_dim, 1);
  for (int32_t strip = 0; strip < KV_STRIPS; strip++) {
    vi acc[4][SKETCH_VECS];
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < SKETCH_VECS; v++) acc[r][v] = viset(0);
    for (size_t line = ahead / 32 * (size_t)strip; line < ahead / 32 * (size_t)(strip + 1); line += 64)
      __builtin_prefetch(page + ahead + line, 0, 1);
    sketch_grade_sums(rows, page_bits == PYLLM_GRADED ? 4 : page_bits, page, &first, strip, q, acc);
    if (page_bits == PYLLM_GRADED) sketch_grade_sums(rows, 2, page, &second, strip, q, acc);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < SKETCH_VECS; v++)
        vstore(scores + r * ld + strip * STRIP + v * VL,
               q[r].base + q[r].scale * __builtin_convertvector(acc[r][v], vf));
  }
}

static inline __attribute__((always_inline)) void sketch_scores_of(int page_bits, const uint8_t *page, int32_t head_dim,
                                                                   const float *q, int32_t n, float *scores,
                                                                   int64_t ld) {
  sketch_query queries[SKETCH_ROWS];
  int32_t channels = sketch_channels(page_bits, head_dim), r = 0;
  for (int32_t i = 0; i < n; i++) sketch_weights(q + i * head_dim, page, head_dim, channels, &queries[i]);
  for (; r + 3 <= n; r += 3) sketch_rows(3, page_bits, page, head_dim, queries + r, scores + r * ld, ld);
  for (; r < n; r++) sketch_rows(1, page_bits, page, head_dim, queries + r, scores + r * ld, ld);
}

static void sketch_scores(const uint8_t *page, int32_t page_bits, int32_t head_dim, const float *q, int32_t n,
                          float *scores, int64_t ld) {
  switch (page_bits) {
  case PYLLM_GRADED: sketch_scores_of(PYLLM_GRADED, page, head_dim, q, n, scores, ld); break;
  case 2: sketch_scores_of(2, page, head_dim, q, n, scores, ld); break;
  case 3: sketch_scores_of(3, page, head_dim, q, n, scores, ld); break;
  default: sketch_scores_of(4, page, head_dim, q, n, scores, ld); break;
  }
}

/* Rough, for the scores are; a strip's sum decides whether it is read, and what stands for it. */
static void strip_sums(const float *scores, int32_t n_strips, float local_mass, float *sums) {
  const float mass = local_mass * LOG2_E;
  for (int32_t s = 0; s < n_strips; s++) {
    vf sum = vset(0);
    for (int i = 0; i < STRIP; i += VL) {
      vf y = vload(scores + s * STRIP + i) * LOG2_E - mass;
      sum += vexp2_rough(vmin(vset(100.0f), vmax(vset(-120.0f), y))); /* in this order NaN stays NaN */
    }
    sums[s] = vsum(sum);
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
