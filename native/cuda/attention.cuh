/* Adaptive attention on the GPU: what the kernels of one session share. The pipeline and its terms: src/attention.h.
 *
 * Nothing here is read back by the host between the stages of a token: the batch's place, the tiles, who is long and the
 * work list live on the device, every launch's grid depends on shapes alone, and blocks with nothing to do end at once.
 * So one token's stages can be recorded once as a graph and replayed at every position.
 *
 * A *list* is the part of the work list of a tile and neighbouring heads of one group that read the same: all of the
 * group, or with a page tier those of attention_sharing. It has the place of its first head, tile * n_heads + head:
 *   rows    the tile's rows of these heads whose bulk is read, compacted, query-major; a row is query * n_heads + head
 *   strips  the strips of 16 keys they read, ascending
 *
 * Results depend on a query's own position and keys alone (but for the page tier, whose tiles share what they read), as
 * on the CPU and by the same means: keys are folded in spans of SPAN_STRIPS strips, each with a fresh softmax state, and
 * spans are merged in order, whether one warp walks them (prefill) or blocks take one each (decode). */
#ifndef PYLLM_CUDA_ATTENTION_CUH
#define PYLLM_CUDA_ATTENTION_CUH
#include "cuda.cuh"
#include "estimate.h"
#include "kv.cuh"
#include "sketch.h"

enum {
  MAX_HEAD_DIM = 256,
  SPAN = 8,            /* strips: 128 keys */
  PANEL = 16,          /* query rows of one warp: the matrix instruction's */
  MOMENT_ROWS = 16,    /* of a covariance, folded by one block */
  SKETCH_CHANNELS = 32 /* of a page, neighbours in the order of its sketch: by one block */
};

typedef struct list_counts {
  int32_t n_rows, n_strips;
  int32_t n_scored; /* with a page tier: long rows scored on the sketch */
  uint64_t scored;  /* likewise: the tile's i-th query read the sketch where bit i is set */
} list_counts;

/* One session's attention. Device pointers; passed to kernels by value. */
typedef struct device_attention {
  int32_t n_heads, n_kv_heads, head_dim, n_sink, n_window;
  int32_t n_blocks; /* of one head's KV cache */
  int32_t n_recent; /* of these, newest ones in the GPU's memory besides where the cache is split (blocks.cuh); or 0 */
  int32_t max_strips;     /* of a bulk */
  int32_t max_tiles;      /* of a batch */
  int32_t max_spans;      /* of the longest list of keys */
  int32_t max_rest_parts; /* of a bulk (rest.cuh) */
  float scale;            /* c */

  const step *now;    /* (1) the batch */
  const float *q;     /* (n, n_heads, head_dim) after RoPE */
  float2 *state;      /* (n, n_heads) maximum of the scores, base 2, and sum of 2^(score - maximum) */
  float *out;         /* (n, n_heads, head_dim) weighted values under state */
  float *local_mass;  /* (n, n_heads) L, natural */
  float *bulk_mass;   /* (n, n_heads) estimated or true M; meaningful where a bulk exists and the policy asks */
  float *mean_score;  /* (n, n_heads) c q.mu; where a bulk exists, adaptive only */
  float *deviation;   /* (n, n_heads) s, likewise */
  uint8_t *is_long;   /* (n, n_heads) */
  uint8_t *audited;   /* (n) 1 where a record wants the true bulk mass */
  float2 *mass_state; /* (n, n_heads) scratch of the oracle */
  uint16_t *staged;   /* (n_kv_heads, n_blocks) blocks of one layer of a split cache, for a prompt; NULL of others */

  /* The bulk's work list. Of a list with several heads, the room of all is its first one's. */
  list_counts *counts; /* (tiles, n_heads) */
  int32_t *rows;       /* (tiles, n_heads, 64) */
  bool paged;          /* long heads read the strips listed; otherwise the whole bulk */
  int32_t *strips;     /* (tiles, n_heads, max_strips) */

  /* One query: what each span gave. */
  float2 *span_state; /* (n_heads, max_spans) */
  float *span_out;    /* (n_heads, max_spans, head_dim) */

  /* Moments as every tile but the batch's last sees them; the last one's are the layer's. */
  float *tile_mean; /* (tiles, n_kv_heads, head_dim) */
  float *tile_m2;   /* (tiles, n_kv_heads, head_dim, head_dim) */

  /* The page tier. */
  uint8_t *wanted;      /* (tiles, n_heads, max_strips) 0 or 1 */
  int32_t *scored_rows; /* (tiles, n_heads, 16) */
  float *strip_mass;    /* (n_heads, 16, max_strips) of one tile: logsumexp of a strip's estimated scores */

  /* One query's rest: what stands for what its long heads leave out counts `rest` times this; 0: nothing does. */
  float rest;
  float *rest_weight; /* (n_heads, max_rest_parts) beside the local mass's 1 */
  float *rest_out;    /* (n_heads, max_rest_parts, head_dim) values so weighted */
} device_attention;

