/* Entry points of the tests into what the library does not export; cffi parses this text after pyllm.h, so
 * there are only guards and plain C declarations. Where a function returns a status, a type number that the
 * library does not read is PYLLM_ERR_UNSUPPORTED. */
#ifndef PYLLM_TESTS_HOOKS_H
#define PYLLM_TESTS_HOOKS_H
#include "pyllm.h"

#pragma GCC visibility push(default)

/* ---- quant.h ---- */

/* The fields of quant_type, unpack apart; name lives as long as the library. */
typedef struct hook_quant_traits {
  const char *name;
  int32_t block, bytes, bits, group, offset;
  int32_t has_min, scaled; /* 0 or 1 */
} hook_quant_traits;
int32_t hook_quant_type(int32_t type, hook_quant_traits *out);
const char *hook_quant_supported(void);

/* One block as quant_block has it. d_m: (2), scale: (16), min: (16), q: (256); only the entries the type uses
 * are written. PYLLM_ERR_ARGUMENT for F32, F16 and BF16, which have no blocks. */
int32_t hook_unpack(int32_t type, const void *block, uint16_t *d_m, int16_t *scale, uint8_t *min, uint8_t *q);

/* data: n values in the type's blocks, any alignment; out: (n). PYLLM_ERR_ARGUMENT unless n is a multiple of
 * the block. */
int32_t hook_dequantize(int32_t type, const void *data, float *out, int64_t n);

/* x and out: (n). Halves as their bits. */
void hook_f16_to_f32(const uint16_t *x, float *out, int64_t n);
void hook_bf16_to_f32(const uint16_t *x, float *out, int64_t n);
void hook_f32_to_f16(const float *x, uint16_t *out, int64_t n);

/* ---- cpu/threads.h ---- */

/* Runs n_jobs jobs of n_items[j] items in pieces of grain[j], one after the other, and adds up how often each item
 * was done: done (all jobs' items). PYLLM_ERR_NUMERIC where a piece was too large or out of range, or came to a thread
 * that was at another. */
int32_t hook_pool(int32_t n_threads, const int32_t *n_items, const int32_t *grain, int32_t n_jobs, int32_t *done,
                  pyllm_error *err);

/* ---- stages of any backend: device as in pyllm_model_params; arrays are the host's ---- */

/* out: (n, cols) the norm of x (n, cols) with weight w (cols); rounded: the same as quantized weights see it, NULL
 * where cols is no multiple of 32. */
int32_t hook_norm(const char *device, const char *isa, const float *x, const float *w, float eps, int32_t n,
                  int32_t cols, float *out, float *rounded, pyllm_error *err);

/* The norms of x (n, cols), one row after the other, by one graph that is run n times: out (n, cols).
 * PYLLM_ERR_UNSUPPORTED on a backend without graphs. */
int32_t hook_graph(const char *device, const float *x, const float *w, float eps, int32_t n, int32_t cols, float *out,
                   pyllm_error *err);

/* gate, up, out: (n, cols), cols a multiple of 16; rounded as for hook_norm. */
int32_t hook_swiglu(const char *device, const char *isa, const float *gate, const float *up, int32_t n, int32_t cols,
                    float *out, float *rounded, pyllm_error *err);

/* out (n, rows) = (add ? out : 0) + x (n, cols) W^T + bias; weights: rows of cols values in the type's blocks; bias
 * (rows) or NULL. Goes through pack, the rounding of activations and the linear stage. seen: (n, cols) x as the weights
 * see it, rounded to 16 bits, or to 8 where `bits` says so and the type takes these. */
int32_t hook_linear(const char *device, const char *isa, int32_t n_threads, int32_t type, const void *weights,
                    int32_t rows, int32_t cols, const float *x, int32_t n, int32_t bits, const float *bias, int32_t add,
                    float *out, float *seen, pyllm_error *err);

/* x (n, cols): rows `tokens` of a table (n_rows, cols) of a type; cosine, sine (n, half) of positions from
 * `position` on. */
