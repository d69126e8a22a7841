/* The CPU's inner loops: one source (kernels.c), built once per instruction set, chosen at run time (isa.c).
 *
 * There are two matrix kernels. `strip_gemm` multiplies floats and serves float weights, attention scores, weighted
 * values and key moments; `tile_gemm` multiplies rounded activations with quantized weights. In both, what one output
 * element accumulates, and in which order, does not depend on how many rows or tokens are computed together:
 * results are bit-identical whatever the batch, the tiling and the number of threads. */
#ifndef PYLLM_CPU_KERNELS_H
#define PYLLM_CPU_KERNELS_H
#include "geometry.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
  STRIP = PYLLM_READ_PAGE, /* columns of a strip: of a cache, tokens or dimensions */
  TILE_ROWS = 16,
  ACT_GROUP = 32,
  ACT_HALF = 16,
  KV_BLOCK = PYLLM_PAGE,
  KV_STRIPS = STRIPS_PER_PAGE,
  ATTEND_ROWS = SHARED_ROWS /* query rows that attention takes at once, at most */
};

enum strip_type { STRIP_F16, STRIP_BF16, STRIP_F32 };

/* A strip is 16 columns of a matrix, row pairs interleaved: (n_pairs, 16, 2). A matrix of more rows may be given as up
 * to 4 pieces of n_pairs each. */
typedef struct strips {
  enum strip_type type;
  int32_t n_pieces, n_pairs;
  const void *data[KV_STRIPS];  /* (n_pieces) */
  const void *ahead[KV_STRIPS]; /* (n_pieces) of the same shape, what will be read after it; NULL: do not ask for it */
} strips;

/* Where quantized weights live after repacking: tiles of 16 rows, each its scales and then its quants.
 *   quants: per 32 columns (8, 16, 4) bytes, [i][row][j] = q of column 4 i + j. With fewer bits (4, 16, 4) bytes, the
 *           low nibble of [i] being columns 4 i + j and the high nibble columns 16 + 4 i + j, and then what is above 4
 *           bits: for 5 bits (16, 4) bytes with that of [i] at bit i, for 6 bits (2, 16, 4) with that of [4 p + i] in
 *           [p] at bit 2 i.
 *   scales: simple formats, per 32 columns: d f16 (16), then m f16 (16) where has_min.
 *           scaled formats, per 256 columns: d f16 (16), m f16 (16) where has_min, scale i8 (256 / group, 16),
 *           min u8 (256 / group, 16) where has_min. */
typedef struct tile_format {
  int32_t bits;   /* 4, 5, 6 or 8 */
  int32_t group;  /* 16 or 32 */
  int32_t offset; /* subtracted from every q */
  bool scaled, has_min;
} tile_format;

/* Whether tile_gemm takes activations of 8 bits: without VNNI 8 products of these with weights are summed in 16 bits,
 * which hold them where weights have 6 and the sum is of q - offset. */
static inline bool takes_bytes(const tile_format *f) { return f->bits <= 6; }

/* Activations rounded to 16 bits, x = scale * q with one scale per 32 values, or to 8 with one per 16. Four columns' q
 * of 16 bits are 8 bytes as products take them: two 8-bit planes q = 256 high + low, four high bytes and then their four
 * low ones, so that 8-bit products serve; or, where kernels.words, words of the columns 0, 2, 1, 3. Of 8 bits they are
 * their 4 bytes. (What rounding costs: docs/performance.md.) */
typedef struct quantized {
  int32_t bits;   /* 16 or 8; 0: there are none */
  int8_t *planes; /* (n, cols / 4, bits / 2) */
  float *scale;   /* (n, cols / 32), of 8 bits (n, cols / 16) */
  int32_t *sum;   /* (n, cols / 16) sums of q; of 8 bits two words: of the first and the last two of every four */
  float *product; /* (n, cols / 16) scale * sum */
  float *both;    /* (n, cols / 32) the sums of two of these; on the CPU alone */
} quantized;

enum { ACT_MAX = 127 * 256, ACT_MAX8 = 127 }; /* largest |q|: of 16 bits, its high byte fits */

static inline int32_t act_group(int32_t bits) { return bits == 8 ? ACT_HALF : ACT_GROUP; }

/* What comes after n times `cols` columns, rows or parts of the first one: whole groups that share a scale. */
static inline quantized quantized_after(const quantized *x, int64_t cols, int64_t n) {
  int64_t values = cols * n;
  return (quantized){x->bits,
                     x->planes + values * x->bits / 8,
                     x->scale + (x->bits == 8 ? values / ACT_HALF : values / ACT_GROUP),
                     x->sum + values / ACT_HALF,
                     x->product + values / ACT_HALF,
                     x->both + values / ACT_GROUP};
}

/* q of column i of the first row. */
static inline int32_t quantized_at(const quantized *x, bool words, size_t i) {
  if (x->bits == 8) return x->planes[i];
  const int8_t *four = x->planes + i / 4 * 8;
  if (!words) return 256 * four[i % 4] + four[4 + i % 4];
  int16_t q;
  memcpy(&q, four + 2 * ((int[]){0, 2, 1, 3}[i % 4]), sizeof q);
  return q;
}

/* Running softmax of one query: maximum and sum of e^(score - maximum). */
typedef struct softmax_state {
  float max, sum;
} softmax_state;

