/* Attention's two products in bfloat16: twice as many multiply-adds per instruction as in floats. Queries, keys,
 * weights and values are rounded to 8 bits of mantissa, products are summed as floats; docs/performance.md has what
 * that costs. Part of kernels.c. */
#include "kernels.h"
#include "vec.h"

/* Accumulators: rows times blocks of 16 columns. With few rows more blocks keep the units busy. */
enum { BF16_ROWS = 12, BF16_BLOCKS = 2, BF16_FEW_ROWS = 6, BF16_FEW_BLOCKS = 4 };

typedef uint32_t bf16_pair; /* two neighbours of a row, the first one low */

/* Matrix b of a product, up to 4 pieces of n_pairs row pairs each, up to 4 blocks of 16 columns:
 * at[piece][block] (n_pairs, 16, 2). */
typedef struct bf16_operand {
  int32_t n_pieces, n_pairs;
  const uint16_t *at[KV_STRIPS][KV_STRIPS];
  const uint16_t *ahead[KV_STRIPS][KV_STRIPS]; /* of the same shape, to be read after it; or NULL */
} bf16_operand;

static inline __m512bh bf16_from_f16(const uint16_t *p) {
  __m512 low = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
  __m512 high = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + 16)));
  return _mm512_cvtne2ps_pbh(high, low);
}

/* (n) f16 to bf16; n % 32 == 0. */
static inline void bf16_convert(const uint16_t *from, int32_t n, uint16_t *to) {
  for (int32_t i = 0; i < n; i += 2 * STRIP) {
    __m512bh v = bf16_from_f16(from + i);
    memcpy(to + i, &v, sizeof v);
  }
}

static inline void bf16_store(vf v, bf16_pair *to) {
  __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  memcpy(to, &rounded, sizeof rounded);
}

/* out[r, 16 k + j] = alpha ? alpha[r] * out + dot : dot. The order of additions is the same for every rows, blocks. */
static inline __attribute__((always_inline)) void bf16_rows(bool half, int rows, int blocks, const bf16_pair *a,
                                                            int64_t lda, const bf16_operand *b, int32_t first_block,
                                                            const float *alpha, float *out, int64_t ldo) {
  __m512 acc[BF16_ROWS][BF16_FEW_BLOCKS];
  for (int r = 0; r < rows; r++)
    for (int k = 0; k < blocks; k++) acc[r][k] = _mm512_setzero_ps();
  for (int32_t piece = 0; piece < b->n_pieces; piece++) {
    const uint16_t *const *at = b->at[piece] + first_block, *const *ahead = b->ahead[piece] + first_block;
    for (int32_t i = 0; i < b->n_pairs; i++, a++) {
      __m512bh w[BF16_FEW_BLOCKS];
      for (int k = 0; k < blocks; k++) {
        if (half && ahead[k]) __builtin_prefetch(ahead[k] + i * 2 * STRIP, 0, 1);
        if (half) w[k] = bf16_from_f16(at[k] + i * 2 * STRIP);
        else memcpy(&w[k], at[k] + i * 2 * STRIP, sizeof w[k]);
      }
      for (int r = 0; r < rows; r++) {
        __m512bh x = (__m512bh)_mm512_set1_epi32((int32_t)a[r * lda]);
        for (int k = 0; k < blocks; k++) acc[r][k] = _mm512_dpbf16_ps(acc[r][k], w[k], x);
      }
    }
  }
  for (int r = 0; r < rows; r++)
    for (int k = 0; k < blocks; k++) {
      float *o = out + r * ldo + k * STRIP;
      vstore(o, alpha ? alpha[r] * vload(o) + (vf)acc[r][k] : (vf)acc[r][k]);
    }
}

static inline __attribute__((always_inline)) void bf16_blocks(bool half, int rows, int at_once, int32_t n_blocks,
                                                              const bf16_pair *a, int64_t lda, const bf16_operand *b,
                                                              const float *alpha, float *out, int64_t ldo) {
  int32_t k = 0;
  for (; k + at_once <= n_blocks; k += at_once)
    bf16_rows(half, rows, at_once, a, lda, b, k, alpha, out + k * STRIP, ldo);
  for (; k < n_blocks; k++) bf16_rows(half, rows, 1, a, lda, b, k, alpha, out + k * STRIP, ldo);
}

