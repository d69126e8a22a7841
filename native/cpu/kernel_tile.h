/* Quantized matrix kernel: tokens against tiles of 16 weight rows, one lane per row. Part of kernels.c.
 *
 * Per group of 32 columns, or of 16 where weights or activations have a scale for each of these, the products are summed
 * exactly in integers, and then scaled:
 * out += x.scale * d * scale * sum((q - offset) * xq) + x.scale * m * min * sum(xq).
 * For many tokens the quants of some columns are unpacked once, into a slab that stays in the first-level cache. What
 * an output accumulates, and in which order, is the same with and without. */
#include "kernels.h"
#include "vec.h"

enum {
  TILE_VECS = TILE_ROWS / VL,
  SLAB_GROUPS = 8, /* of 32 columns */
  SLAB_ROWS = 128, /* tokens that share a slab */
  SLAB_FROM = 4    /* tokens from which unpacking first is worth it */
};

/* What quants are multiplied as with activations of 16 bits: with VNNI bytes, with either plane apart; otherwise words,
 * with whole activations. And how many tiles and tokens at once: each pair of them holds its sums in registers. */
#if defined(__AVX512VNNI__)
enum { TILE_WORDS = 0, SLAB_TILES = 2, SLAB_TOKENS = 4 };
#elif VL == 16
enum { TILE_WORDS = 1, SLAB_TILES = 2, SLAB_TOKENS = 6 };
#elif VL == 8
enum { TILE_WORDS = 1, SLAB_TILES = 1, SLAB_TOKENS = 4 };
#else
enum { TILE_WORDS = 1, SLAB_TILES = 1, SLAB_TOKENS = 1 };
#endif

enum { TILE_SUMS = TILE_WORDS ? 1 : 2, VEC_BYTES = 4 * VL, FOUR_BYTES = (TILE_WORDS ? 2 : 1) * 4 * TILE_ROWS };

/* A weight format (kernels.h) with activations of x_bits, 16 or 8: the constants of an instance. */
typedef struct tile_product {
  int32_t bits, group, offset;
  bool scaled, has_min;
  int32_t x_bits;
} tile_product;

/* Whether quants are unpacked to words. */
static inline bool in_words(tile_product f) { return f.x_bits == 8 ? VL == 4 : TILE_WORDS; }

/* Sums that a group of 32 columns has: one where weights and activations have one scale each. */
static inline int sums_of_group(tile_product f) { return f.group == 16 || act_group(f.x_bits) == ACT_HALF ? 2 : 1; }

/* 4 columns of all 16 rows: per vector of rows their bytes, or the words of columns 0 and 2 and then of 1 and 3. */
typedef uint8_t four_columns[FOUR_BYTES];

/* Scales and minima of the tile's 16 rows in one group of 32 columns; two of each where the group is 16. */
typedef struct group_scales {
  vf scale[2][TILE_VECS], min[2][TILE_VECS];
} group_scales;

static inline __attribute__((always_inline)) void load_scales(tile_product f, const uint8_t *scales, int32_t group,
                                                              group_scales *out) {
  int halves = f.group == 16 ? 2 : 1;
  int minimum = f.has_min ? 2 : 1;
  if (!f.scaled) {
    const uint16_t *d = (const uint16_t *)(const void *)scales + (int64_t)group * TILE_ROWS * minimum;
    for (int v = 0; v < TILE_VECS; v++) {
      out->scale[0][v] = vload_f16(d + v * VL);
      if (f.has_min) out->min[0][v] = vload_f16(d + TILE_ROWS + v * VL);
    }
    return;
  }
  int n = 256 / f.group;
  const uint8_t *block = scales + (int64_t)(group / 8) * (2 * TILE_ROWS + n * TILE_ROWS) * minimum;
  const uint16_t *d = (const uint16_t *)(const void *)block;
  const int8_t *scale = (const int8_t *)(d + TILE_ROWS * minimum);
  const uint8_t *min = (const uint8_t *)scale + n * TILE_ROWS;
  for (int h = 0; h < halves; h++) {
    int row = (group % 8 * halves + h) * TILE_ROWS;
    for (int v = 0; v < TILE_VECS; v++) {
      out->scale[h][v] = vload_f16(d + v * VL) * __builtin_convertvector(vload_i8(scale + row + v * VL), vf);
      if (f.has_min)
        out->min[h][v] = vload_f16(d + TILE_ROWS + v * VL) * __builtin_convertvector(vload_u8(min + row + v * VL), vf);
    }
  }
}

