/* Adaptive attention: geometry, decisions and the work list. Arithmetic on keys lives behind ops.h.
 *
 * One pipeline for prefill and decode, every policy:
 *   attend_local   every query over its sinks and window            -> softmax state (m, l, o); L = m + ln l
 *   select         M, the bulk's (estimated) mass; which heads are long; which strips they read; the bulk's work list
 *   attend_bulk    only what is on the list, continuing (m, l, o)
 *   finish         o / l, of a lone query with what stands for the rest of its bulk
 *
 * Cost per layer and query head: local 2 d (n_sink + n_window + 64) multiply-adds, select d^2, bulk 2 d per key read.
 * Every result depends only on the query's own position and keys: not on batches, tiles or threads. The exception is
 * the page tier (page_bits), where the queries of a tile share what they read. */
#ifndef PYLLM_SRC_ATTENTION_H
#define PYLLM_SRC_ATTENTION_H
#include "geometry.h"
#include "kernels.h"
#include "policy.h"
#include <stdbool.h>

enum {
  SPAN_STRIPS =
      32, /* strips of 16 keys folded into one softmax state before it is merged: part of the result's definition */
  PANEL_ROWS = ATTEND_ROWS /* query rows of one work item at most: a head's in a whole tile */
};

typedef struct key_range {
  int32_t begin, end; /* strips */
} key_range;

/* The currency between select and attend_bulk: these query rows, of one key/value head, read these keys.
 * A row is query * n_heads + head. */
typedef struct work_item {
  int32_t kv_head;
  int32_t first_row, n_rows;     /* in work_list.rows; n_rows <= PANEL_ROWS */
  int32_t first_range, n_ranges; /* in work_list.ranges; ascending */
} work_item;

typedef struct work_list {
  work_item *items;
  int32_t *rows;
  key_range *ranges;
  int32_t n_items, n_rows, n_ranges;
} work_list;

/* What one tile reads of the bulk for one key/value head, or with a page tier for those of its heads that share a
 * list. */
typedef struct tile_read {
  int32_t n_strips;      /* of 4 n_pages */
  int32_t n_scored_rows; /* with a page tier: long rows scored on the sketch */
  uint64_t scored;       /* likewise: the tile's i-th query read the sketch where bit i is set */
} tile_read;

/* What stands for what the heads of a batch of one query leave out of their bulks, beside their local masses' weight
 * of 1; of a head that is not long, or leaves out nothing, no weight. */
typedef struct attention_rest {
  bool exists;
  float *weight; /* (n_heads) */
  float *out;    /* (n_heads, head_dim) weighted values */
} attention_rest;

/* One batch on its way through one layer's attention. */
typedef struct attention_batch {
  int32_t n_heads, n_kv_heads, head_dim, n_sink;
  float scale;         /* c */
  int32_t max_strips;  /* of a bulk */
  int32_t n, position; /* queries, and the position of the first */
  query_tile *tiles;
  int32_t n_tiles;
  work_list local, bulk;

  const float *q;            /* (n, n_heads, head_dim) after RoPE */
  softmax_state *state;      /* (n, n_heads) */
  float *out;                /* (n, n_heads, head_dim) weighted values under state */
  float *local_mass;         /* (n, n_heads) L */
  float *bulk_mass;          /* (n, n_heads) estimated or true M; meaningful where a bulk exists and the policy asks */
  float *mean_score;         /* (n, n_heads) c q.mu; where a bulk exists, adaptive only */
  float *deviation;          /* (n, n_heads) s, likewise */
  uint8_t *is_long;          /* (n, n_heads) */
  softmax_state *mass_state; /* (n, n_heads) scratch of the oracle */
  /* By tile and the first of the heads that share a list; what belongs to the others means nothing. */
  uint8_t *wanted;  /* (n_tiles, n_heads, max_strips) 1 for strips of the bulk that some scored query wants */
  tile_read *reads; /* (n_tiles, n_heads) */
  attention_rest rest;
  void *backend_scratch; /* cpu_scratch_new's */
} attention_batch;

/* Of the list whose first head this is. */
static inline tile_read *attention_read(const attention_batch *b, int32_t tile, int32_t head) {
  return b->reads + (int64_t)tile * b->n_heads + head;
}
static inline uint8_t *attention_wanted(const attention_batch *b, int32_t tile, int32_t head) {
  return b->wanted + ((int64_t)tile * b->n_heads + head) * b->max_strips;
}

typedef struct attention_shape {
  int32_t n_layers, n_batch, n_ctx, n_heads, n_kv_heads, head_dim, n_sink;
  float scale;
  int32_t kv_type;       /* enum pyllm_kv_type: what is asked for */
  const bool *wide_keys; /* (n_layers) whose cache has halves whatever is asked for; the model's, or NULL: none */
  int32_t kv_window; /* of a GPU's cache that is split: tokens whose keys and values it holds itself; 0: not split */
} attention_shape;

/* What a layer's cache holds. */
static inline int32_t attention_kv_type(const attention_shape *s, int32_t layer) {
  return s->wide_keys && s->wide_keys[layer] ? PYLLM_KV_F16 : s->kv_type;
}

/* Allocates for up to n_batch queries; false when memory is refused (then attention_free still cleans up). */
bool attention_new(attention_batch *b, const attention_shape *shape);
void attention_free(attention_batch *b);
uint64_t attention_bytes(const attention_shape *shape);

/* Cuts the batch into tiles and writes the local work list; once per batch, the same for every layer. */
void attention_plan(attention_batch *b, int32_t n_window, int32_t position, int32_t n);
/* Fills is_long from local_mass, bulk_mass and the layer's row of the policy. */
void attention_decide(attention_batch *b, const attention_policy *policy, int32_t layer);
/* Writes the bulk work list: every row that has a bulk reads all of it. queries: (n) 1 for those whose rows are listed;
 * NULL for all. */
void attention_list_everything(attention_batch *b, const uint8_t *queries);
/* Writes the bulk work list of the long rows: all of the bulk, or with `paged` the strips marked in `wanted`. */
void attention_list_long(attention_batch *b, bool paged);
/* Adds the batch to a layer's statistics. */
void attention_count(const attention_batch *b, int32_t kv_type, const attention_policy *policy,
                     pyllm_layer_stats *stats);

#endif
