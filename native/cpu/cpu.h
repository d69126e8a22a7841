/* What the CPU backend's files share. Stages: rows.c, linear.c, attend.c, select.c and pages.c; the table:
 * backend.c. */
#ifndef PYLLM_CPU_CPU_H
#define PYLLM_CPU_CPU_H
#include "kernels.h"
#include "ops.h"
#include "threads.h"

/* Running mean and covariance of the first n_pages bulk pages of one key/value head (Chan's merge, f32). */
typedef struct key_moments {
  int32_t n_pages;
  float *mean;   /* (head_dim) */
  float *m2;     /* (head_dim, head_dim) sum of (k - mean)(k - mean)^T */
  float *strips; /* m2 / n as (head_dim / 16) strips of (head_dim / 2, 16, 2) */
} key_moments;

/* Of all three arrays. */
static inline size_t moment_floats(size_t head_dim) { return head_dim * (1 + 2 * head_dim); }

/* Low-bit copy of the first n_pages bulk pages' keys of one key/value head, for choosing what to read of them. */
typedef struct key_sketch {
  int32_t n_pages;
  unsigned char *pages; /* (n_blocks, page_bytes); NULL until a policy asks for it */
  /* Of a graded one; NULL of others. */
  const uint16_t *channels; /* (head_dim) their order */
  const float *query;       /* (head_dim) the usual one */
  uint16_t *usual;          /* (n_blocks) values that stand for pages, as in blocks of 16 tokens' values (rest.c) */
} key_sketch;

/* Of all layers' sketches; the last three NULL unless they are graded. */
typedef struct sketch_memory {
  unsigned char *pages; /* (n_layers, n_kv_heads, n_blocks) */
  uint16_t *usual;      /* (n_layers, n_kv_heads, usual_halves) */
  sketch_recipe recipe;
} sketch_memory;

/* One layer's KV cache, head-major, in blocks of 64 tokens:
 *   block (g, b) is the g * n_blocks + b-th of kv_block_bytes: its keys, then its values.
 *   keys   (4, head_dim / 2, 16, 2): strips of 16 tokens, dimension pairs interleaved.
 *   values (4, head_dim / 16, 8, 16, 2): strips of 16 tokens, of 16 dimensions, token pairs interleaved.
 * Both are strips as kernels.h defines them, so scores and weighted values are the same matrix product. Halves; or bytes, and
 * behind those of each strip their scales (geometry.h). */
typedef struct layer_cache {
  int32_t n_blocks;
  int32_t kv_type;         /* enum pyllm_kv_type */
  unsigned char *kv;       /* (n_kv_heads, n_blocks) blocks */
  key_moments *moments;    /* (n_kv_heads) */
  key_sketch *sketches;    /* (n_kv_heads) */
  int32_t sketch_bits;     /* page_bits of the sketches; 0 where there are none */
  const float *calibrated; /* (n_kv_heads) the policy's covariances as key_moments.strips; NULL where it has none */
} layer_cache;

struct attention_state {
  attention_shape shape;
  attention_policy policy; /* its arrays are the session's */
  attention_batch batch;
  layer_cache *layers;      /* (n_layers) */
  sketch_memory sketch;     /* which the layers' point into; NULLs at first */
  float *calibrated;        /* (n_layers, n_kv_heads, head_dim * head_dim), likewise */
  pyllm_layer_stats *stats; /* (n_layers) */
};

/* One span of one work item, and its first row in the partial results. */
typedef struct span_unit {
  int32_t item, span, row;
} span_unit;

typedef struct partial_span {
  softmax_state *state; /* (partial_rows) */
  float *out;           /* (partial_rows, head_dim) */
} partial_span;

/* One thread's scratch for a panel. */
typedef struct panel {
  float *q, *out;        /* (PANEL_ROWS, head_dim) */
  int16_t *q_words;      /* (PANEL_ROWS, head_dim) */
  float *scores, *alpha; /* (PANEL_ROWS, 64), (PANEL_ROWS) */
  float q_scale[PANEL_ROWS];
  softmax_state state[PANEL_ROWS];
  int32_t position[PANEL_ROWS], earliest; /* of the rows' tokens */
  int32_t n_valid[PANEL_ROWS];
} panel;

/* The rows that are scored for one list, at most SHARED_ROWS. */
typedef struct page_scratch {
  int32_t n;                   /* rows loaded */
  int32_t kv_head;             /* whose sketch they are scored on */
  float *local_mass;           /* (rows) */
  float *total;                /* (rows) all attention, that of sinks and window being 1 */
  float *q;                    /* (rows, head_dim) scaled, in the order of the sketch's channels */
  float *shares;               /* (rows, max_strips) */
  _Atomic int32_t pieces_left; /* of the bulk, not yet scored; in decode */
} page_scratch;

/* attention_batch.backend_scratch */
typedef struct cpu_scratch {
  panel *panels; /* (threads) */
  float *panel_memory;
  span_unit *units; /* (partial_rows) */
  partial_span partial;
  int32_t partial_rows; /* the spans of one decode step, all heads */
  page_scratch *pages;  /* (max(threads, n_kv_heads)) */
  float *page_memory;
} cpu_scratch;

static inline unsigned char *cache_block(const layer_cache *cache, int32_t kv_head, int32_t block, int32_t head_dim) {
  return cache->kv +
         ((size_t)kv_head * (size_t)cache->n_blocks + (size_t)block) * kv_block_bytes(cache->kv_type, head_dim);
}

