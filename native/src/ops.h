/* The backend: the dozen stages a transformer is made of. forward.c is written over this table once; a backend
 * provides it once. Stages are the unit of the profile and of the tests. Pointers are in the backend's memory.
 * n: tokens of the batch; matrices are (n, ...) row-major f32 unless said. */
#ifndef PYLLM_SRC_OPS_H
#define PYLLM_SRC_OPS_H
#include "arch.h"
#include "attention.h"
#include "pack.h"
#include "pyllm.h"

struct pool;
struct kernels;
typedef struct ops ops;

typedef struct backend {
  const struct ops *ops;
  struct pool *pool;
  const struct kernels *kernels;
  void *device;          /* of a GPU: cuda.cuh's; NULL on the CPU */
  const struct ops *cpu; /* the CPU's table, for what a GPU leaves to the host */
} backend;

/* A stage's result on its way into matrices: as floats, and rounded to 16 bits for quantized weights. */
typedef struct activation {
  int32_t cols;
  float *values; /* (n, cols) */
  quantized q;   /* (n, cols); only where cols is a multiple of 32 */
} activation;

/* out (n, w->rows) = x w^T + bias, or out += x w^T. */
typedef struct linear_job {
  const matrix *w;
  const float *bias; /* (w->rows) or NULL */
  bool add;
  float *out;
} linear_job;

/* Running mean and covariance of the first n_pages bulk pages of one key/value head (Chan's merge, f32). */
typedef struct key_moments {
  int32_t n_pages;
  float *mean;   /* (head_dim) */
  float *m2;     /* (head_dim, head_dim) sum of (k - mean)(k - mean)^T */
  float *strips; /* m2 / n as (head_dim / 16) strips of (head_dim / 2, 16, 2) */
} key_moments;

/* Low-bit copy of the first n_pages bulk pages' keys of one key/value head, for choosing what to read of them. */
typedef struct key_sketch {
  int32_t n_pages;
  unsigned char *pages; /* (n_blocks, page_bytes); NULL until a policy asks for it */
} key_sketch;

/* One layer's KV cache, head-major, in blocks of 64 tokens:
 *   block (g, b) at kv + (g * n_blocks + b) * 2 * 64 * head_dim: its keys, then its values, f16.
 *   keys   (4, head_dim / 2, 16, 2): strips of 16 tokens, dimension pairs interleaved.
 *   values (4, head_dim / 16, 8, 16, 2): strips of 16 tokens, of 16 dimensions, token pairs interleaved.
 * Both are strips as kernels.h defines them, so scores and weighted values are the same matrix product. */
typedef struct layer_cache {
  int32_t n_blocks;
  uint16_t *kv;         /* (n_kv_heads, n_blocks, 2, 64 * head_dim) */
  key_moments *moments; /* (n_kv_heads) */
  key_sketch *sketches; /* (n_kv_heads) */
  int32_t sketch_bits;  /* 2, 3 or 4; 0 where there is none */
} layer_cache;

typedef struct rope_job {
  enum rope_kind kind;
  int32_t n_rot, n_heads, n_kv_heads, head_dim, n_sink, position;
  const float *cosine, *sine;   /* (n, n_rot / 2) */
  const float *q_norm, *k_norm; /* (head_dim) or NULL */
  float norm_eps;
  float *q, *k;   /* (n, n_heads, head_dim), (n, n_kv_heads, head_dim): changed in place */
  const float *v; /* (n, n_kv_heads, head_dim) */
} rope_job;

