/* Where tokens live and which of them a query sees: pure functions of positions, for every backend. */
#ifndef PYLLM_SRC_GEOMETRY_H
#define PYLLM_SRC_GEOMETRY_H
#include "anywhere.h"
#include "pyllm.h"

enum { STRIPS_PER_PAGE = PYLLM_PAGE / PYLLM_READ_PAGE };

/* Dimensions of a head, at most; a GPU has kernels for fewer. */
enum { LARGEST_HEAD = 512 };

/* Where a token lives: block 0 holds the sinks, block 1 + i the i-th page behind them. */
ANYWHERE int32_t kv_block_of(int32_t n_sink, int32_t position) {
  return position < n_sink ? 0 : 1 + (position - n_sink) / PYLLM_PAGE;
}
ANYWHERE int32_t kv_block_start(int32_t n_sink, int32_t block) {
  return block == 0 ? 0 : n_sink + (block - 1) * PYLLM_PAGE;
}
/* Blocks that one head needs for n_ctx tokens. */
ANYWHERE int32_t kv_blocks(int32_t n_ctx, int32_t n_sink) {
  return 1 + (n_ctx > n_sink ? (n_ctx - n_sink + PYLLM_PAGE - 1) / PYLLM_PAGE : 0);
}
/* Bytes of 16 tokens' keys and of their values, by enum pyllm_kv_type: halves; or bytes, and behind them scales f16,
 * of keys (head_dim / 32, 16) and of values (16). And of a block: 4 strips of keys, then 4 of values. */
enum { KEY_GROUP = 32 }; /* dimensions that share a scale */
ANYWHERE int32_t key_strip_bytes(int32_t kv_type, int32_t head_dim) {
  return PYLLM_READ_PAGE * (kv_type == PYLLM_KV_Q8_0 ? head_dim + head_dim / KEY_GROUP * 2 : 2 * head_dim);
}
ANYWHERE int32_t value_strip_bytes(int32_t kv_type, int32_t head_dim) {
  return PYLLM_READ_PAGE * (kv_type == PYLLM_KV_Q8_0 ? head_dim + 2 : 2 * head_dim);
}
ANYWHERE uint64_t kv_block_bytes(int32_t kv_type, int32_t head_dim) {
  return STRIPS_PER_PAGE * (uint64_t)(key_strip_bytes(kv_type, head_dim) + value_strip_bytes(kv_type, head_dim));
}
/* Dimension i of token `slot` within the keys of a block of halves, and within its values, in the CPU's cache and in
 * a saved session: strips of 16 tokens, keys (head_dim / 2, 16, 2) and values (head_dim / 16, 8, 16, 2). Bytes lie
 * likewise in their strips. */
ANYWHERE int32_t block_key_index(int32_t head_dim, int32_t slot, int32_t i) {
  return slot / 16 * 16 * head_dim + i / 2 * 32 + 2 * (slot % 16) + i % 2;
}
ANYWHERE int32_t block_value_index(int32_t head_dim, int32_t slot, int32_t i) {
  return slot / 16 * 16 * head_dim + i / 16 * 256 + slot % 16 / 2 * 32 + 2 * (i % 16) + slot % 2;
}
/* Keys of a block that the query at `position` may see: 0..64. */
ANYWHERE int32_t kv_visible(int32_t n_sink, int32_t block, int32_t position) {
  int32_t n = position + 1 - kv_block_start(n_sink, block), most = block == 0 ? n_sink : PYLLM_PAGE;
  return n < 0 ? 0 : n < most ? n : most;
}
/* The same for a strip of 16 tokens; strip s is part of block s / 4. */
ANYWHERE int32_t strip_visible(int32_t n_sink, int32_t strip, int32_t position) {
  int32_t block = strip / STRIPS_PER_PAGE, before = strip % STRIPS_PER_PAGE * PYLLM_READ_PAGE;
  int32_t n = kv_visible(n_sink, block, position) - before;
  return n < 0 ? 0 : n < PYLLM_READ_PAGE ? n : PYLLM_READ_PAGE;
}
/* Pages in the bulk of the query at `position`: those wholly older than its window. */
ANYWHERE int32_t bulk_pages(int32_t n_sink, int32_t n_window, int32_t position) {
  int64_t older = (int64_t)position + 1 - n_window - n_sink;
  return older > 0 ? (int32_t)(older / PYLLM_PAGE) : 0;
}

/* Strips of a bulk in a context of n_ctx tokens, at most. */
ANYWHERE int32_t most_strips(int32_t n_ctx) { return (n_ctx / PYLLM_PAGE + 1) * STRIPS_PER_PAGE; }

/* Consecutive queries with the same bulk, at most 64. */
typedef struct query_tile {
  int32_t first, n; /* queries of the batch */
  int32_t n_pages;  /* of their bulk */
} query_tile;

/* The tile that begins with query `first` of a batch of n queries, whose first one is at `position`; first < n. */
ANYWHERE query_tile tile_from(int32_t n_sink, int32_t n_window, int32_t position, int32_t first, int32_t n) {
  query_tile tile = {first, n - first, bulk_pages(n_sink, n_window, position + first)};
  if (tile.n > PYLLM_PAGE) tile.n = PYLLM_PAGE;
  int64_t moves = (int64_t)n_sink + n_window + (int64_t)PYLLM_PAGE * (tile.n_pages + 1) - 1 - position - first;
  if (tile.n > moves) tile.n = (int32_t)moves;
  return tile;
}

/* Tiles of a batch of n queries, at most: full ones, and cut ones at both ends and where the first page leaves the
 * window. */
ANYWHERE int32_t most_tiles(int32_t n) { return n == 1 ? 1 : n / PYLLM_PAGE + 4; }

/* Queries of a tile that a page tier scores, from the last one back: up to 16, so every 4th one of a whole tile, and
 * all of a short question, each of which may look for something else. i < attention_scored(tile). */
enum { SCORED_MOST = 16 };
ANYWHERE int32_t attention_scored_stride(const query_tile *tile) { return (tile->n + SCORED_MOST - 1) / SCORED_MOST; }
ANYWHERE int32_t attention_scored(const query_tile *tile) {
  int32_t stride = attention_scored_stride(tile);
  return (tile->n + stride - 1) / stride;
}
ANYWHERE int32_t attention_scored_query(const query_tile *tile, int32_t i) {
  return tile->first + tile->n - 1 - i * attention_scored_stride(tile);
}

/* Above which share of attention a tile's heads want a strip: of a policy's two the one for prefill, or for decode. */
ANYWHERE float attention_cut(const query_tile *tile, float page_share, float decode_share) {
  return tile->n == 1 ? decode_share : page_share;
}

/* How often such a cut is halved, at most, where it leaves out more than the policy's page_drop. */
enum { CUT_HALVINGS = 16 };

/* How many neighbouring heads of a group share a list of strips in a page tier: all where a tile has few rows of
 * theirs, as in decode, for there what is read is what costs; otherwise each has its own, for what is computed is. */
enum { SHARED_ROWS = 64 };
ANYWHERE int32_t attention_sharing(const query_tile *tile, int32_t group) {
  return (int64_t)tile->n * group <= SHARED_ROWS ? group : 1;
}

#endif