/* A block as halves, keys and then values: the block itself, or what is made of its bytes in `made`. */
typedef uint16_t half_block[2 * KV_BLOCK * LARGEST_HEAD];
const uint16_t *cache_halves(const struct kernels *k, const layer_cache *cache, int32_t kv_head, int32_t block,
                             int32_t head_dim, half_block made);

extern const attention_ops cpu_attention_ops;

void *cpu_alloc(const backend *be, size_t bytes);
void cpu_release(const backend *be, void *memory);
void cpu_copy(const backend *be, void *to, const void *from, size_t bytes);
int32_t cpu_sync(const backend *be, pyllm_error *err);
void cpu_begin(const backend *be, int32_t position, int32_t n);
void cpu_angles(const backend *be, const double *frequency, int32_t half, float mscale, int32_t position, int32_t n,
                float *cosine, float *sine);
int32_t cpu_embed(const backend *be, const quant_type *type, const void *table, int32_t cols, const int32_t *tokens,
                  int32_t n, float *x, pyllm_error *err);
void cpu_norm(const backend *be, const float *x, const float *w, float eps, int32_t n, int32_t bits, activation *out);
void cpu_linear(const backend *be, const activation *x, int32_t n, const linear_job *jobs, int32_t n_jobs);
void cpu_rope_store(const backend *be, const rope_job *job, int32_t n, layer_cache *cache);
void cpu_attend_local(const backend *be, attention_batch *b, const layer_cache *cache);
void cpu_attend_bulk(const backend *be, attention_batch *b, const layer_cache *cache);
void cpu_select(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy,
                int32_t layer);
void cpu_record(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy,
                const pyllm_record *out);
void cpu_finish(const backend *be, const attention_batch *b, int32_t first, int32_t bits, activation *out);
bool cpu_finite(const backend *be, const float *x, int64_t n);
void cpu_swiglu(const backend *be, const float *gate, const float *up, int32_t n, int32_t bits, activation *out);

/* scratch.c: memory that the attention stages of one session work in; NULL when it is refused. */
void *cpu_scratch_new(const backend *be, const attention_shape *shape);
void cpu_scratch_free(void *scratch);
uint64_t cpu_scratch_bytes(int32_t n_threads, const attention_shape *shape);

/* cache.c: one layer's; false when memory is refused, and then it is still to be freed. */
bool cpu_cache_new(layer_cache *cache, const attention_shape *shape, int32_t kv_type);
void cpu_cache_free(layer_cache *cache, const attention_shape *shape);
/* Makes room for sketches of page_bits, empty, in the layer's part of the memory. */
void cpu_cache_sketch(layer_cache *cache, const attention_shape *shape, int32_t page_bits, int32_t layer,
                      const sketch_memory *memory);
/* Forgets positions [from, to), the last ones. */
void cpu_cache_cut(const struct kernels *k, layer_cache *cache, const attention_shape *shape, int32_t from, int32_t to);

/* out: scale * cov (head_dim, head_dim), symmetric, as key_moments.strips has it. */
void covariance_strips(const float *cov, int32_t head_dim, float scale, float *out);

/* Folds pages into one head's moments until they hold exactly n_pages; starts over where they hold more. */
void moments_fold(const struct kernels *k, const layer_cache *cache, int32_t kv_head, int32_t head_dim,
                  int32_t n_pages);

/* Marks in b->wanted what the scored queries of each tile want of the bulk, after is_long is decided. */
void cpu_want_pages(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy);

/* rest.c: the value that stands for a page, from its KV block; scale: of scores. */
void cpu_usual_value(const struct kernels *k, const key_sketch *sketch, const uint16_t *block, int32_t head_dim,
                     float scale, int32_t page);
/* b->rest of the heads of one key/value head, where the batch is one query: of the strips that `wanted` leaves out.
 * rows: its long heads in order, with their shares and total. */
void cpu_rest(const backend *be, attention_batch *b, const key_sketch *sketch, const page_scratch *rows,
              const uint8_t *wanted, float factor);
/* Halves of the values that stand for the pages of n_blocks: 16 pages lie as 16 tokens' values do in a KV block, so
 * that they are multiplied as these are. And where dimension i of a page is. */
static inline size_t usual_halves(int32_t n_blocks, int32_t head_dim) {
  return (size_t)((n_blocks + STRIP - 1) / STRIP * STRIP) * (size_t)head_dim;
}
static inline uint16_t *usual_at(uint16_t *usual, int32_t head_dim, int32_t page, int32_t i) {
  return usual + (int64_t)(page / STRIP) * STRIP * head_dim + block_value_index(head_dim, page % STRIP, i);
}

/* mass (n, n_heads): M of every row that has a bulk, from its keys. queries: (n) 1 where it is wanted; NULL:
 * everywhere. What other rows hold means nothing. Overwrites the bulk work list. */
void cpu_true_bulk_mass(const backend *be, attention_batch *b, const layer_cache *cache, const uint8_t *queries,
                        float *mass);

/* Merges a span's result into a row's, out and span_out (head_dim): the order of spans is the order of calls.
 * span_out NULL: the state alone. */
void cpu_merge_row(const attention_batch *b, softmax_state *into, float *out, softmax_state span,
                   const float *span_out);

/* mass (n, n_heads): logsumexp of what each row's state (n, n_heads) has taken in. */
void cpu_masses(const attention_batch *b, const softmax_state *state, float *mass);

#endif