/* Quants of columns 4 i to 4 i + 3, i < 8, of VL rows from byte `at` on: of the bytes that `ones` has a 1 for, moved
 * down by `by` bits. */
static inline __attribute__((always_inline)) vwords unpack(tile_product f, const uint8_t *group, int i, int at, int by,
                                                           uint16_t ones) {
  vwords w = (vwords)vload_bytes(group + (f.bits < 8 ? i % 4 : i) * 4 * TILE_ROWS + at);
  if (f.bits == 8) return w >> by & (uint16_t)(255 * ones);
  vwords q = w >> ((i < 4 ? 0 : 4) + by) & (uint16_t)(15 * ones);
  if (f.bits == 4) return q;
  vwords above = (vwords)vload_bytes(group + (f.bits == 6 ? 4 + i / 4 : 4) * 4 * TILE_ROWS + at);
  int down = (f.bits == 6 ? i % 4 * 2 : i) - 4 + by;
  return q | ((down > 0 ? above >> down : above << -down) & (uint16_t)((f.bits == 6 ? 0x30 : 0x10) * ones));
}

static inline __attribute__((always_inline)) void load_quants(tile_product f, const uint8_t *group, int i,
                                                              four_columns out) {
  for (int v = 0; v < TILE_VECS; v++) {
    int at = VEC_BYTES * v;
    if (in_words(f)) {
      vwords even = unpack(f, group, i, at, 0, 0x0001), odd = unpack(f, group, i, at, 8, 0x0001);
      memcpy(out + 2 * at, &even, sizeof even);
      memcpy(out + 2 * at + VEC_BYTES, &odd, sizeof odd);
    } else {
      vwords both = unpack(f, group, i, at, 0, 0x0101);
      memcpy(out + at, &both, sizeof both);
    }
  }
}

/* Four columns are multiplied in this many steps: either half of them in words, either plane in bytes, or at once. */
static inline int steps_of_four(tile_product f) { return f.x_bits == 8 && !in_words(f) ? 1 : 2; }

/* Which of the sums has the offset's part: the only one, or that of the low plane. */
static inline int sum_that_starts(tile_product f) { return f.x_bits == 8 ? 0 : TILE_SUMS - 1; }

/* What step p multiplies of one vector of rows, and of a token's activations. */
static inline vbytes step_of_quants(tile_product f, const uint8_t *four, int v, int p) {
  return vload_bytes(four + VEC_BYTES * (in_words(f) ? 2 * v + p : v));
}

static inline int32_t step_of_token(tile_product f, const int8_t *four, int p) {
  if (f.x_bits == 8 && in_words(f)) return (int32_t)((uint16_t)four[p] | (uint32_t)four[p + 2] << 16);
  int32_t step;
  memcpy(&step, four + 4 * p, sizeof step);
  return step;
}

/* Two neighbouring tiles; the same one twice where there is one. */
typedef struct tile_pair {
  const uint8_t *scales[2], *quants[2];
  size_t bytes; /* of one */
} tile_pair;

/* Some columns of neighbouring tiles, unpacked. */
typedef struct slab {
  four_columns quants[SLAB_GROUPS][8][SLAB_TILES];
  group_scales scales[SLAB_GROUPS][SLAB_TILES];
} slab;

