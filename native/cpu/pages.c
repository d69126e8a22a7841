/* The page tier: which strips of the bulk a long head reads, judged by a low-bit sketch of the bulk's keys.
 *
 * A strip's share is its part of all attention of a query head, by sketched scores, beside the true local mass. A head
 * wants the strips whose share exceeds page_share. All long rows of a tile and key/value head read what any scored query
 * of the tile wants. */
#include "cpu.h"
#include "sketch.h"
#include <string.h>

typedef struct page_job {
  const backend *be;
  attention_batch *b;
  const layer_cache *cache;
  const attention_policy *policy;
  page_scratch *scratch; /* one per thread; in decode, one per key/value head */
} page_job;

/* Heads of a group that are long for a query; returns their number. */
static int32_t long_heads(const attention_batch *b, int32_t query, int32_t kv_head, int32_t *heads) {
  int32_t group = b->n_heads / b->n_kv_heads, n = 0;
  for (int32_t h = kv_head * group; h < (kv_head + 1) * group; h++)
    if (b->is_long[query * b->n_heads + h]) heads[n++] = h;
  return n;
}

/* (max_strips) of a loaded head. */
static float *shares_of(const attention_batch *b, const page_scratch *x, int32_t i) {
  return x->shares + (int64_t)i * b->max_strips;
}

enum { ROWS_AT_ONCE = 16 };

/* Puts the sums of the loaded heads' estimated scores over the strips of pages [begin, end) into their shares. */
static void sum_pages(const page_job *job, int32_t kv_head, int32_t begin, int32_t end, page_scratch *x) {
  int32_t d = job->b->head_dim, bits = job->cache->sketch_bits;
  const kernels *k = job->be->kernels;
  const uint8_t *pages = job->cache->sketches[kv_head].pages;
  float scores[ROWS_AT_ONCE * KV_BLOCK];
  for (int32_t p = begin; p < end; p++)
    for (int32_t first = 0; first < x->n; first += ROWS_AT_ONCE) {
      int32_t n = x->n - first < ROWS_AT_ONCE ? x->n - first : ROWS_AT_ONCE;
      k->sketch_scores(pages + (size_t)p * sketch_page_bytes(bits, d), bits, d, x->q + first * d, n, scores, KV_BLOCK);
      for (int32_t r = 0; r < n; r++)
        k->strip_sums(scores + r * KV_BLOCK, KV_STRIPS, x->local_mass[first + r],
                      shares_of(job->b, x, first + r) + p * KV_STRIPS);
    }
}

static uint8_t *wanted_of(const attention_batch *b, int32_t tile_and_head) {
  return b->wanted + (size_t)tile_and_head * (size_t)b->max_strips;
}

/* The share above which a strip is read: page_share, halved until what is left out is at most page_drop. */
static float cut_share(const attention_policy *policy, const float *share, int32_t n_strips) {
  float cut = policy->page_share;
  for (int i = 0; i < 16 && policy->page_drop < 1; i++, cut /= 2) {
    float dropped = 0;
    for (int32_t s = 0; s < n_strips; s++) dropped += share[s] > cut ? 0 : share[s];
    if (dropped <= policy->page_drop) break;
  }
  return cut;
}

/* Puts one query's long heads of a group into x; returns their number. */
static int32_t load_query(const page_job *job, int32_t query, int32_t kv_head, page_scratch *x) {
  const attention_batch *b = job->b;
  const uint16_t *channels = job->cache->sketches[kv_head].channels;
  x->n = long_heads(b, query, kv_head, x->heads);
  for (int32_t i = 0; i < x->n; i++) {
    const float *q = b->q + ((int64_t)query * b->n_heads + x->heads[i]) * b->head_dim;
    for (int32_t j = 0; j < b->head_dim; j++) x->q[i * b->head_dim + j] = q[channels ? channels[j] : j] * b->scale;
    x->local_mass[i] = b->local_mass[(int64_t)query * b->n_heads + x->heads[i]];
  }
  return x->n;
}

/* Adds what the loaded heads want, whose shares are still sums. */
static void want(const page_job *job, int32_t n_strips, page_scratch *x, uint8_t *wanted) {
  for (int32_t i = 0; i < x->n; i++) {
    float *share = shares_of(job->b, x, i);
    job->be->kernels->strip_shares(share, n_strips);
    float cut = cut_share(job->policy, share, n_strips);
    /* Not a number counts as wanted: the safe side. */
    for (int32_t s = 0; s < n_strips; s++) wanted[s] |= !(share[s] <= cut);
  }
}

