/* What a batch's attention read and computed of the bulk, as pyllm_layer_stats defines it. */
#include "attention.h"
#include "sketch.h"
#include <string.h>

/* One tile and key/value head, and the first of its heads. */
typedef struct tile_group {
  int32_t tile, first, n_heads;
  int32_t sharing; /* heads that share a list */
} tile_group;

/* Strips that a query of the group reads, whose long heads are is_long (n_heads): of any of their lists. */
static uint64_t strips_of_query(const attention_batch *b, const tile_group *g, const uint8_t *is_long) {
  if (g->sharing == g->n_heads) return (uint64_t)attention_read(b, g->tile, g->first)->n_strips;
  const uint8_t *wanted = attention_wanted(b, g->tile, g->first); /* the next head's follow */
  uint64_t n = 0;
  for (int32_t s = 0; s < b->tiles[g->tile].n_pages * KV_STRIPS; s++) {
    uint8_t any = 0;
    for (int32_t h = 0; h < g->n_heads; h++) any |= is_long[h] & wanted[(int64_t)h * b->max_strips + s];
    n += any;
  }
  return n;
}

/* What the queries of a tile read for one group: how many have a long head, their strips and their heads' strips. */
typedef struct group_read {
  uint64_t queries, heads, strips, head_strips;
} group_read;

static group_read count_reads(const attention_batch *b, const tile_group *g) {
  const query_tile *tile = &b->tiles[g->tile];
  const uint8_t *before = NULL; /* of the last query that has long heads: most have the same */
  group_read n = {0, 0, 0, 0};
  uint64_t n_strips = 0;
  for (int32_t i = tile->first; i < tile->first + tile->n; i++) {
    const uint8_t *is_long = b->is_long + i * b->n_heads + g->first;
    uint64_t heads = n.heads;
    for (int32_t h = 0; h < g->n_heads; h++) {
      if (!is_long[h]) continue;
      n.heads++;
      n.head_strips += (uint64_t)attention_read(b, g->tile, g->first + h - h % g->sharing)->n_strips;
    }
    if (n.heads == heads) continue;
    if (!before || memcmp(before, is_long, (size_t)g->n_heads)) n_strips = strips_of_query(b, g, is_long);
    before = is_long;
    n.queries++;
    n.strips += n_strips;
  }
  return n;
}

/* Adds what scoring the sketch costs. */
static void count_scoring(const attention_batch *b, const tile_group *g, int32_t page_bits, pyllm_layer_stats *stats) {
  uint64_t pages = (uint64_t)b->tiles[g->tile].n_pages, rows = 0, queries = 0;
  for (int32_t h = 0; h < g->n_heads; h += g->sharing) {
    const tile_read *read = attention_read(b, g->tile, g->first + h);
    rows += (uint64_t)read->n_scored_rows;
    queries |= read->scored;
  }
  uint64_t work = rows * pages * PYLLM_PAGE * (uint64_t)sketch_channels(page_bits, b->head_dim);
  stats->work_done += work;
  stats->work_sketch += work;
  stats->bytes_read += (uint64_t)__builtin_popcountll(queries) * pages * sketch_page_bytes(page_bits, b->head_dim);
}

/* Adds what the values that stand for pages cost. */
static void count_rest(const attention_batch *b, const group_read *read, uint64_t pages, pyllm_layer_stats *stats) {
  uint64_t work = read->heads * pages * (uint64_t)b->head_dim;
  stats->work_done += work;
  stats->work_sketch += work;
  stats->bytes_read += read->queries * pages * sizeof(uint16_t) * (uint64_t)b->head_dim;
}

void attention_count(const attention_batch *b, int32_t kv_type, const attention_policy *policy,
                     pyllm_layer_stats *stats) {
  uint64_t strip_work = 2 * STRIP * (uint64_t)b->head_dim; /* multiply-adds of scores and weighted values */
  uint64_t strip_bytes = kv_block_bytes(kv_type, b->head_dim) / KV_STRIPS;
  int32_t group = b->n_heads / b->n_kv_heads;
  for (int32_t t = 0; t < b->n_tiles; t++) {
    const query_tile *tile = &b->tiles[t];
    uint64_t all = (uint64_t)tile->n_pages * KV_STRIPS, n = (uint64_t)tile->n;
    int32_t sharing = policy->page_bits ? attention_sharing(tile, group) : group;
    for (int32_t h = 0; tile->n_pages && h < b->n_heads; h += group) {
      tile_group g = {t, h, group, sharing};
      group_read read = count_reads(b, &g);
      stats->pairs += n * (uint64_t)group;
      stats->pairs_local += n * (uint64_t)group - read.heads;
      stats->work += n * (uint64_t)group * all * strip_work;
      stats->work_done += read.head_strips * strip_work;
      stats->bytes += n * all * strip_bytes;
      stats->bytes_read += read.strips * strip_bytes;
      stats->pages += read.queries * all;
      stats->pages_read += read.strips;
      if (policy->page_bits) count_scoring(b, &g, policy->page_bits, stats);
      if (b->rest.exists) count_rest(b, &read, (uint64_t)tile->n_pages, stats);
    }
  }
}
