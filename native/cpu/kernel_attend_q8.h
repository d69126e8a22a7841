/* Attention over a cache of bytes. Queries and softmax weights are rounded to words, one scale a row, so that
 * products are whole numbers, which every grouping of rows sums alike. Part of kernels.c. */
#include "kernels.h"
#include "vec.h"
#include <float.h>

enum { Q8_VECS = STRIP / VL, WORD_MAX = 32767 };

#if VL == 16
enum { Q8_ROWS = 12 };
#elif VL == 8
enum { Q8_ROWS = 4 }; /* 8 sums of 16 registers: 6 rows are no faster, and panels have 64 */
#else
enum { Q8_ROWS = 1 };
#endif

/* x (n) as scale * q, the largest |x| being `largest`; returns the scale, NaN where that is. n % 16 == 0. */
static inline float words_of(const float *x, int32_t n, float largest, int16_t *q) {
  float scale = largest / WORD_MAX;
  if (!(scale >= FLT_MIN)) { /* its inverse would overflow; or NaN */
    memset(q, 0, (size_t)n * sizeof *q);
    return scale < FLT_MIN ? 0 : scale;
  }
  vf inverse = vset(1.0f / scale);
  for (int32_t i = 0; i < n; i += STRIP) {
    vi words[STRIP / VL];
    for (int v = 0; v < STRIP / VL; v++) words[v] = vround(vload(x + i + v * VL) * inverse);
    vstore_words(q + i, words);
  }
  return scale;
}

/* acc = rows' words, a (rows, 2 n_pairs), times n_pairs row pairs of bytes at b, added to what acc holds. */
static inline __attribute__((always_inline)) void q8_dot(int rows, const int16_t *a, int64_t lda, const int8_t *b,
                                                         int32_t n_pairs, const int8_t *ahead,
                                                         vi acc[Q8_ROWS][Q8_VECS]) {
  for (int32_t i = 0; i < n_pairs; i++, a += 2, b += 2 * STRIP) {
    if (ahead && i % 2 == 0) __builtin_prefetch(ahead + i * 2 * STRIP, 0, 1);
    vbytes w[Q8_VECS];
    for (int v = 0; v < Q8_VECS; v++) w[v] = vload_words(b + v * 2 * VL);
    for (int r = 0; r < rows; r++) {
      int32_t x;
      memcpy(&x, a + r * lda, sizeof x);
      for (int v = 0; v < Q8_VECS; v++) acc[r][v] = dot_words(acc[r][v], w[v], x);
    }
  }
}

static inline __attribute__((always_inline)) void q8_zero(int rows, vi acc[Q8_ROWS][Q8_VECS]) {
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < Q8_VECS; v++) acc[r][v] = viset(0);
}

/* scores (rows, 16) = scale[r] * q[r] k, of one strip. */
static inline __attribute__((always_inline)) void q8_scores(int rows, const int16_t *q, const float *scale,
                                                            int32_t head_dim, const int8_t *keys, const int8_t *ahead,
                                                            float *scores) {
  const uint16_t *key_scale = (const uint16_t *)(const void *)(keys + STRIP * head_dim);
  vf sum[Q8_ROWS][Q8_VECS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < Q8_VECS; v++) sum[r][v] = vset(0);
  for (int32_t i = 0; i < head_dim; i += KEY_GROUP, q += KEY_GROUP, key_scale += STRIP) {
    vi acc[Q8_ROWS][Q8_VECS];
    q8_zero(rows, acc);
    q8_dot(rows, q, head_dim, keys + i * STRIP, KEY_GROUP / 2, ahead ? ahead + i * STRIP : NULL, acc);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < Q8_VECS; v++)
        sum[r][v] += __builtin_convertvector(acc[r][v], vf) * vload_f16(key_scale + v * VL);
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < Q8_VECS; v++) vstore(scores + r * KV_BLOCK + v * VL, sum[r][v] * scale[r]);
}

/* out (rows, 16) = alpha out + factor weights v, of 16 dimensions at `offset` in each strip. */
static inline __attribute__((always_inline)) void q8_values(int rows, const attend_args *a, const int16_t *weights,
                                                            const float *alpha, const float *factor, int32_t offset,
                                                            float *out) {
  vi acc[Q8_ROWS][Q8_VECS];
  q8_zero(rows, acc);
  for (int s = 0; s < a->n_strips; s++) {
    const int8_t *ahead = after_values(a, s);
    q8_dot(rows, weights + s * STRIP, KV_BLOCK, (const int8_t *)a->v[s] + offset, STRIP / 2,
           ahead ? ahead + offset : NULL, acc);
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < Q8_VECS; v++) {
      float *o = out + r * a->head_dim + v * VL;
      vstore(o, alpha[r] * vload(o) + factor[r] * __builtin_convertvector(acc[r][v], vf));
    }
}

/* How many of the rows that are left one pass takes; in decode often the 3 heads of a group. */
enum { Q8_FEW = Q8_ROWS < 3 ? Q8_ROWS : 3 };
static inline int q8_rows(int32_t left) { return left >= Q8_ROWS ? Q8_ROWS : left >= Q8_FEW ? Q8_FEW : 1; }

