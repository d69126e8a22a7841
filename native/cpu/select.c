/* The head-selection stage: how heavy is the bulk for each query head, judged by its keys' first two moments.
 *
 * With N keys of mean mu and covariance S (ddof 0), scores c q.k have mean c q.mu and variance c^2 q'Sq, and if they
 * were normal, logsumexp over the bulk would be  M = ln N + c q.mu + c^2 q'Sq / 2   (arXiv 2502.09647). */
#include "cpu.h"
#include <math.h>
#include <string.h>

/* Keys of a block as (64, head_dim) floats. */
static void load_keys(const uint16_t *block, int32_t d, float *keys) {
  for (int32_t t = 0; t < KV_BLOCK; t++)
    for (int32_t i = 0; i < d; i++)
      keys[t * d + i] = f16_to_f32(block[((t / STRIP) * (d / 2) + i / 2) * 2 * STRIP + t % STRIP * 2 + i % 2]);
}

static void center(float *keys, int32_t d, float *mean) {
  memset(mean, 0, (size_t)d * sizeof *mean);
  for (int32_t t = 0; t < KV_BLOCK; t++)
    for (int32_t i = 0; i < d; i++) mean[i] += keys[t * d + i];
  for (int32_t i = 0; i < d; i++) mean[i] /= KV_BLOCK;
  for (int32_t t = 0; t < KV_BLOCK; t++)
    for (int32_t i = 0; i < d; i++) keys[t * d + i] -= mean[i];
}

enum { MAX_DIM = 512 };

/* m2 += keys' keys, keys (64, d) centred. */
static void add_outer(const kernels *k, const float *keys, int32_t d, float *m2) {
  float transposed[STRIP * KV_BLOCK], right[KV_BLOCK * STRIP], one[STRIP];
  for (int32_t i = 0; i < STRIP; i++) one[i] = 1.0f;
  for (int32_t column = 0; column < d; column += STRIP) {
    for (int32_t t = 0; t < KV_BLOCK; t++)
      for (int32_t j = 0; j < STRIP; j++) right[(t / 2) * 2 * STRIP + 2 * j + t % 2] = keys[t * d + column + j];
    strips b = {STRIP_F32, 1, KV_BLOCK / 2, {right}};
    for (int32_t row = 0; row < d; row += STRIP) {
      for (int32_t t = 0; t < KV_BLOCK; t++)
        for (int32_t i = 0; i < STRIP; i++) transposed[i * KV_BLOCK + t] = keys[t * d + row + i];
      k->strip_gemm(STRIP, transposed, KV_BLOCK, &b, one, m2 + row * d + column, d);
    }
  }
}

/* Chan, Golub, LeVeque (1979): merging a page's mean and centred squares into the running ones. */
static void fold_page(const kernels *k, key_moments *m, const uint16_t *block, int32_t d) {
  float keys[KV_BLOCK * MAX_DIM], mean[MAX_DIM];
  load_keys(block, d, keys);
  center(keys, d, mean);
  add_outer(k, keys, d, m->m2);
  float before = (float)m->n_pages, share = 1.0f / (before + 1.0f);
  float between = KV_BLOCK * before * share;
  for (int32_t i = 0; i < d; i++) mean[i] -= m->mean[i];
  for (int32_t i = 0; i < d; i++)
    for (int32_t j = 0; j < d; j++) m->m2[i * d + j] += between * mean[i] * mean[j];
  for (int32_t i = 0; i < d; i++) m->mean[i] += share * mean[i];
  m->n_pages++;
}

void moments_fold(const kernels *k, key_moments *m, const uint16_t *blocks, int32_t d, int32_t n_pages) {
  if (m->n_pages == n_pages) return;
  if (m->n_pages > n_pages || m->n_pages == 0) {
    memset(m->mean, 0, (size_t)d * sizeof *m->mean);
    memset(m->m2, 0, (size_t)d * (size_t)d * sizeof *m->m2);
    m->n_pages = 0;
  }
  while (m->n_pages < n_pages) fold_page(k, m, blocks + (int64_t)(1 + m->n_pages) * 2 * KV_BLOCK * d, d);
  float scale = 1.0f / ((float)n_pages * KV_BLOCK);
  for (int32_t j = 0; j < d; j++)
    for (int32_t i = 0; i < d; i++)
      m->strips[((j / STRIP) * (d / 2) + i / 2) * 2 * STRIP + j % STRIP * 2 + i % 2] = m->m2[i * d + j] * scale;
}

/* One state of the moments, that is one query tile: fold, then judge the tile's rows. */
typedef struct select_job {
  const backend *be;
  attention_batch *b;
  const layer_cache *cache;
  const query_tile *tile;
} select_job;

static void fold_heads(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const select_job *job = context;
  for (int32_t g = begin; g < end; g++)
    moments_fold(job->be->kernels, &job->cache->moments[g], cache_blocks(job->cache, g, job->b->head_dim),
                 job->b->head_dim, job->tile->n_pages);
}

/* bulk_mass of one query's rows of one key/value head. */
static void judge(const select_job *job, int32_t query, int32_t kv_head) {
  attention_batch *b = job->b;
  const kernels *k = job->be->kernels;
  const key_moments *m = &job->cache->moments[kv_head];
  int32_t d = b->head_dim, group = b->n_heads / b->n_kv_heads;
  int64_t row = (int64_t)query * b->n_heads + kv_head * group;
  float log_n = logf((float)job->tile->n_pages * KV_BLOCK), product[MAX_DIM];
  for (int32_t h = 0; h < group; h++) {
    const float *q = b->q + (row + h) * d;
    for (int32_t j = 0; j < d / STRIP; j++) {
      strips s = {STRIP_F32, 1, d / 2, {m->strips + j * d * STRIP}};
      k->strip_gemm(1, q, d, &s, NULL, product + j * STRIP, STRIP);
    }
    float variance = b->scale * b->scale * k->dot(q, product, d);
    b->bulk_mass[row + h] = log_n + b->scale * k->dot(q, m->mean, d) + variance / 2;
  }
}

static void judge_queries(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const select_job *job = context;
  for (int32_t i = begin; i < end; i++)
    for (int32_t g = 0; g < job->b->n_kv_heads; g++) judge(job, job->tile->first + i, g);
}

static void estimate_bulk_mass(const backend *be, attention_batch *b, const layer_cache *cache) {
  for (int32_t t = 0; t < b->n_tiles; t++) {
    if (b->tiles[t].n_pages == 0) continue;
    select_job job = {be, b, cache, &b->tiles[t]};
    bool folded = cache->moments[0].n_pages == job.tile->n_pages;
    if (!folded) pool_run(be->pool, b->n_kv_heads, 1, fold_heads, &job);
    pool_run(be->pool, job.tile->n, 4, judge_queries, &job);
  }
}

void cpu_select(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy,
                int32_t layer) {
  bool bulk = b->tiles[b->n_tiles - 1].n_pages > 0;
  if (bulk && policy->policy == PYLLM_ADAPTIVE) estimate_bulk_mass(be, b, cache);
  if (bulk && policy->policy == PYLLM_ORACLE) cpu_true_bulk_mass(be, b, cache, NULL, b->bulk_mass);
  attention_decide(b, policy, layer);
  if (bulk && policy->page_bits) cpu_want_pages(be, b, cache, policy);
  attention_list_long(b, policy->page_bits != 0);
}