/* Activations of some tokens from a slab's first column on. */
typedef struct slab_rows {
  quantized x;  /* of the first token */
  int32_t cols; /* of a whole token */
} slab_rows;

typedef vi tile_sums[TILE_SUMS][SLAB_TOKENS][SLAB_TILES][TILE_VECS]; /* whole, or with the high and the low plane */
typedef vf tile_totals[SLAB_TILES][TILE_VECS];                       /* of one token */

/* What the sum of half a group's products of one token, or of both halves', begins with: the offset's part. sums: (2) of
 * the group's activations. */
static inline __attribute__((always_inline)) vi start_of_sum(tile_product f, const int32_t *sums, int half) {
  if (f.has_min) return viset(0);
  if (f.x_bits == 8) return dot_start(sums[half], f.offset);
  return viset(-f.offset * (sums_of_group(f) == 2 ? sums[half] : sums[0] + sums[1]));
}

/* Sums of the products of n fours of columns with the activations, from `start` (tokens) on. quants: (n, SLAB_TILES). x:
 * of the first token. */
static inline __attribute__((always_inline)) void sum_products(int tiles, int tokens, tile_product f, int n,
                                                               const four_columns (*quants)[SLAB_TILES],
                                                               const int8_t *x, int64_t row_bytes, const vi *start,
                                                               tile_sums sum) {
  const int8_t *token[SLAB_TOKENS];
  for (int t = 0; t < tokens; t++) {
    token[t] = x + t * row_bytes;
    KEEP_POINTER(token[t]);
  }
  for (int p = 0; p < TILE_SUMS; p++)
    for (int t = 0; t < tokens; t++)
      for (int k = 0; k < tiles; k++)
        for (int v = 0; v < TILE_VECS; v++) sum[p][t][k][v] = p == sum_that_starts(f) ? start[t] : viset(0);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++)
    for (int p = 0; p < steps_of_four(f); p++) {
      vbytes w[SLAB_TILES][TILE_VECS];
      for (int k = 0; k < tiles; k++)
        for (int v = 0; v < TILE_VECS; v++) w[k][v] = step_of_quants(f, quants[i][k], v, p);
      for (int t = 0; t < tokens; t++) {
        int32_t step = step_of_token(f, token[t] + i * f.x_bits / 2, p);
        for (int k = 0; k < tiles; k++)
          for (int v = 0; v < TILE_VECS; v++) {
            vi *to = &sum[p % TILE_SUMS][t][k][v];
            *to = in_words(f) ? dot_words(*to, w[k][v], step) : dot_bytes(*to, w[k][v], step);
          }
      }
    }
}

/* Token t's whole sum of rows v of tile k: below 2^29. */
static inline __attribute__((always_inline)) vi whole_sum(tile_product f, tile_sums sum, int t, int k, int v) {
  if (in_words(f)) return sum[0][t][k][v];
  return f.x_bits == 8 ? dot_sum(sum[0][t][k][v]) : (sum[0][t][k][v] << 8) + sum[1 % TILE_SUMS][t][k][v];
}

