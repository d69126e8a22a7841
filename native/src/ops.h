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

/* A stage's result on its way into matrices: as floats, and rounded for quantized weights. A stage that makes one is
 * told its bits: 16, on the CPU also 8, or 0 for floats alone. */
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

/* One session's attention in the backend's hands: the KV caches of its layers, what is derived from them and
 * counted, and what the stages of a batch hand to each other. */
typedef struct attention_state attention_state;

typedef struct rope_job {
  enum rope_kind kind;
  int32_t n_rot, n_heads, n_kv_heads, head_dim, n_sink, position;
  const float *cosine, *sine;   /* (n, n_rot / 2) */
  const float *q_norm, *k_norm; /* (head_dim) or NULL */
  float norm_eps;
  float *q, *k;   /* (n, n_heads, head_dim), (n, n_kv_heads, head_dim): changed in place */
  const float *v; /* (n, n_kv_heads, head_dim) */
} rope_job;

/* The stages that work on a session's attention, and its memory. Where a pointer is not said to be the host's, it is
 * the backend's. */
typedef struct attention_ops {
  /* What a session's attention takes, with a sketch of page_bits: all of out but scratch_bytes, to which its share
   * is added. Fails, as create does, for a shape that the backend has no kernels for. */
  int32_t (*memory)(const backend *be, const attention_shape *shape, int32_t page_bits, pyllm_session_memory *out,
                    pyllm_error *err);
  int32_t (*create)(const backend *be, const attention_shape *shape, attention_state **out, pyllm_error *err);
  void (*destroy)(const backend *be, attention_state *state); /* NULL: nothing */
  /* Decides by this policy from now on; its arrays stay the caller's, who keeps them until the next one. On failure the
   * last one holds. */
  int32_t (*set_policy)(const backend *be, attention_state *state, const attention_policy *policy, pyllm_error *err);
  /* Forgets positions [from, to), the last ones: zeroes their keys and values, drops moments and sketches that have
   * them. */
  void (*cut)(const backend *be, attention_state *state, int32_t from, int32_t to);
  /* The first n KV blocks of a head, in the order of the CPU's cache (cpu/cpu.h); blocks is the host's. */
  void (*read_blocks)(const backend *be, attention_state *state, int32_t layer, int32_t kv_head, int32_t n,
                      void *blocks);
  void (*write_blocks)(const backend *be, attention_state *state, int32_t layer, int32_t kv_head, int32_t n,
                       const void *blocks);
  /* Moments of a head's first n_pages >= 1 bulk pages, ddof 0; mean (head_dim), cov (head_dim, head_dim): the
   * host's. */
  void (*read_moments)(const backend *be, attention_state *state, int32_t layer, int32_t kv_head, int32_t n_pages,
                       float *mean, float *cov);
  /* stats (n_layers): the host's. */
  void (*read_stats)(const backend *be, attention_state *state, pyllm_layer_stats *stats);

  /* The attention stages of a batch. begin, once for all layers: n queries from `position` on; q (n, n_heads, head_dim)
   * is what rope_store will have made of every layer's. */
  void (*begin)(const backend *be, attention_state *state, int32_t position, int32_t n, const float *q);
  /* Query/key norms, RoPE, and the batch's keys and values into their KV blocks. Writes n * 4 * kv width bytes. */
  void (*rope_store)(const backend *be, const rope_job *job, int32_t n, attention_state *state, int32_t layer);
  /* Softmax over the batch's local ranges: state, out and local_mass of every row. Reads the window's blocks. */
  void (*attend_local)(const backend *be, attention_state *state, int32_t layer);
  /* The head-selection stage: bulk_mass, is_long and the bulk work list. Adaptive: folds new pages into the moments
   * and does head_dim^2 multiply-adds per row; oracle: reads all bulk keys. With a page tier the sketch is read for
   * every scored query with a long head, and where a batch is one query, what stands for pages. Returns the bytes that
   * select and attend_bulk read; 0 where the backend does not tell at once. */
  uint64_t (*select)(const backend *be, attention_state *state, int32_t layer);
  /* Continues state and out over the bulk work list. Reads the blocks it names. */
  void (*attend_bulk)(const backend *be, attention_state *state, int32_t layer);
  /* Fills the arrays that out has, (n, n_heads) of one layer, the host's; audit: reads the bulk keys of audited
   * queries. Comes after attend_bulk, whose work list it overwrites. */
  void (*record)(const backend *be, attention_state *state, int32_t layer, const pyllm_record *out);
  /* out = weighted values / their weight, (n - first, n_heads * head_dim), of queries [first, n), first < n; with what
   * stands for pages. */
  void (*finish)(const backend *be, attention_state *state, int32_t first, int32_t bits, activation *out);
} attention_ops;

