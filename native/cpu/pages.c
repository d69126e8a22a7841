/* The page tier: which strips of the bulk a long head reads, judged by a low-bit sketch of the bulk's keys.
 *
 * A strip's share is its part of all attention of a query head, by sketched scores, beside the true local mass. A
 * head wants the strips whose share exceeds page_share, in decode decode_share. In a tile the long rows of a head
 * read what any scored one of them wants, and where a group's heads share a list (attention_sharing), what any of
 * all their scored rows wants. */
#include "cpu.h"
#include "sketch.h"
#include <stdatomic.h>
#include <string.h>

typedef struct page_job {
  const backend *be;
  attention_batch *b;
  const layer_cache *cache;
  const attention_policy *policy;
  page_scratch *scratch; /* one per thread; in decode, one per key/value head */
} page_job;

/* The heads of a tile that share a list of strips. */
typedef struct page_list {
  const query_tile *tile;
  int32_t first, n_heads;
  tile_read *read;
  uint8_t *wanted; /* (max_strips) */
} page_list;

/* Whose heads begin with `first`. */
static page_list list_at(const attention_batch *b, int32_t tile, int32_t first) {
  const query_tile *t = &b->tiles[tile];
  return (page_list){t, first, attention_sharing(t, b->n_heads / b->n_kv_heads), attention_read(b, tile, first),
                     attention_wanted(b, tile, first)};
}

/* (max_strips) of a loaded row. */
static float *shares_of(const attention_batch *b, const page_scratch *x, int32_t i) {
  return x->shares + (int64_t)i * b->max_strips;
}

/* Puts the sums of the loaded rows' estimated scores over the strips of pages [begin, end) into their shares. */
static void sum_pages(const page_job *job, int32_t begin, int32_t end, page_scratch *x) {
  int32_t d = job->b->head_dim, bits = job->cache->sketch_bits;
  const uint8_t *pages = job->cache->sketches[x->kv_head].pages;
  for (int32_t p = begin; p < end; p++)
    job->be->kernels->sketch_sums(pages + (size_t)p * sketch_page_bytes(bits, d), bits, d, x->q, x->local_mass, x->n,
                                  x->shares + p * KV_STRIPS, job->b->max_strips);
}

/* The share above which a strip is read: the policy's, halved until what is left out is at most page_drop. */
static float cut_share(const attention_policy *policy, const query_tile *tile, const float *share, int32_t n_strips) {
  float cut = attention_cut(tile, policy->page_share, policy->decode_share);
  for (int32_t i = 0; i < CUT_HALVINGS && policy->page_drop < 1; i++, cut /= 2) {
    float dropped = 0;
    for (int32_t s = 0; s < n_strips; s++) dropped += share[s] > cut ? 0 : share[s];
    if (dropped <= policy->page_drop) break;
  }
  return cut;
}

static void load_row(const page_job *job, int64_t row, page_scratch *x) {
  const attention_batch *b = job->b;
  const uint16_t *channels = job->cache->sketches[x->kv_head].channels;
  const float *q = b->q + row * b->head_dim;
  float *to = x->q + x->n * b->head_dim;
  for (int32_t j = 0; j < b->head_dim; j++) to[j] = q[channels ? channels[j] : j] * b->scale;
  x->local_mass[x->n++] = b->local_mass[row];
}

/* Loads a query's long rows of the list. */
static void load_query(const page_job *job, const page_list *list, int32_t query, page_scratch *x) {
  int32_t before = x->n;
  for (int32_t h = list->first; h < list->first + list->n_heads; h++) {
    int64_t row = (int64_t)query * job->b->n_heads + h;
    if (job->b->is_long[row]) load_row(job, row, x);
  }
  if (x->n > before) list->read->scored |= 1ull << (query - list->tile->first);
}

/* Loads the rows that are scored for a list. */
static void load_list(const page_job *job, const page_list *list, page_scratch *x) {
  const query_tile *tile = list->tile;
  x->n = 0;
  x->kv_head = list->first / (job->b->n_heads / job->b->n_kv_heads);
  list->read->scored = 0;
  for (int32_t s = 0; tile->n_pages && s < attention_scored(tile); s++)
    load_query(job, list, attention_scored_query(tile, s), x);
  /* A long head in a query between the scored ones still needs a list. */
  for (int32_t q = tile->first + tile->n - 1; tile->n_pages && !x->n && q >= tile->first; q--)
    load_query(job, list, q, x);
  list->read->n_scored_rows = x->n;
}

/* Marks what the loaded rows want, whose shares are still sums, and sets their totals. */
static void want(const page_job *job, const page_list *list, page_scratch *x) {
  int32_t n_strips = list->tile->n_pages * KV_STRIPS;
  memset(list->wanted, 0, (size_t)n_strips);
  for (int32_t i = 0; i < x->n; i++) {
    float *share = shares_of(job->b, x, i);
    x->total[i] = job->be->kernels->strip_shares(share, n_strips);
    float cut = cut_share(job->policy, list->tile, share, n_strips);
    /* Not a number counts as wanted: the safe side. */
    for (int32_t s = 0; s < n_strips; s++) list->wanted[s] |= !(share[s] <= cut);
  }
}

