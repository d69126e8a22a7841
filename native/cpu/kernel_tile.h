/* Quantized matrix kernel: a few tokens against one tile of 16 weight rows. Part of kernels.c.
 *
 * Per group of 32 columns the products are summed exactly in 32-bit integers, one lane per weight row, and then
 * scaled: out += x.scale * d * scale * sum((q - offset) * xq) + x.scale * m * min * sum(xq). */
#include "kernels.h"
#include "vec.h"

enum { TILE_VECS = TILE_ROWS / VL };

/* Tokens of one tile at once, and of two tiles: with VNNI each fills 24 of 32 registers with accumulators, but a pair
 * needs 10 loads for 16 products where a single tile needs 17. Without it products are many instructions and loads no
 * matter; elsewhere registers are too few for pairs. */
#if defined(__AVX512VNNI__)
#define PAIRS 1
enum { TILE_TOKENS = 8, PAIR_TOKENS = 4 };
#elif VL == 16
#define PAIRS 0
enum { TILE_TOKENS = 4 };
#elif VL == 8
#define PAIRS 0
enum { TILE_TOKENS = 2 };
#else
#define PAIRS 0
enum { TILE_TOKENS = 1 };
#endif

/* Scales and minima of the tile's 16 rows in one group of 32 columns; two of each where the group is 16. */
typedef struct group_scales {
  vf scale[2][TILE_VECS], min[2][TILE_VECS];
} group_scales;