/* One layer's sketch of the bulk keys: pages as in src/sketch.h, SKETCH_CHANNELS channels folded apart, and apart from
 * these what stands for pages. */
typedef struct layer_sketch {
  int32_t *folded; /* (n_kv_heads, sketch_parts) pages; NULL without a page tier */
  uint8_t *pages;  /* (n_kv_heads, n_blocks, page bytes) */
  uint16_t *usual; /* (n_kv_heads, n_blocks, head_dim) values that stand for pages, of a graded one; otherwise NULL */
} layer_sketch;

/* One layer's cache. Device pointers. */
typedef struct device_layer {
  uint16_t *kv;     /* (n_kv_heads, n_blocks) blocks, see kv.cuh */
  uint16_t *recent; /* (n_kv_heads, 1 + n_recent) blocks; NULL where the cache is not split */
  void *host_kv;    /* kv as the host knows it, where it is split */
  /* Running moments of the bulk keys. Blocks of MOMENT_ROWS rows of m2 are folded apart, each with its own count and
   * its own copy of the mean, so that none waits for another. */
  int32_t *folded; /* (n_kv_heads, head_dim / 16) pages */
  float *mean;     /* (n_kv_heads, head_dim / 16, head_dim) */
  float *m2;       /* (n_kv_heads, head_dim, head_dim) sum of (k - mean)(k - mean)^T */
  layer_sketch sketch;
  pyllm_layer_stats *stats; /* (1) */
} device_layer;

/* What one layer's selection goes by: its row of attention_policy. */
typedef struct device_policy {
  int32_t policy, granularity;
  const float *thresholds;     /* (n_heads) or NULL */
  const uint8_t *static_local; /* (n_heads) or NULL */
  int32_t gaussian, estimate;
  const float *coefficients;        /* (n_heads, 3) or NULL */
  const float *means, *covariances; /* (n_kv_heads, head_dim), (n_kv_heads, head_dim, head_dim); NULL: the prompt's */
  int32_t page_bits;
  float page_share, decode_share, page_drop;
  const uint16_t *channels; /* (n_kv_heads, head_dim) of a graded sketch */
  const float *query_means; /* (n_kv_heads, head_dim) likewise */
} device_policy;

__device__ inline int32_t group_of(const device_attention &a) { return a.n_heads / a.n_kv_heads; }

/* The batch's tile; n is 0 behind the last one. */
__device__ inline query_tile tile_at(const device_attention &a, int32_t index) {
  query_tile tile = {0, 0, 0};
  for (int32_t i = 0; i <= index; i++) {
    int32_t first = tile.first + tile.n;
    if (first >= a.now->n) return {first, 0, 0};
    tile = tile_from(a.n_sink, a.n_window, a.now->position, first, a.now->n);
  }
  return tile;
}
__device__ inline bool is_last(const device_attention &a, const query_tile &tile) {
  return tile.first + tile.n == a.now->n;
}