/* One query after another; returns how many long heads it has. */
static int32_t want_of_query(const page_job *job, const query_tile *tile, int32_t query, int32_t kv_head,
                             page_scratch *x, uint8_t *wanted) {
  if (!load_query(job, query, kv_head, x)) return 0;
  sum_pages(job, kv_head, 0, tile->n_pages, x);
  want(job, tile->n_pages * KV_STRIPS, x, wanted);
  return x->n;
}

static void count_scored(tile_read *read, int32_t n_heads) {
  read->n_scored += n_heads > 0;
  read->n_scored_heads += n_heads;
}

/* Item: one tile and key/value head. */
static void want_of_tiles(void *context, int32_t begin, int32_t end, int32_t thread) {
  const page_job *job = context;
  attention_batch *b = job->b;
  for (int32_t i = begin; i < end; i++) {
    const query_tile *tile = &b->tiles[i / b->n_kv_heads];
    int32_t kv_head = i % b->n_kv_heads;
    uint8_t *wanted = wanted_of(b, i);
    tile_read *read = &b->reads[i];
    memset(wanted, 0, (size_t)tile->n_pages * KV_STRIPS);
    read->n_scored = read->n_scored_heads = 0;
    for (int32_t s = 0; tile->n_pages && s < attention_scored(tile); s++)
      count_scored(read,
                   want_of_query(job, tile, attention_scored_query(tile, s), kv_head, &job->scratch[thread], wanted));
    /* A long head in a query between the scored ones still needs a list. */
    for (int32_t q = tile->first + tile->n - 1; tile->n_pages && !read->n_scored && q >= tile->first; q--)
      count_scored(read, want_of_query(job, tile, q, kv_head, &job->scratch[thread], wanted));
  }
}

/* Decode: a single query, whose pages are scored on all threads. */
enum { PAGES_PER_PIECE = 16 };

static int32_t pieces_of(const query_tile *tile) { return (tile->n_pages + PAGES_PER_PIECE - 1) / PAGES_PER_PIECE; }

static void sum_pieces(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const page_job *job = context;
  const query_tile *tile = job->b->tiles;
  for (int32_t i = begin; i < end; i++) {
    int32_t kv_head = i / pieces_of(tile), first = i % pieces_of(tile) * PAGES_PER_PIECE,
            last = first + PAGES_PER_PIECE;
    sum_pages(job, kv_head, first, last < tile->n_pages ? last : tile->n_pages, &job->scratch[kv_head]);
  }
}

static void want_of_one_query(page_job *job) {
  attention_batch *b = job->b;
  for (int32_t g = 0; g < b->n_kv_heads; g++) {
    memset(wanted_of(b, g), 0, (size_t)b->tiles->n_pages * KV_STRIPS);
    b->reads[g].n_scored_heads = load_query(job, 0, g, &job->scratch[g]);
    b->reads[g].n_scored = b->reads[g].n_scored_heads > 0;
  }
  pool_run(job->be->pool, b->n_kv_heads * pieces_of(b->tiles), 1, sum_pieces, job);
  for (int32_t g = 0; g < b->n_kv_heads; g++)
    want(job, b->tiles->n_pages * KV_STRIPS, &job->scratch[g], wanted_of(b, g));
}

typedef struct fold_job {
  const backend *be;
  const layer_cache *cache;
  int32_t head_dim, n_pages;
} fold_job;

static void fold_sketches(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const fold_job *job = context;
  int32_t d = job->head_dim, bits = job->cache->sketch_bits;
  for (int32_t g = begin; g < end; g++) {
    key_sketch *sketch = &job->cache->sketches[g];
    const uint16_t *blocks = cache_blocks(job->cache, g, d);
    for (; sketch->n_pages < job->n_pages; sketch->n_pages++)
      job->be->kernels->sketch_fold(blocks + (int64_t)(1 + sketch->n_pages) * 2 * KV_BLOCK * d, bits, d,
                                    sketch->channels,
                                    sketch->pages + (size_t)sketch->n_pages * sketch_page_bytes(bits, d));
  }
}

void cpu_want_pages(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy) {
  cpu_scratch *scratch = b->backend_scratch;
  fold_job fold = {be, cache, b->head_dim, b->tiles[b->n_tiles - 1].n_pages};
  pool_run(be->pool, b->n_kv_heads, 1, fold_sketches, &fold);
  page_job job = {be, b, cache, policy, scratch->pages};
  if (b->n == 1) want_of_one_query(&job);
  else pool_run(be->pool, b->n_tiles * b->n_kv_heads, 1, want_of_tiles, &job);
}
