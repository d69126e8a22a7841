/* Key sketch kernels: rounding a page, and estimating scores from it. Part of kernels.c; needs kernel_rows.h. */
#include "sketch.h"
#include <float.h>

enum { SKETCH_ROWS = 16, SKETCH_MAX_DIM = 512, SKETCH_VECS = STRIP / VL };

/* Nearest whole number, ties to even; |x| < 2^22. */
static inline vf vround(vf x) { return (x + 12582912.0f) - 12582912.0f; }

/* Channels 2 p and 2 p + 1 of a page's 64 keys, one after the other. */
static inline void sketch_load_pair(const uint16_t *keys, int32_t head_dim, int32_t pair, vf out[2][KV_BLOCK / VL]) {
  for (int32_t i = 0; i < KV_BLOCK / VL; i++) {
    const uint16_t *p = keys + i * VL / STRIP * STRIP * head_dim + pair * 2 * STRIP + i * VL % STRIP * 2;
    vf low = vload_f16(p), high = vload_f16(p + VL);
    out[0][i] = __builtin_shufflevector(low, high, EVENS);
    out[1][i] = __builtin_shufflevector(low, high, ODDS);
  }
}

/* Replaces one channel's keys by their codes. */
static inline void sketch_channel(vf k[KV_BLOCK / VL], int32_t bits, uint16_t *lo, uint16_t *step) {
  float top = (float)((1 << bits) - 1);
  vf most = k[0], least = -k[0];
  for (int32_t i = 1; i < KV_BLOCK / VL; i++) {
    most = vmax(most, k[i]);
    least = vmax(least, -k[i]);
  }
  float low = -vreduce_max(least);
  *lo = f32_to_f16(low);
  *step = f32_to_f16((vreduce_max(most) - low) / top);
  float width = f16_to_f32(*step);
  for (int32_t i = 0; i < KV_BLOCK / VL; i++)
    k[i] = width > 0 ? -vmax(-vround((k[i] - low) / width), vset(-top)) : vset(0);
}

/* The codes of four channels as the bytes of 64 tokens' words, (4 strips, 16). */
static inline void sketch_four(const uint16_t *keys, int32_t bits, int32_t head_dim, int32_t four, uint16_t *lo,
                               uint16_t *step, vu words[KV_BLOCK / VL]) {
  for (int32_t i = 0; i < KV_BLOCK / VL; i++) words[i] = (vu){0};
  for (int32_t c = 0; c < 4; c += 2) {
    vf k[2][KV_BLOCK / VL];
    sketch_load_pair(keys, head_dim, 2 * four + c / 2, k);
    for (int32_t j = 0; j < 2; j++) {
      sketch_channel(k[j], bits, lo + 4 * four + c + j, step + 4 * four + c + j);
      for (int32_t i = 0; i < KV_BLOCK / VL; i++)
        words[i] |= (vu) __builtin_convertvector(k[j][i], vi) << (8 * (c + j));
    }
  }
}

static void sketch_fold(const uint16_t *keys, int32_t bits, int32_t head_dim, uint8_t *page) {
  const sketch_format *f = &SKETCH_FORMATS[bits - 2];
  uint16_t *lo = (uint16_t *)(void *)page, *step = lo + head_dim;
  uint8_t *planes = page + 4 * head_dim;
  for (int32_t bundle = 0; bundle < sketch_bundles(bits, head_dim); bundle++) {
    vu words[SKETCH_FOURS][KV_BLOCK / VL] = {{{0}}};
    for (int32_t i = 0, four = bundle * f->fours; i < f->fours && 4 * four < head_dim; i++, four++)
      sketch_four(keys, bits, head_dim, four, lo, step, words[i]);
    for (int32_t i = 0; i < KV_BLOCK / VL; i++) {
      vu plane[SKETCH_PLANES] = {{0}};
      for (int32_t n = 0; n < f->n_fields; n++) {
        const sketch_field *x = &f->fields[n];
        plane[x->plane] |= (words[x->four][i] >> x->from & (0x01010101u * ((1u << x->bits) - 1))) << x->at;
      }
      uint8_t *strip = planes + i * VL / STRIP * sketch_strip_bytes(bits, head_dim);
      for (int32_t n = 0; n < f->planes; n++)
        memcpy(strip + (bundle * f->planes + n) * 64 + i * VL % STRIP * 4, &plane[n], sizeof plane[n]);
    }
  }
}

typedef uint8_t code_bytes __attribute__((vector_size(4 * STRIP)));

/* A query against a page's channels: weights q * step rounded to 8 bits, their scale, and the part that lo gives. */
typedef struct sketch_query {
  int8_t weight[SKETCH_MAX_DIM + 4 * SKETCH_FOURS]; /* 0 behind the last channel */
  float scale, base;
} sketch_query;