typedef struct attend_args {
  int32_t rows, head_dim, n_strips; /* rows <= 64, head_dim <= LARGEST_HEAD */
  const float *q;                   /* (rows, head_dim), scaled by the score scale */
  const int16_t *q_words;           /* the same as round_queries has it, with q_scale; of bytes alone */
  const float *q_scale;
  int32_t kv_type;               /* enum pyllm_kv_type */
  const void *k[KV_STRIPS];      /* (n_strips) keys of 16 tokens, (head_dim / 2, 16, 2): see cpu.h */
  const void *v[KV_STRIPS];      /* (n_strips) their values, (head_dim / 16, 8, 16, 2) */
  const void *next_k[KV_STRIPS]; /* (n_strips) what will be read after these; NULL where nothing is */
  const int32_t *n_valid;        /* (rows) keys the row may see, 0..16 n_strips, counted from the first */
  float *scores;                 /* scratch (rows, 64) */
  float *alpha;                  /* scratch (rows) */
  softmax_state *state;          /* (rows) continued */
  float *out;                    /* (rows, head_dim) continued; NULL for the softmax state alone */
} attend_args;

typedef struct kernels {
  const char *name;
  bool words; /* how `quantized` holds four columns of 16 bits */

  /* out[r, j] = alpha ? alpha[r] * out[r, j] + dot : dot, with dot = sum_i a[r, i] * b[i, j], j < 16. */
  void (*strip_gemm)(int32_t rows, const float *a, int64_t lda, const strips *b, const float *alpha, float *out,
                     int64_t ldo);
  /* out[t, j] = (add ? out[t, j] : 0) + bias[j] + dot of token t with row j of the tiles, j < n_rows <= 32; above
   * 16 two neighbouring tiles. bias may
   * be NULL. x holds n_tokens rows of cols columns; cols % 32 == 0, for scaled formats cols % 256 == 0. Its bits are 16
   * unless takes_bytes(format). */
  void (*tile_gemm)(const tile_format *format, const void *tile, int32_t cols, const quantized *x, int32_t n_tokens,
                    const float *bias, int32_t n_rows, bool add, float *out, int64_t ldo);
  /* Queries (n, head_dim) as scale (n) times words. */
  void (*round_queries)(const float *q, int32_t n, int32_t head_dim, int16_t *words, float *scale);
  /* Online softmax: state and out take in the strips' keys and values. */
  void (*attend_strips)(const attend_args *args);

  /* The key sketch of a page (sketch.h). fold: from a KV block's keys; channels (head_dim), the order of a graded
   * one, NULL of others. sums (n, 4), row r at sums + r * ld: of e^(score - local_mass) over the 16 tokens of each
   * strip, to four digits beside the estimated scores. Queries q (n, head_dim) are scaled by the score scale and in
   * the order of the sketch's channels; local_mass (n): logsumexp of what each reads anyway. What is over it by more
   * than 69 counts as that, so that all sums together are finite, and what is under it by more than 83 as that. */
  void (*sketch_fold)(const uint16_t *keys, int32_t page_bits, int32_t head_dim, const uint16_t *channels,
                      uint8_t *page);
  void (*sketch_sums)(const uint8_t *page, int32_t page_bits, int32_t head_dim, const float *q, const float *local_mass,
                      int32_t n, float *sums, int64_t ld);
  /* Makes of the sums of a query's whole bulk (n_strips, a multiple of 4) each strip's part of all attention;
   * returns that, what the query reads anyway being 1. */
  float (*strip_shares)(float *sums, int32_t n_strips);

  /* y = x / sqrt(mean(x^2) + eps) * w; x, y, w: (n). y may be x. */
  void (*rms_norm)(const float *x, const float *w, float eps, int32_t n, float *y);
  /* x (cols) as the first row of out, in out's bits; cols % 32 == 0. */
  void (*quantize)(const float *x, int32_t cols, const quantized *out);
  /* y = silu(gate) * up; (n), n % 16 == 0. */
  void (*swiglu)(const float *gate, const float *up, int32_t n, float *y);
  /* Rotates the first n_rot values of a head in place; cosine, sine: (n_rot / 2). pairs: (x[2i], x[2i+1]), otherwise
   * (x[i], x[i + n_rot/2]). */
  void (*rope)(float *x, const float *cosine, const float *sine, int32_t n_rot, bool pairs);
  /* Rounds one key and one value (head_dim) and puts them into token `slot` of a KV block (cpu.h, geometry.h). A key
   * that cannot be held is NaN, and among bytes that of such a value. */
  void (*kv_store)(int32_t kv_type, const float *k, const float *v, int32_t head_dim, int32_t slot, void *block);
  /* The halves (2, 64 head_dim) of a KV block of bytes. */
  void (*kv_halves)(const void *block, int32_t head_dim, uint16_t *halves);
  float (*dot)(const float *x, const float *y, int32_t n);
} kernels;

/* Bytes of a tile of 16 rows, and of the scales it begins with (a multiple of 64). */
size_t tile_scale_bytes(const tile_format *format, int32_t cols);
size_t tile_bytes(const tile_format *format, int32_t cols);

/* The named instruction set, as pyllm_model_params has it, or the best one for NULL; NULL where this build or this
 * processor lacks it. */
const kernels *kernels_find(const char *isa);
/* "generic, avx2": what this processor can run, for messages. */
const char *kernels_available(void);

#endif