static inline __attribute__((always_inline)) void load_scales(tile_format f, const uint8_t *scales, int32_t group,
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

/* 4 columns of all 16 rows as bytes; i < 8 counts fours of columns in the group. */
static inline __attribute__((always_inline)) void load_quants(tile_format f, const uint8_t *group, int i,
                                                              uint8_t out[4 * TILE_ROWS]) {
  typedef uint8_t bytes __attribute__((vector_size(4 * TILE_ROWS)));
  bytes b, above;
  memcpy(&b, group + (f.bits < 8 ? i % 4 : i) * 4 * TILE_ROWS, sizeof b);
  if (f.bits < 8) b = i < 4 ? b & 15 : b >> 4;
  if (f.bits == 5 || f.bits == 6) {
    memcpy(&above, group + (f.bits == 6 ? 4 + i / 4 : 4) * 4 * TILE_ROWS, sizeof above);
    int at = f.bits == 6 ? i % 4 * 2 : i;
    b |= (at > 4 ? above >> (at - 4) : above << (4 - at)) & (uint8_t)(f.bits == 6 ? 0x30 : 0x10);
  }
  memcpy(out, &b, sizeof b);
}

/* One or two neighbouring tiles. */
typedef struct tile_pair {
  const uint8_t *scales[2], *quants[2];
} tile_pair;

static inline __attribute__((always_inline)) void tile_tokens(int tiles, int tokens, tile_format f, const tile_pair *w,
                                                              int32_t cols, const quantized *x, int32_t t0,
                                                              vf total[2][TILE_TOKENS][TILE_VECS]) {
  int halves = f.group == 16 ? 2 : 1;
  int32_t group_bytes = ACT_GROUP * TILE_ROWS * f.bits / 8;
  for (int k = 0; k < tiles; k++)
    for (int t = 0; t < tokens; t++)
      for (int v = 0; v < TILE_VECS; v++) total[k][t][v] = vset(0);
  for (int32_t g = 0; g < cols / ACT_GROUP; g++) {
    group_scales s[2];
    for (int k = 0; k < tiles; k++) load_scales(f, w->scales[k], g, &s[k]);
    if (tiles == 1 && tokens == 1) /* decode waits for memory */
      for (int line = 0; line < group_bytes; line += 64)
        __builtin_prefetch(w->quants[0] + (int64_t)g * group_bytes + line + 6144);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      if (h >= halves) continue;
      vi low[2][TILE_TOKENS][TILE_VECS], high[2][TILE_TOKENS][TILE_VECS];
      for (int t = 0; t < tokens; t++) {
        const int32_t *sum = x->sum + (int64_t)(t0 + t) * (cols / ACT_HALF) + 2 * g;
        vi start = viset(-f.offset * (halves == 2 ? sum[h] : sum[0] + sum[1]));
        for (int k = 0; k < tiles; k++)
          for (int v = 0; v < TILE_VECS; v++) {
            low[k][t][v] = start;
            high[k][t][v] = viset(0);
          }
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        if (halves == 2 && i / 4 != h) continue;
        uint8_t q[2][4 * TILE_ROWS];
        for (int k = 0; k < tiles; k++) load_quants(f, w->quants[k] + (int64_t)g * group_bytes, i, q[k]);
        for (int t = 0; t < tokens; t++) {
          const int8_t *four = x->planes + ((int64_t)(t0 + t) * cols + g * ACT_GROUP + 4 * i) * 2;
          for (int k = 0; k < tiles; k++)
            for (int v = 0; v < TILE_VECS; v++) {
              high[k][t][v] = vdot4(high[k][t][v], q[k] + 4 * VL * v, four, f.bits);
              low[k][t][v] = vdot4(low[k][t][v], q[k] + 4 * VL * v, four + 4, f.bits);
            }
        }
      }
      for (int t = 0; t < tokens; t++) {
        vf scale = vset(x->scale[(int64_t)(t0 + t) * (cols / ACT_GROUP) + g]);
        const float *product = x->product + (int64_t)(t0 + t) * (cols / ACT_HALF) + 2 * g;
        vf sum = vset(halves == 2 ? product[h] : product[0] + product[1]);
        for (int k = 0; k < tiles; k++)
          for (int v = 0; v < TILE_VECS; v++) {
            vi q = (high[k][t][v] << 8) + low[k][t][v]; /* below 2^29 */
            total[k][t][v] += __builtin_convertvector(q, vf) * (s[k].scale[h][v] * scale);
            if (f.has_min) total[k][t][v] += s[k].min[h][v] * sum;
          }
      }
    }
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
  float result[TILE_ROWS];
  for (int v = 0; v < TILE_VECS; v++) vstore(result + v * VL, total[v]);
  int32_t first = tile * TILE_ROWS, n = to->n_rows - first < TILE_ROWS ? to->n_rows - first : TILE_ROWS;
  float *o = to->out + t * to->ld + first;
  const float *bias = to->bias ? to->bias + first : NULL;
  for (int32_t j = 0; j < n; j++) o[j] = (to->add ? o[j] : 0.0f) + result[j] + (bias ? bias[j] : 0.0f);
}

/* As many tokens as go in steps of `step`, from t on; returns the first that is left. */
static inline __attribute__((always_inline)) int32_t tile_steps(int tiles, int step, tile_format f, const tile_pair *w,
                                                                int32_t cols, const quantized *x, int32_t t,
                                                                int32_t n_tokens, const tile_output *to) {
  vf total[2][TILE_TOKENS][TILE_VECS];
  for (; t + step <= n_tokens; t += step) {
    tile_tokens(tiles, step, f, w, cols, x, t, total);
    for (int k = 0; k < tiles; k++)
      for (int i = 0; i < step; i++) tile_store(to, k, t + i, total[k][i]);
  }
  return t;
}

static inline __attribute__((always_inline)) void tile_gemm_format(tile_format f, const void *tiles, int32_t cols,
                                                                   const quantized *x, int32_t n_tokens,
                                                                   const tile_output *to) {
  size_t scale_bytes = tile_scale_bytes(&f, cols), bytes = tile_bytes(&f, cols);
  const uint8_t *first = tiles, *second = first + bytes;
  tile_pair w = {{first, second}, {first + scale_bytes, second + scale_bytes}};
  int32_t t = 0;
#if PAIRS
  if (to->n_rows > TILE_ROWS) {
    t = tile_steps(2, PAIR_TOKENS, f, &w, cols, x, t, n_tokens, to);
    tile_steps(2, 1, f, &w, cols, x, t, n_tokens, to);
    return;
  }
#endif
  for (int32_t done = 0; done < to->n_rows; done += TILE_ROWS, w = (tile_pair){{second}, {second + scale_bytes}}) {
    tile_output part = {to->bias ? to->bias + done : NULL, to->n_rows - done, to->add, to->out + done, to->ld};
    if (part.n_rows > TILE_ROWS) part.n_rows = TILE_ROWS;
    t = tile_steps(1, TILE_TOKENS, f, &w, cols, x, 0, n_tokens, &part);
    tile_steps(1, 1, f, &w, cols, x, t, n_tokens, &part);
  }
}

/* One specialized instance per combination that a weight format has; kept apart, or the compiler merges them and with
 * them the constants. */
#define FORMATS(instance)                                                                                              \
  instance(q4_0, 4, 32, false, false)      /* Q4_0 */                                                                  \
      instance(q4_1, 4, 32, false, true)   /* Q4_1 */                                                                  \
      instance(q5_0, 5, 32, false, false)  /* Q5_0 */                                                                  \
      instance(q5_1, 5, 32, false, true)   /* Q5_1 */                                                                  \
      instance(q8_0, 8, 32, false, false)  /* Q8_0, IQ4_NL */                                                          \
      instance(q4_k, 4, 32, true, true)    /* Q4_K */                                                                  \
      instance(q5_k, 5, 32, true, true)    /* Q5_K */                                                                  \
      instance(iq4_xs, 8, 32, true, false) /* IQ4_XS */                                                                \
      instance(q2_k, 4, 16, true, true)    /* Q2_K */                                                                  \
      instance(q3_k, 4, 16, true, false)   /* Q3_K */                                                                  \
      instance(q6_k, 6, 16, true, false)   /* Q6_K */

#define DEFINE(name, b, g, s, m)                                                                                       \
  static __attribute__((noinline)) void tile_gemm_##name(const tile_format *f, const void *tile, int32_t cols,         \
                                                         const quantized *x, int32_t n, const tile_output *to) {       \
    tile_gemm_format((tile_format){b, g, f->offset, s, m}, tile, cols, x, n, to);                                      \
  }
FORMATS(DEFINE)
#undef DEFINE

static void tile_gemm(const tile_format *f, const void *tile, int32_t cols, const quantized *x, int32_t n_tokens,
                      const float *bias, int32_t n_rows, bool add, float *out, int64_t ldo) {
  tile_output to = {bias, n_rows, add, out, ldo};
#define CALL(name, b, g, s, m)                                                                                         \
  if (f->bits == b && f->group == g && f->scaled == s && f->has_min == m)                                              \
    tile_gemm_##name(f, tile, cols, x, n_tokens, &to);
  FORMATS(CALL)
#undef CALL
}
#undef FORMATS