static inline void sketch_weights(const float *q, const uint8_t *page, int32_t head_dim, sketch_query *out) {
  const uint16_t *lo = (const uint16_t *)(const void *)page, *step = lo + head_dim;
  float product[SKETCH_MAX_DIM];
  vf top = vset(0), base = vset(0);
  for (int32_t i = 0; i < head_dim; i += VL) {
    vf x = vload(q + i), w = x * vload_f16(step + i);
    vstore(product + i, w);
    top = vmax(top, (vf)((vi)w & INT32_MAX));
    base += x * vload_f16(lo + i);
  }
  out->base = vsum(base);
  out->scale = vreduce_max(top) / 127.0f;
  float inverse = out->scale >= FLT_MIN ? 1.0f / out->scale : 0.0f;
  for (int32_t i = 0; i < head_dim; i++)
    out->weight[i] = (int8_t)(int32_t)((product[i] * inverse + 12582912.0f) - 12582912.0f);
  memset(out->weight + head_dim, 0, 4 * SKETCH_FOURS);
}

/* Sums by how far their parts stand left of a code's first bit. */
typedef vi sketch_sums[8][SKETCH_VECS];

static inline __attribute__((always_inline)) void
sketch_bundle(int rows, int bits, const uint8_t *planes, int32_t channel, const sketch_query *q, sketch_sums *sums) {
  const sketch_format *f = &SKETCH_FORMATS[bits - 2];
  code_bytes plane[SKETCH_PLANES];
  memcpy(plane, planes, (size_t)f->planes * sizeof *plane);
#pragma GCC unroll 10
  for (int n = 0; n < f->n_fields; n++) {
    const sketch_field *x = &f->fields[n];
    int mask = ((1 << x->bits) - 1) << x->at;
    code_bytes part = plane[x->plane] & (uint8_t)mask;
    uint8_t bytes[4 * STRIP];
    memcpy(bytes, &part, sizeof part);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < SKETCH_VECS; v++) {
        vi *sum = &sums[r][x->at - x->from][v];
        *sum = vdot4(*sum, bytes + 4 * VL * v, q[r].weight + channel + 4 * x->four, mask > 0x80 ? 8 : 4);
      }
  }
}

static inline __attribute__((always_inline)) void sketch_rows(int rows, int bits, const uint8_t *page, int32_t head_dim,
                                                              const sketch_query *q, float *scores, int64_t ld) {
  const sketch_format *f = &SKETCH_FORMATS[bits - 2];
  const uint8_t *planes = page + 4 * head_dim;
  int32_t n_bundles = sketch_bundles(bits, head_dim);
  for (int32_t strip = 0; strip < KV_STRIPS; strip++) {
    sketch_sums sums[3];
    for (int r = 0; r < rows; r++)
      for (int s = 0; s < 8; s++)
        for (int v = 0; v < SKETCH_VECS; v++) sums[r][s][v] = viset(0);
    for (int32_t bundle = 0; bundle < n_bundles; bundle++, planes += f->planes * 64)
      sketch_bundle(rows, bits, planes, bundle * f->fours * 4, q, sums);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < SKETCH_VECS; v++) {
        vi total = sums[r][0][v];
        for (int s = 1; s < 8; s++) total += sums[r][s][v] >> s;
        vstore(scores + r * ld + strip * STRIP + v * VL, q[r].base + q[r].scale * __builtin_convertvector(total, vf));
      }
  }
}

static inline __attribute__((always_inline)) void sketch_scores_of(int bits, const uint8_t *page, int32_t head_dim,
                                                                   const float *q, int32_t n, float *scores,
                                                                   int64_t ld) {
  sketch_query queries[SKETCH_ROWS];
  size_t bytes = sketch_page_bytes(bits, head_dim);
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(page + bytes + line); /* the next page */
  for (int32_t r = 0; r < n; r++) sketch_weights(q + r * head_dim, page, head_dim, &queries[r]);
  int32_t r = 0;
  for (; r + 3 <= n; r += 3) sketch_rows(3, bits, page, head_dim, queries + r, scores + r * ld, ld);
  for (; r < n; r++) sketch_rows(1, bits, page, head_dim, queries + r, scores + r * ld, ld);
}

static void sketch_scores(const uint8_t *page, int32_t bits, int32_t head_dim, const float *q, int32_t n, float *scores,
                          int64_t ld) {
  switch (bits) {
  case 2: sketch_scores_of(2, page, head_dim, q, n, scores, ld); break;
  case 3: sketch_scores_of(3, page, head_dim, q, n, scores, ld); break;
  default: sketch_scores_of(4, page, head_dim, q, n, scores, ld); break;
  }
}

static void strip_shares(float *scores, int32_t n_strips, float local_mass, float *share) {
  vf top = vset(local_mass);
  for (int32_t i = 0; i < n_strips * STRIP; i += VL) top = vmax(top, vload(scores + i));
  float max = vreduce_max(top);
  double total = vsum(vexp(vset(local_mass - max))) / VL;
  for (int32_t s = 0; s < n_strips; s++) {
    vf sum = vset(0);
    for (int i = 0; i < STRIP; i += VL) sum += vexp(vload(scores + s * STRIP + i) - max);
    total += share[s] = vsum(sum);
  }
  float inverse = (float)(1.0 / total);
  for (int32_t s = 0; s < n_strips; s++) share[s] *= inverse;
}