/* Adds group g of the activations times its quants, or half of both, to the tokens' totals. */
static inline __attribute__((always_inline)) void add_group(int tiles, int tokens, tile_product f, int32_t g, int half,
                                                            const four_columns (*quants)[SLAB_TILES],
                                                            const group_scales *s, const slab_rows *r,
                                                            tile_totals *total) {
  int halves = sums_of_group(f), n = 8 / halves, x_group = act_group(f.x_bits);
  int own = f.group == 16 ? half : 0; /* whose scales and minima the weights have */
  int64_t column = (int64_t)g * ACT_GROUP + half * ACT_HALF, bytes = f.x_bits / 8;
  vi start[SLAB_TOKENS];
  for (int t = 0; t < tokens; t++)
    start[t] = start_of_sum(f, r->x.sum + (int64_t)t * (r->cols / ACT_HALF) + 2 * g, half);
  tile_sums sum;
  sum_products(tiles, tokens, f, n, quants + half * n, r->x.planes + column * bytes, r->cols * bytes, start, sum);
  for (int t = 0; t < tokens; t++) {
    const float *product = r->x.product + (int64_t)t * (r->cols / ACT_HALF) + 2 * g;
    vf minimum = vset(f.group == 16 ? product[half] : r->x.both[(int64_t)t * (r->cols / ACT_GROUP) + g]);
    vf scale = vset(r->x.scale[(int64_t)t * (r->cols / x_group) + column / x_group]);
    for (int k = 0; k < tiles; k++)
      for (int v = 0; v < TILE_VECS; v++) {
        vi q = whole_sum(f, sum, t, k, v);
        total[t][k][v] += __builtin_convertvector(q, vf) * (s[k].scale[own][v] * scale);
        if (f.has_min && own == half) total[t][k][v] += s[k].min[own][v] * minimum; /* where it is both halves', once */
      }
  }
}

static inline __attribute__((always_inline)) void slab_tokens(int tokens, tile_product f, const slab *w,
                                                              int32_t n_groups, const slab_rows *r, tile_totals *out) {
  tile_totals total[SLAB_TOKENS];
  memcpy(total, out, (size_t)tokens * sizeof *total);
  for (int32_t g = 0; g < n_groups; g++)
#pragma GCC unroll 2
    for (int half = 0; half < sums_of_group(f); half++)
      add_group(SLAB_TILES, tokens, f, g, half, w->quants[g], w->scales[g], r, total);
  memcpy(out, total, (size_t)tokens * sizeof *total);
}

/* The tokens after the first t. */
static inline slab_rows rows_after(const slab_rows *r, int32_t t) {
  return (slab_rows){quantized_after(&r->x, r->cols, t), r->cols};
}

/* The activations from group g on. */
static inline slab_rows rows_from_group(const slab_rows *r, int32_t g) {
  return (slab_rows){quantized_after(&r->x, ACT_GROUP, g), r->cols};
}

static inline __attribute__((always_inline)) void slab_products(tile_product f, const slab *w, int32_t n_groups,
                                                                const slab_rows *r, int32_t n, tile_totals *total) {
  int32_t t = 0;
  for (; t + SLAB_TOKENS <= n; t += SLAB_TOKENS) {
    slab_rows x = rows_after(r, t);
    slab_tokens(SLAB_TOKENS, f, w, n_groups, &x, total + t);
  }
  for (; t < n; t++) {
    slab_rows x = rows_after(r, t);
    slab_tokens(1, f, w, n_groups, &x, total + t);
  }
}

typedef struct tile_output {
  const float *bias;
  int32_t n_rows;
  bool add;
  float *out;
  int64_t ld;
} tile_output;

/* Row `tile` of 16 outputs of token t. */
static inline void tile_store(const tile_output *to, int tile, int32_t t, const vf total[TILE_VECS]) {
  int32_t first = tile * TILE_ROWS;
  float *o = to->out + t * to->ld + first;
  const float *bias = to->bias ? to->bias + first : NULL;
  if (to->n_rows - first >= TILE_ROWS) {
    for (int v = 0; v < TILE_VECS; v++) {
      vf y = to->add ? vload(o + v * VL) + total[v] : total[v];
      vstore(o + v * VL, bias ? y + vload(bias + v * VL) : y);
    }
    return;
  }
  float result[TILE_ROWS];
  for (int v = 0; v < TILE_VECS; v++) vstore(result + v * VL, total[v]);
  for (int32_t j = 0; j < to->n_rows - first; j++) o[j] = (to->add ? o[j] : 0.0f) + result[j] + (bias ? bias[j] : 0.0f);
}