/* n_blocks <= 4 */
static inline __attribute__((always_inline)) void bf16_gemm(bool half, int32_t rows, int32_t n_blocks,
                                                            const bf16_pair *a, int64_t lda, const bf16_operand *b,
                                                            const float *alpha, float *out, int64_t ldo) {
  for (int32_t r = 0; r < rows;) {
    const bf16_pair *x = a + r * lda;
    const float *s = alpha ? alpha + r : NULL;
    float *o = out + r * ldo;
    int32_t left = rows - r;
    if (left >= BF16_ROWS) {
      bf16_blocks(half, BF16_ROWS, BF16_BLOCKS, n_blocks, x, lda, b, s, o, ldo);
      r += BF16_ROWS;
    } else if (left >= BF16_FEW_ROWS) {
      bf16_blocks(half, BF16_FEW_ROWS, BF16_FEW_BLOCKS, n_blocks, x, lda, b, s, o, ldo);
      r += BF16_FEW_ROWS;
    } else if (left >= 3) {
      bf16_blocks(half, 3, BF16_FEW_BLOCKS, n_blocks, x, lda, b, s, o, ldo);
      r += 3;
    } else {
      bf16_blocks(half, 1, BF16_FEW_BLOCKS, n_blocks, x, lda, b, s, o, ldo);
      r += 1;
    }
  }
}

/* As few rows as one pass takes read keys and values as they lie; for more, they are converted once. */
static inline void bf16_product(int32_t rows, int32_t n_blocks, const bf16_pair *a, int64_t lda, bf16_operand *b,
                                const float *alpha, float *out, int64_t ldo) {
  uint16_t buffer[KV_BLOCK * LARGEST_HEAD];
  if (rows <= BF16_ROWS) {
    bf16_gemm(true, rows, n_blocks, a, lda, b, alpha, out, ldo);
    return;
  }
  uint16_t *to = buffer;
  int32_t size = b->n_pairs * 2 * STRIP;
  for (int32_t piece = 0; piece < b->n_pieces; piece++)
    for (int32_t k = 0; k < n_blocks; k++, to += size) {
      bf16_convert(b->at[piece][k], size, to);
      b->at[piece][k] = to;
    }
  bf16_gemm(false, rows, n_blocks, a, lda, b, alpha, out, ldo);
}

static void attend_scores(const attend_args *a) {
  bf16_pair q[ATTEND_ROWS * LARGEST_HEAD / 2];
  int32_t d = a->head_dim;
  for (int32_t i = 0; i < a->rows * d; i += STRIP) bf16_store(vload(a->q + i), q + i / 2);
  bf16_operand keys = {1, d / 2, {{0}}, {{0}}};
  for (int s = 0; s < a->n_strips; s++) {
    keys.at[0][s] = a->k[s];
    keys.ahead[0][s] = after_keys(a, s);
  }
  bf16_product(a->rows, a->n_strips, q, d / 2, &keys, NULL, a->scores, KV_BLOCK);
}

/* Takes the scores' memory for their rounded form. */
static void attend_values(const attend_args *a) {
  int32_t d = a->head_dim, most = KV_STRIPS * STRIP;
  bf16_pair *weights = (bf16_pair *)(void *)a->scores;
  for (int32_t r = 0; r < a->rows; r++)
    for (int32_t j = 0; j < KV_BLOCK; j += STRIP)
      bf16_store(vload(a->scores + r * KV_BLOCK + j), weights + r * KV_BLOCK + j / 2);
  for (int32_t first = 0; first < d; first += most) {
    bf16_operand values = {a->n_strips, STRIP / 2, {{0}}, {{0}}};
    int32_t n_blocks = (d - first < most ? d - first : most) / STRIP;
    for (int s = 0; s < a->n_strips; s++)
      for (int32_t k = 0; k < n_blocks; k++) {
        int32_t offset = (first + k * STRIP) * STRIP;
        const uint16_t *v = a->v[s], *ahead = after_values(a, s);
        values.at[s][k] = v + offset;
        values.ahead[s][k] = ahead ? ahead + offset : NULL;
      }
    bf16_product(a->rows, n_blocks, weights, KV_BLOCK, &values, a->alpha, a->out + first, d);
  }
}