int32_t hook_begin(const char *device, const char *isa, int32_t type, const void *table, int32_t cols,
                   const int32_t *tokens, int32_t n, int32_t position, const double *frequency, int32_t half,
                   float mscale, float *x, float *cosine, float *sine, pyllm_error *err);

/* ---- the CPU backend, on arrays; isa NULL for the best ---- */

/* x: (n), n a multiple of 32; out: what the rounding of activations to 16 or 8 bits makes of it. */
int32_t hook_rounded(const char *isa, int32_t bits, const float *x, float *out, int32_t n, pyllm_error *err);

/* ---- a layer's attention on any backend ---- */

/* Moments of the pages of one head's keys k (64 n_pages, head_dim), folded one page after another, at every page
 * boundary: mean (n_pages, head_dim), cov (n_pages, head_dim, head_dim). */
int32_t hook_moments(const char *device, const char *isa, const float *k, int32_t n_pages, int32_t head_dim,
                     float *mean, float *cov, pyllm_error *err);

/* sums (n, 4): kernels.sketch_sums over the sketch of a page of keys k (64, head_dim), of queries q (n,
 * head_dim); q and channels (head_dim, or NULL) in the sketch's order. */
int32_t hook_sketch_sums(const char *isa, const float *k, int32_t head_dim, int32_t page_bits, const uint16_t *channels,
                         const float *q, const float *local_mass, int32_t n, float *sums, pyllm_error *err);

/* M^ of n_keys keys from mean and variance of their scores, both (n), as the head of coefficients (3; may be NULL). */
int32_t hook_bulk_estimate(int32_t gaussian, int32_t estimate, const float *coefficients, int32_t n_keys,
                           const float *mean_score, const float *variance, int32_t n, float *out);

typedef struct hook_attention_shape {
  int32_t n, n_heads, n_kv_heads, head_dim, n_sink;
  float scale;
  int32_t chunk;              /* queries evaluated at once */
  int32_t kv_window, kv_type; /* as in pyllm_session_params */
} hook_attention_shape;

/* The attention pipeline of one layer over given q (n, n_heads, head_dim), k and v (n, n_kv_heads, head_dim), from an
 * empty cache, chunk by chunk. attention: arrays of one layer. out: (n, n_heads, head_dim); record: of one layer;
 * stats: one layer's. */
int32_t hook_attention(const char *device, const char *isa, int32_t n_threads, const hook_attention_shape *shape,
                       const pyllm_attention *attention, const float *q, const float *k, const float *v, float *out,
                       pyllm_layer_stats *stats, const pyllm_record *record, pyllm_error *err);

/* ---- how long stages take, on any backend: seconds (repeats), each from one wait for the backend to the next ---- */

/* `copies` times the product of hook_linear's n tokens with matrices of these weights, each with memory of its own. */
int32_t hook_time_linear(const char *device, int32_t n_threads, int32_t type, const void *weights, int32_t rows,
                         int32_t cols, int32_t n, int32_t copies, int32_t repeats, double *seconds, pyllm_error *err);

typedef struct hook_time_shape {
  int32_t n_layers, n_heads, n_kv_heads, head_dim, n_sink, depth, n; /* n tokens behind `depth` */
  float scale;
} hook_time_shape;

/* The stages of n_layers layers' attention, one after the other: rope_store, attend_local, select, attend_bulk,
 * finish. q (n, n_heads, head_dim); k (depth + n, n_kv_heads, head_dim), which are also the values. seconds (5,
 * repeats); stats: of one batch in the first layer. */
int32_t hook_time_attention(const char *device, int32_t n_threads, const hook_time_shape *shape,
                            const pyllm_attention *attention, const float *q, const float *k, int32_t repeats,
                            double *seconds, pyllm_layer_stats *stats, pyllm_error *err);

/* ---- a session ---- */

/* Damages one layer's key sketch, which the session must have: in every page that is in it now, the greatest value of a
 * channel and the least change places, and those between likewise. */
void hook_mirror_sketch(pyllm_session *session, int32_t layer);

#pragma GCC visibility pop
#endif