static inline __attribute__((always_inline)) void fill_slab(tile_product f, const tile_pair *from, int first_tile,
                                                            int32_t first, int32_t n_groups, slab *out) {
  for (int k = 0; k < SLAB_TILES; k++)
    for (int32_t g = 0; g < n_groups; g++) {
      load_scales(f, from->scales[first_tile + k], first + g, &out->scales[g][k]);
      const uint8_t *group = from->quants[first_tile + k] + (int64_t)(first + g) * ACT_GROUP * TILE_ROWS * f.bits / 8;
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) load_quants(f, group, i, out->quants[g][i][k]);
    }
}

static inline __attribute__((always_inline)) void tiles_by_slab(tile_product f, const tile_pair *from, int first_tile,
                                                                const slab_rows *r, int32_t n, const tile_output *to) {
  slab w;
  tile_totals total[SLAB_ROWS];
  int n_tiles = to->n_rows > (first_tile + 1) * TILE_ROWS ? SLAB_TILES : 1;
  for (int32_t t0 = 0; t0 < n; t0 += SLAB_ROWS) {
    int32_t rows = n - t0 < SLAB_ROWS ? n - t0 : SLAB_ROWS, groups = r->cols / ACT_GROUP;
    slab_rows block = rows_after(r, t0);
    memset(total, 0, (size_t)rows * sizeof *total);
    for (int32_t g = 0; g < groups; g += SLAB_GROUPS) {
      int32_t n_groups = groups - g < SLAB_GROUPS ? groups - g : SLAB_GROUPS;
      slab_rows x = rows_from_group(&block, g);
      fill_slab(f, from, first_tile, g, n_groups, &w);
      slab_products(f, &w, n_groups, &x, rows, total);
    }
    for (int32_t t = 0; t < rows; t++)
      for (int k = 0; k < n_tiles; k++) tile_store(to, first_tile + k, t0 + t, total[t][k]);
  }
}

/* One tile, one token. Decode waits for memory: while a group is multiplied, the same of the next tile is asked for,
 * into the second-level cache, whose misses the few buffers of the first do not limit. */
static inline __attribute__((always_inline)) void tile_directly(tile_product f, const tile_pair *from, int tile,
                                                                const slab_rows *r, vf out[TILE_VECS]) {
  tile_totals total;
  int32_t group_bytes = ACT_GROUP * TILE_ROWS * f.bits / 8;
  int64_t scale_bytes = (from->quants[tile] - from->scales[tile]) / (r->cols / ACT_GROUP); /* of a group, at most 72 */
  for (int v = 0; v < TILE_VECS; v++) total[0][v] = vset(0);
  for (int32_t g = 0; g < r->cols / ACT_GROUP; g++) {
    const uint8_t *group = from->quants[tile] + (int64_t)g * group_bytes;
    for (int line = 0; line < group_bytes; line += 64) __builtin_prefetch(group + from->bytes + line, 0, 1);
    __builtin_prefetch(from->scales[tile] + from->bytes + g * scale_bytes, 0, 1);
    group_scales s;
    four_columns quants[8][SLAB_TILES];
    load_scales(f, from->scales[tile], g, &s);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) load_quants(f, group, i, quants[i][0]);
    for (int half = 0; half < sums_of_group(f); half++)
      add_group(1, 1, f, g, half, (const four_columns(*)[SLAB_TILES])quants, &s, r, &total);
  }
  memcpy(out, total[0], sizeof total[0]);
}

static inline __attribute__((always_inline)) void
tile_gemm_format(tile_product f, const tile_pair *w, const slab_rows *x, int32_t n_tokens, const tile_output *to) {
  int n_tiles = to->n_rows > TILE_ROWS ? 2 : 1;
  if (n_tokens >= SLAB_FROM) {
    for (int k = 0; k < n_tiles; k += SLAB_TILES) tiles_by_slab(f, w, k, x, n_tokens, to);
    return;
  }
  for (int k = 0; k < n_tiles; k++)
    for (int32_t t = 0; t < n_tokens; t++) {
      vf total[TILE_VECS];
      slab_rows one = rows_after(x, t);
      tile_directly(f, w, k, &one, total);
      tile_store(to, k, t, total);
    }
}