/* The i-th row of a tile and key/value head, query-major. */
__device__ inline int32_t tile_row(const device_attention &a, const query_tile &tile, int32_t kv_head, int32_t i) {
  int32_t group = group_of(a);
  return (tile.first + i / group) * a.n_heads + kv_head * group + i % group;
}

__device__ inline void add_count(uint64_t *to, uint64_t n) {
  atomicAdd((unsigned long long *)to, (unsigned long long)n);
}

/* Heads of a list of the tile. */
__device__ inline int32_t sharing_of(const device_attention &a, const query_tile &tile) {
  return a.paged ? attention_sharing(&tile, group_of(a)) : group_of(a);
}

/* Whether the page tier picks strips in one go: in decode, where a group's rows have a warp each. */
enum { PICKED_ROWS = 32 };
ANYWHERE bool picks_at_once(const device_attention &a, int32_t n) {
  return n == 1 && a.n_heads / a.n_kv_heads <= PICKED_ROWS;
}

/* What a tile reads of the bulk for one key/value head. */
typedef struct group_counts {
  uint64_t rows, queries;       /* long ones, and those that have one */
  uint64_t strips, head_strips; /* that the queries read, and that their heads do */
  uint64_t asked, scored;       /* with a page tier: queries that read the sketch, and rows scored on it */
} group_counts;

/* Adds it to the layer's statistics, as attention_count does on the CPU; page_bits: the policy's. */
__device__ inline void count_group(const device_attention &a, const query_tile &tile, const group_counts &c,
                                   int32_t page_bits, pyllm_layer_stats *stats) {
  if (tile.n_pages == 0) return;
  uint64_t pages = (uint64_t)tile.n_pages, all = pages * STRIPS_PER_PAGE;
  uint64_t pairs = (uint64_t)(tile.n * group_of(a));
  uint64_t strip_bytes = PYLLM_READ_PAGE * 2 * sizeof(uint16_t) * (uint64_t)a.head_dim; /* keys and values */
  uint64_t strip_work = PYLLM_READ_PAGE * 2 * (uint64_t)a.head_dim; /* multiply-adds of scores and weighted values */
  uint64_t sketch_bytes = page_bits ? sketch_page_bytes(page_bits, a.head_dim) : 0; /* of a page; and its channels */
  uint64_t sketched = page_bits ? (uint64_t)sketch_channels(page_bits, a.head_dim) : 0;
  uint64_t stood_for = a.rest > 0 && a.now->n == 1 ? pages * (uint64_t)a.head_dim : 0; /* values */
  uint64_t sketch_work = c.scored * pages * PYLLM_PAGE * sketched + c.rows * stood_for;
  add_count(&stats->pairs, pairs);
  add_count(&stats->pairs_local, pairs - c.rows);
  add_count(&stats->work, pairs * all * strip_work);
  add_count(&stats->work_done, c.head_strips * strip_work + sketch_work);
  add_count(&stats->bytes, (uint64_t)tile.n * all * strip_bytes);
  add_count(&stats->bytes_read,
            c.strips * strip_bytes + c.asked * pages * sketch_bytes + c.queries * stood_for * sizeof(uint16_t));
  add_count(&stats->pages, c.queries * all);
  add_count(&stats->pages_read, c.strips);
  add_count(&stats->work_sketch, sketch_work);
}

/* ---- the stages; each comments its launches where it is written ---- */

/* rope.cu: also forgetting positions [from, end), the last ones; and filling what a split cache has on the GPU, when
 * the host's part holds n_tokens. */