static void round_queries(const float *q, int32_t n, int32_t head_dim, int16_t *words, float *scale) {
  for (int32_t r = 0; r < n; r++) {
    const float *x = q + r * head_dim;
    scale[r] = words_of(x, head_dim, vlargest(x, head_dim), words + r * head_dim);
  }
}

static void q8_all_scores(const attend_args *a) {
  const int16_t *q = a->q_words;
  const float *scale = a->q_scale;
  int32_t d = a->head_dim;
  for (int s = 0; s < a->n_strips; s++)
    for (int32_t r = 0, n; r < a->rows; r += n) {
      const int8_t *keys = a->k[s], *ahead = after_keys(a, s);
      float *scores = a->scores + r * KV_BLOCK + s * STRIP;
      n = q8_rows(a->rows - r);
      if (n == Q8_ROWS) q8_scores(Q8_ROWS, q + r * d, scale + r, d, keys, ahead, scores);
      else if (n == Q8_FEW) q8_scores(Q8_FEW, q + r * d, scale + r, d, keys, ahead, scores);
      else q8_scores(1, q + r * d, scale + r, d, keys, ahead, scores);
    }
}

static void q8_all_values(const attend_args *a, const int16_t *weights, const float *factor) {
  int32_t d = a->head_dim;
  for (int32_t i = 0; i < d; i += STRIP)
    for (int32_t r = 0, n; r < a->rows; r += n) {
      const int16_t *w = weights + r * KV_BLOCK;
      float *out = a->out + r * d + i;
      n = q8_rows(a->rows - r);
      if (n == Q8_ROWS) q8_values(Q8_ROWS, a, w, a->alpha + r, factor + r, i * STRIP, out);
      else if (n == Q8_FEW) q8_values(Q8_FEW, a, w, a->alpha + r, factor + r, i * STRIP, out);
      else q8_values(1, a, w, a->alpha + r, factor + r, i * STRIP, out);
    }
}

/* Of the keys of one call, row by row; each step is done for all rows before the next, for in each a row waits for
 * itself. */
typedef struct q8_softmax {
  float max[ATTEND_ROWS], sum[ATTEND_ROWS]; /* of these keys alone */
  float heaviest[ATTEND_ROWS];              /* weight, times its value's scale */
  float count[ATTEND_ROWS];                 /* what these keys count beside alpha of those before */
  int16_t words[ATTEND_ROWS * KV_BLOCK];
} q8_softmax;

/* scores = e^(score - max), times the values' scales (64). */
static inline void q8_weights(float *scores, float max, const float *value_scale, float *sum, float *heaviest) {
  vf all = vset(0), top = vset(0);
  for (int j = 0; j < KV_BLOCK; j += VL) {
    vf p = vexp_below(vload(scores + j), max), weight = p * vload(value_scale + j);
    all += p;
    top = vmax(top, weight);
    vstore(scores + j, weight);
  }
  *sum = vsum(all);
  *heaviest = vreduce_max(top);
}

/* Merges these keys' softmax into the rows' states. */
static inline void q8_merge(const attend_args *a, q8_softmax *x) {
  float less[ATTEND_ROWS];
  for (int32_t r = a->rows; r % VL; r++) x->max[r] = 0;
  for (int32_t r = 0; r < a->rows; r++) less[r] = a->state[r].max - x->max[r];
  for (int32_t r = 0; r < a->rows; r += VL) {
    vf before = vload(less + r), e = vexp((vf)((vi)before | INT32_MIN)); /* e^-|before - now| */
    vi smaller = before > vset(0);
    vstore(a->alpha + r, vselect(smaller, vset(1), e));
    vstore(x->count + r, vselect(smaller, e, vset(1)));
  }
  for (int32_t r = 0; r < a->rows; r++) {
    softmax_state *s = a->state + r;
    s->sum = a->alpha[r] * s->sum + x->count[r] * x->sum[r];
    if (!(s->max > x->max[r])) s->max = x->max[r];
  }
}

static inline void q8_value_scales(const attend_args *a, float *scale) {
  for (int s = 0; s < a->n_strips; s++) {
    const uint16_t *of = (const uint16_t *)(const void *)((const char *)a->v[s] + STRIP * a->head_dim);
    for (int j = 0; j < STRIP; j += VL) vstore(scale + s * STRIP + j, vload_f16(of + j));
  }
}

static void attend_bytes(const attend_args *a) {
  q8_softmax x;
  float value_scale[KV_BLOCK] = {0};
  q8_value_scales(a, value_scale);
  q8_all_scores(a);
  for (int32_t r = 0; r < a->rows; r++) x.max[r] = masked_max(a->scores + r * KV_BLOCK, a->n_valid[r], -1e30f);
  for (int32_t r = 0; r < a->rows; r++) {
    if (a->n_valid[r] > 0) q8_weights(a->scores + r * KV_BLOCK, x.max[r], value_scale, &x.sum[r], &x.heaviest[r]);
    else x.sum[r] = x.heaviest[r] = 0;
  }
  q8_merge(a, &x);
  if (!a->out) return;
  for (int32_t r = 0; r < a->rows; r++)
    x.count[r] *= words_of(a->scores + r * KV_BLOCK, KV_BLOCK, x.heaviest[r], x.words + r * KV_BLOCK);
  q8_all_values(a, x.words, x.count);
}