/* One specialized instance per combination that a weight format has; kept apart, or the compiler merges them and with
 * them the constants; and no instance takes its format's address, or the constants are read from there. Formats of up
 * to 6 bits have one more, for activations of 8. */
#define NARROW_FORMATS(instance)                                                                                       \
  instance(q4_0, 4, 32, false, false)     /* Q4_0 */                                                                   \
      instance(q4_1, 4, 32, false, true)  /* Q4_1 */                                                                   \
      instance(q5_0, 5, 32, false, false) /* Q5_0 */                                                                   \
      instance(q5_1, 5, 32, false, true)  /* Q5_1 */                                                                   \
      instance(q4_k, 4, 32, true, true)   /* Q4_K */                                                                   \
      instance(q5_k, 5, 32, true, true)   /* Q5_K */                                                                   \
      instance(q2_k, 4, 16, true, true)   /* Q2_K */                                                                   \
      instance(q3_k, 4, 16, true, false)  /* Q3_K */                                                                   \
      instance(q6_k, 6, 16, true, false)  /* Q6_K */
#define WIDE_FORMATS(instance)                                                                                         \
  instance(q8_0, 8, 32, false, false)      /* Q8_0, IQ4_NL */                                                          \
      instance(iq4_xs, 8, 32, true, false) /* IQ4_XS */

#define INSTANCE(name, b, g, s, m, x_bits)                                                                             \
  static __attribute__((noinline)) void name(int32_t offset, const tile_pair *w, const slab_rows *x, int32_t n,        \
                                             const tile_output *to) {                                                  \
    tile_gemm_format((tile_product){b, g, offset, s, m, x_bits}, w, x, n, to);                                         \
  }
#define DEFINE(name, b, g, s, m) INSTANCE(tile_gemm_##name, b, g, s, m, 16)
#define DEFINE_NARROW(name, b, g, s, m) INSTANCE(tile_gemm_narrow_##name, b, g, s, m, 8)
NARROW_FORMATS(DEFINE)
NARROW_FORMATS(DEFINE_NARROW)
WIDE_FORMATS(DEFINE)
#undef DEFINE
#undef DEFINE_NARROW
#undef INSTANCE

static void tile_gemm(const tile_format *f, const void *tile, int32_t cols, const quantized *x, int32_t n_tokens,
                      const float *bias, int32_t n_rows, bool add, float *out, int64_t ldo) {
  tile_output to = {bias, n_rows, add, out, ldo};
  size_t bytes = tile_bytes(f, cols), scale_bytes = tile_scale_bytes(f, cols);
  const uint8_t *first = tile, *second = first + (n_rows > TILE_ROWS ? bytes : 0);
  tile_pair w = {{first, second}, {first + scale_bytes, second + scale_bytes}, bytes};
  slab_rows rows = {*x, cols};
#define CALL(instance, b, g, s, m)                                                                                     \
  if (f->bits == b && f->group == g && f->scaled == s && f->has_min == m) instance(f->offset, &w, &rows, n_tokens, &to);
#define CALL_WIDE(name, b, g, s, m) CALL(tile_gemm_##name, b, g, s, m)
#define CALL_NARROW(name, b, g, s, m) CALL(tile_gemm_narrow_##name, b, g, s, m)
  if (x->bits == 8) {
    NARROW_FORMATS(CALL_NARROW)
    return;
  }
  NARROW_FORMATS(CALL_WIDE)
  WIDE_FORMATS(CALL_WIDE)
#undef CALL
#undef CALL_WIDE
#undef CALL_NARROW
}
#undef NARROW_FORMATS
#undef WIDE_FORMATS