void cuda_rope_store(queue *to, const device_attention &a, const device_layer &layer, const rope_job &job, int32_t n);
void cuda_cut(queue *to, const device_attention &a, const device_layer &layer, int32_t from, int32_t end);
void cuda_fill_recent(queue *to, const device_attention &a, const device_layer &layer, int32_t n_tokens);
/* attend.cu; of one query attend_decode.cu */
void cuda_attend_local(queue *to, const device_attention &a, const device_layer &layer, int32_t n);
void cuda_attend_bulk(queue *to, const device_attention &a, const device_layer &layer, int32_t n);
/* Of the queries in a.audited, where `audited`; otherwise of all. */
void cuda_true_bulk_mass(queue *to, const device_attention &a, const device_layer &layer, int32_t n, bool audited);
/* mass (n, n_heads): logsumexp of all that the rows have read. */
void cuda_read_mass(queue *to, const device_attention &a, int32_t n, float *mass);
void cuda_finish(queue *to, const device_attention &a, int32_t first, int32_t n, bool rounded, const activation &out);
/* moments.cu */
void cuda_fold_moments(queue *to, const device_attention &a, const device_layer &layer);
void cuda_estimate_bulk_mass(queue *to, const device_attention &a, const device_layer &layer,
                             const device_policy &policy, int32_t n);
/* select.cu: masses, decisions, the work list and the statistics, under any policy. */
void cuda_select_long(queue *to, const device_attention &a, const device_layer &layer, const device_policy &policy,
                      int32_t n);
/* pages.cu: narrows the work list to the strips that the page tier wants. */
void cuda_select_pages(queue *to, const device_attention &a, const device_layer &layer, const device_policy &policy,
                       int32_t n);

/* attention_memory.cu: shapes; then arrays, zeroed, in the backend's memory. _new: false when some was refused; what
 * there is then is still to be freed. The sketch of a layer comes and goes with the policy. */
device_attention attention_of(const attention_shape &s, int32_t n_blocks);
uint64_t attention_memory_bytes(device_attention a, int32_t n_batch);
/* Keys and values of one layer: in the GPU's memory, and in the host's. */
uint64_t layer_kv_bytes(const device_attention &a);
uint64_t layer_host_bytes(const device_attention &a);
bool attention_memory_new(const backend *be, device_attention &a, int32_t n_batch);
void attention_memory_free(const backend *be, device_attention &a);
bool layer_memory_new(const backend *be, const device_attention &a, device_layer &l);
void layer_memory_free(const backend *be, const device_attention &a, device_layer &l);
uint64_t layer_sketch_bytes(const device_attention &a, int32_t page_bits);
bool layer_sketch_new(const backend *be, const device_attention &a, layer_sketch &sketch, int32_t page_bits);
void layer_sketch_free(const backend *be, layer_sketch &sketch);

/* Blocks that sketch one page's channels apart; with the one that makes what stands for it, at most. */
ANYWHERE int32_t channel_parts(int32_t head_dim) { return (head_dim + SKETCH_CHANNELS - 1) / SKETCH_CHANNELS; }
ANYWHERE int32_t sketch_parts(int32_t head_dim) { return channel_parts(head_dim) + 1; }

/* Lists of a tile of a batch of n queries at most; paged: with a page tier. */
inline int32_t most_lists(const device_attention &a, bool paged, int32_t n) {
  bool may_share = (int64_t)n * (a.n_heads / a.n_kv_heads) <= SHARED_ROWS; /* and then all do */
  return paged && !may_share ? a.n_heads : a.n_kv_heads;
}
/* The first head of the lists that the blocks of a grid's row work on: a grid has as many rows as there are lists. */
__device__ inline int32_t head_of_row(const device_attention &a, uint32_t row, uint32_t rows) {
  return (int32_t)(row * ((uint32_t)a.n_heads / rows));
}

/* Calls f.run<head_dim>() for the head dimensions that have kernels; false for others. */
template <class F> bool with_head_dim(int32_t head_dim, const F &f) {
  switch (head_dim) {
  case 32: f.template run<32>(); return true;
  case 64: f.template run<64>(); return true;
  case 80: f.template run<80>(); return true;
  case 96: f.template run<96>(); return true;
  case 128: f.template run<128>(); return true;
  case 256: f.template run<256>(); return true;
  default: return false;
  }
}
#endif