/* Item: one tile and head, which does something where a list begins with it. */
static void want_of_lists(void *context, int32_t begin, int32_t end, int32_t thread) {
  const page_job *job = context;
  page_scratch *x = &job->scratch[thread];
  for (int32_t i = begin; i < end; i++) {
    page_list list = list_at(job->b, i / job->b->n_heads, i % job->b->n_heads);
    if (list.first % list.n_heads) continue;
    load_list(job, &list, x);
    if (x->n) sum_pages(job, 0, list.tile->n_pages, x);
    want(job, &list, x);
  }
}

/* Decode: a single query, whose pages are scored on all threads; the thread that scores a group's last piece finds
 * what it wants. */
enum { PAGES_PER_PIECE = 16 };

/* One even where there are no pages. */
static int32_t pieces_of(const query_tile *tile) {
  return tile->n_pages > 0 ? (tile->n_pages + PAGES_PER_PIECE - 1) / PAGES_PER_PIECE : 1;
}

static void want_of_group(const page_job *job, int32_t g) {
  attention_batch *b = job->b;
  page_list list = list_at(b, 0, g * (b->n_heads / b->n_kv_heads));
  want(job, &list, &job->scratch[g]);
  if (b->rest.exists)
    cpu_rest(job->be, b, &job->cache->sketches[g], &job->scratch[g], list.wanted, job->policy->page_rest);
}

static void sum_pieces(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const page_job *job = context;
  const query_tile *tile = job->b->tiles;
  for (int32_t i = begin; i < end; i++) {
    int32_t g = i / pieces_of(tile), first = i % pieces_of(tile) * PAGES_PER_PIECE, last = first + PAGES_PER_PIECE;
    page_scratch *x = &job->scratch[g];
    sum_pages(job, first, last < tile->n_pages ? last : tile->n_pages, x);
    if (atomic_fetch_sub(&x->pieces_left, 1) == 1) want_of_group(job, g);
  }
}

static void want_of_one_query(page_job *job) {
  attention_batch *b = job->b;
  int32_t group = b->n_heads / b->n_kv_heads, pieces = pieces_of(b->tiles);
  for (int32_t g = 0; g < b->n_kv_heads; g++) {
    page_list list = list_at(b, 0, g * group);
    load_list(job, &list, &job->scratch[g]);
    atomic_store(&job->scratch[g].pieces_left, pieces);
  }
  pool_run(job->be->pool, b->n_kv_heads * pieces, 1, sum_pieces, job);
}

typedef struct fold_job {
  const backend *be;
  const layer_cache *cache;
  int32_t head_dim, n_pages;
  float scale;
} fold_job;

static void fold_page(const fold_job *job, const key_sketch *sketch, const uint16_t *block, int32_t page) {
  int32_t d = job->head_dim, bits = job->cache->sketch_bits;
  uint8_t *to = sketch->pages + (size_t)page * sketch_page_bytes(bits, d);
  job->be->kernels->sketch_fold(block, bits, d, sketch->channels, to);
  if (sketch->usual) cpu_usual_value(job->be->kernels, sketch, block, d, job->scale, page);
}

static void fold_sketches(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const fold_job *job = context;
  half_block made;
  for (int32_t g = begin; g < end; g++) {
    key_sketch *sketch = &job->cache->sketches[g];
    for (; sketch->n_pages < job->n_pages; sketch->n_pages++) {
      int32_t page = sketch->n_pages;
      fold_page(job, sketch, cache_halves(job->be->kernels, job->cache, g, 1 + page, job->head_dim, made), page);
    }
  }
}

/* In decode mostly. */
static bool all_sketched(const fold_job *job, int32_t n_kv_heads) {
  for (int32_t g = 0; g < n_kv_heads; g++)
    if (job->cache->sketches[g].n_pages < job->n_pages) return false;
  return true;
}

void cpu_want_pages(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy) {
  cpu_scratch *scratch = b->backend_scratch;
  fold_job fold = {be, cache, b->head_dim, b->tiles[b->n_tiles - 1].n_pages, b->scale};
  if (!all_sketched(&fold, b->n_kv_heads)) pool_run(be->pool, b->n_kv_heads, 1, fold_sketches, &fold);
  page_job job = {be, b, cache, policy, scratch->pages};
  int32_t group = b->n_heads / b->n_kv_heads;
  bool together = b->n == 1 && attention_sharing(b->tiles, group) == group;
  b->rest.exists = b->n == 1 && policy->page_rest > 0; /* which is 0 where they have lists of their own */
  if (together) want_of_one_query(&job);
  else pool_run(be->pool, b->n_tiles * b->n_heads, 1, want_of_lists, &job);
}