struct ops {
  const char *name;
  bool on_host; /* the backend's memory is the host's */
  /* The backend's memory, which holds everything that stages read or write but where a stage says otherwise. alloc:
   * zeroed, aligned to 64 bytes, NULL when refused. write and read copy from and to the host's memory; both return when
   * that is done, after all stages called before. What goes wrong on the way, sync tells. */
  void *(*alloc)(const backend *be, size_t bytes);
  void (*release)(const backend *be, void *memory);
  void (*write)(const backend *be, void *to, const void *from, size_t bytes);
  void (*read)(const backend *be, void *to, const void *from, size_t bytes);
  /* Waits for all stages called; the first failure of anything so far, after which the backend does nothing more. */
  int32_t (*sync)(const backend *be, pyllm_error *err);
  /* Stages called between graph_begin and graph_end are not done but written down, and done in one launch by graph_run, as
   * often as wanted: with the same arguments, on what the memory then holds. graph_end: NULL where it failed, as sync
   * tells. All are NULL on a backend where starting a stage costs nothing. */
  void (*graph_begin)(const backend *be);
  void *(*graph_end)(const backend *be);
  void (*graph_run)(const backend *be, void *graph);
  void (*graph_free)(const backend *be, void *graph);
  /* The backend's own memory for the attention stages of one session; NULL when it is refused. */
  void *(*scratch_new)(const backend *be, const attention_shape *shape);
  void (*scratch_free)(void *scratch);
  /* Bytes of one page of a key sketch. */
  uint64_t (*sketch_bytes)(int32_t bits, int32_t head_dim);
  uint64_t (*scratch_bytes)(int32_t n_threads, const attention_shape *shape);
  /* A batch of n tokens from `position` on: what all stages after it work on. */
  void (*begin)(const backend *be, int32_t position, int32_t n);
  /* x (n, cols) = rows `tokens` of a table in file format. table and tokens are the host's. Reads n rows. */
  void (*embed)(const backend *be, const quant_type *type, const void *table, int32_t cols, const int32_t *tokens,
                int32_t n, float *x);
  /* out = RMS norm of x (n, out->cols) with weight w; both forms where `rounded`. */
  void (*norm)(const backend *be, const float *x, const float *w, float eps, int32_t n, bool rounded, activation *out);
  /* Several matrices on one input. Reads each weight once per batch (decode) or per 128 tokens (prefill). */
  void (*linear)(const backend *be, const activation *x, int32_t n, const linear_job *jobs, int32_t n_jobs);
  /* cosine, sine (n, half) = mscale times those of position * frequency (half), of the batch's positions. */
  void (*angles)(const backend *be, const double *frequency, int32_t half, float mscale, int32_t position, int32_t n,
                 float *cosine, float *sine);
  /* Query/key norms, RoPE, and the batch's keys and values into their KV blocks. Writes n * 4 * kv width bytes. */
  void (*rope_store)(const backend *be, const rope_job *job, int32_t n, layer_cache *cache);
  /* Softmax over the batch's local ranges: state, out and local_mass of every row. Reads the window's blocks. */
  void (*attend_local)(const backend *be, attention_batch *b, const layer_cache *cache);
  /* The head-selection stage: bulk_mass, is_long and the bulk work list. Adaptive: folds new pages into the moments
   * and does head_dim^2 multiply-adds per row; oracle: reads all bulk keys. With a page tier the sketch is read for
   * every scored query with a long head. */
  void (*select)(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy,
                 int32_t layer);
  /* Continues state and out over the bulk work list. Reads the blocks it names. */
  void (*attend_bulk)(const backend *be, attention_batch *b, const layer_cache *cache);
  /* Fills the arrays that out has, (n, n_heads) of one layer; audit: reads the bulk keys of audited queries. Comes after
   * attend_bulk and attention_count, whose work list it overwrites. */
  void (*record)(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy,
                 const pyllm_record *out);
  /* out = weighted values / their weight, (n, n_heads * head_dim). */
  void (*finish)(const backend *be, const attention_batch *b, bool rounded, activation *out);
  /* out = silu(gate) * up, (n, out->cols). */
  void (*swiglu)(const backend *be, const float *gate, const float *up, int32_t n, bool rounded, activation *out);
};

/* The CPU's table. */
extern const ops cpu_ops;

/* out: scale * cov (head_dim, head_dim), symmetric, as key_moments.strips has it. */
void covariance_strips(const float *cov, int32_t head_dim, float scale, float *out);

/* Folds pages into one head's moments until it holds exactly n_pages; starts over where it holds more.
 * blocks: the head's KV blocks. */
void moments_fold(const struct kernels *k, key_moments *m, const uint16_t *blocks, int32_t head_dim, int32_t n_pages);

#endif