struct ops {
  const char *name;
  bool on_host;      /* the backend's memory is the host's */
  int32_t most_rows; /* of a matrix; asked where on_host is false */
  /* The backend's memory, which holds everything that stages read or write but where a stage says otherwise. alloc:
   * zeroed, aligned to 64 bytes, NULL when refused. write and read copy from and to the host's memory; both return when
   * that is done, after all stages called before. What goes wrong on the way, sync tells. */
  void *(*alloc)(const backend *be, size_t bytes);
  void (*release)(const backend *be, void *memory);
  void (*write)(const backend *be, void *to, const void *from, size_t bytes);
  void (*read)(const backend *be, void *to, const void *from, size_t bytes);
  /* Waits for all stages called; the first failure of anything so far, after which the backend does nothing more. */
  int32_t (*sync)(const backend *be, pyllm_error *err);
  /* Stages called between graph_begin and graph_end are not done but written down, and done in one launch by
   * graph_run, as often as wanted: with the same arguments, on what the memory then holds. graph_end: NULL where
   * that failed, and nothing was done. All are NULL on a backend where starting a stage costs nothing. */
  void (*graph_begin)(const backend *be);
  void *(*graph_end)(const backend *be);
  bool (*graph_run)(const backend *be, void *graph); /* false where memory was refused, and nothing has run */
  void (*graph_free)(const backend *be, void *graph);
  /* A batch of n tokens from `position` on: what all stages after it work on. */
  void (*begin)(const backend *be, int32_t position, int32_t n);
  /* x (n, cols) = rows `tokens` of a table in file format. table and tokens are the host's. Reads n rows. Fails
   * where the host's memory for them is refused, and nothing is changed then. */
  int32_t (*embed)(const backend *be, const quant_type *type, const void *table, int32_t cols, const int32_t *tokens,
                   int32_t n, float *x, pyllm_error *err);
  /* out = RMS norm of x (n, out->cols) with weight w. */
  void (*norm)(const backend *be, const float *x, const float *w, float eps, int32_t n, int32_t bits, activation *out);
  /* Several matrices on one input. Reads each weight once per batch (decode) or per 32 to 128 tokens (prefill). */
  void (*linear)(const backend *be, const activation *x, int32_t n, const linear_job *jobs, int32_t n_jobs);
  /* cosine, sine (n, half) = mscale times those of position * frequency (half), of the batch's positions. */
  void (*angles)(const backend *be, const double *frequency, int32_t half, float mscale, int32_t position, int32_t n,
                 float *cosine, float *sine);
  /* Whether x (n) holds no NaN and no infinity; returns when the stages before it are done. Once per batch at most. */
  bool (*finite)(const backend *be, const float *x, int64_t n);
  const attention_ops *attention;
  /* out = silu(gate) * up, (n, out->cols). */
  void (*swiglu)(const backend *be, const float *gate, const float *up, int32_t n, int32_t bits, activation *out);
};

/* Where alloc gave NULL: the failure of the backend, if that is why, and otherwise `refused`, of which err tells
 * already. */
static inline int32_t alloc_failure(const backend *be, int32_t refused, pyllm_error *err) {
  int32_t status = be->ops->sync(be, err);
  return status ? status : refused;
}

/* The CPU's table. */
extern const ops cpu_ops;

#endif
