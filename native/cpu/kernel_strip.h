/* Float matrix kernel: a few rows against one strip of 16 columns. Part of kernels.c. */
#include "kernels.h"
#include "vec.h"

enum { STRIP_VECS = 2 * STRIP / VL }; /* vectors in one row pair of a strip, (16, 2) floats */

#if VL == 16
enum { STRIP_ROWS = 12 }; /* 24 accumulators of 32 registers */
#elif VL == 8
enum { STRIP_ROWS = 3 }; /* 12 of 16 */
#else
enum { STRIP_ROWS = 1 };
#endif

static inline vf strip_load(const void *data, enum strip_type type, int64_t i) {
  switch (type) {
  case STRIP_F16: return vload_f16((const uint16_t *)data + i);
  case STRIP_BF16: return vload_bf16((const uint16_t *)data + i);
  default: return vload((const float *)data + i);
  }
}

/* Adds the products with one row pair, at `at`. What there is less of is loaded first, and the other one by one:
 * with the sums they must fit the registers. */
static inline __attribute__((always_inline)) void strip_pair(int rows, enum strip_type type, const float *pair,
                                                             int64_t lda, const void *data, int64_t at,
                                                             vf acc[STRIP_ROWS][STRIP_VECS]) {
  if (rows < STRIP_VECS) {
    vf x[STRIP_ROWS];
    for (int r = 0; r < rows; r++) x[r] = vset_pair(pair + r * lda);
    for (int v = 0; v < STRIP_VECS; v++) {
      vf w = strip_load(data, type, at + v * VL);
      for (int r = 0; r < rows; r++) acc[r][v] += x[r] * w;
    }
  } else {
    vf w[STRIP_VECS];
    for (int v = 0; v < STRIP_VECS; v++) w[v] = strip_load(data, type, at + v * VL);
    for (int r = 0; r < rows; r++) {
      vf x = vset_pair(pair + r * lda);
      for (int v = 0; v < STRIP_VECS; v++) acc[r][v] += x * w[v];
    }
  }
}

/* Even and odd rows of b accumulate apart, in order, and are added at the end: the same for every `rows`. */
static inline __attribute__((always_inline)) void strip_rows(int rows, enum strip_type type, const float *a,
                                                             int64_t lda, const strips *b, const float *alpha,
                                                             float *out, int64_t ldo) {
  const int32_t pair_bytes = 2 * STRIP * (type == STRIP_F32 ? 4 : 2);
  vf acc[STRIP_ROWS][STRIP_VECS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < STRIP_VECS; v++) acc[r][v] = vset(0);
  for (int32_t piece = 0; piece < b->n_pieces; piece++) {
    const char *ahead = b->ahead[piece];
    for (int32_t i = 0; i < b->n_pairs; i++) {
      if (ahead) __builtin_prefetch(ahead + i * pair_bytes, 0, 1);
      strip_pair(rows, type, a + (int64_t)(piece * b->n_pairs + i) * 2, lda, b->data[piece], (int64_t)i * 2 * STRIP,
                 acc);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < STRIP_VECS / 2; v++) {
      vf dot = vsum_pairs(acc[r][2 * v], acc[r][2 * v + 1]);
      float *o = out + r * ldo + v * VL;
      vstore(o, alpha ? alpha[r] * vload(o) + dot : dot);
    }
}

/* Calls the widest instance that fits until the rows are used up. */
static inline __attribute__((always_inline)) void strip_gemm_typed(enum strip_type type, int32_t rows, const float *a,
                                                                   int64_t lda, const strips *b, const float *alpha,
                                                                   float *out, int64_t ldo) {
  for (int32_t r = 0; r < rows;) {
    const float *x = a + r * lda, *s = alpha ? alpha + r : NULL;
    float *o = out + r * ldo;
    int32_t left = rows - r;
    if (left >= STRIP_ROWS) {
      strip_rows(STRIP_ROWS, type, x, lda, b, s, o, ldo);
      r += STRIP_ROWS;
    }
#if VL == 16
    else if (left >= 6) {
      strip_rows(6, type, x, lda, b, s, o, ldo);
      r += 6;
    } else if (left >= 3) {
      strip_rows(3, type, x, lda, b, s, o, ldo);
      r += 3;
    }
#endif
    else {
      strip_rows(1, type, x, lda, b, s, o, ldo);
      r += 1;
    }
  }
}

static void strip_gemm(int32_t rows, const float *a, int64_t lda, const strips *b, const float *alpha, float *out,
                       int64_t ldo) {
  switch (b->type) {
  case STRIP_F16: strip_gemm_typed(STRIP_F16, rows, a, lda, b, alpha, out, ldo); break;
  case STRIP_BF16: strip_gemm_typed(STRIP_BF16, rows, a, lda, b, alpha, out, ldo); break;
  case STRIP_F32: strip_gemm_typed(STRIP_F32, rows, a, lda, b, alpha, out, ldo); break;
  }
}
