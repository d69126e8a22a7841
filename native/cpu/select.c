/* The head-selection stage: how heavy is the bulk for each query head, judged by its keys' first two moments.
 *
 * With keys of mean mu and covariance S, scores c q.k have mean c q.mu and variance c^2 q'Sq; what follows from
 * these is estimate.h's. */
#include "cpu.h"
#include "estimate.h"
#include <math.h>

/* One state of the moments, that is one query tile: fold, then judge the tile's rows. */
typedef struct select_job {
  const backend *be;
  attention_batch *b;
  const layer_cache *cache;
  const attention_policy *policy;
  int32_t layer;
  const query_tile *tile;
} select_job;

static void fold_heads(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const select_job *job = context;
  for (int32_t g = begin; g < end; g++)
    moments_fold(job->be->kernels, job->cache, g, job->b->head_dim, job->tile->n_pages);
}

/* What a key/value head's keys are taken to be like: mean (head_dim), covariance as key_moments.strips. */
typedef struct key_model {
  const float *mean, *strips;
} key_model;

static key_model key_model_of(const select_job *job, int32_t kv_head) {
  const attention_policy *p = job->policy;
  size_t head = (size_t)job->layer * (size_t)job->b->n_kv_heads + (size_t)kv_head, d = (size_t)job->b->head_dim;
  if (p->means) return (key_model){p->means + head * d, job->cache->calibrated + (size_t)kv_head * d * d};
  return (key_model){job->cache->moments[kv_head].mean, job->cache->moments[kv_head].strips};
}

enum { ROWS_AT_ONCE = 6 };

/* mean_score, deviation and bulk_mass of n <= ROWS_AT_ONCE neighbouring rows of one query and key/value head. */
static void judge_rows(const select_job *job, int64_t row, int32_t n, const key_model *keys) {
  attention_batch *b = job->b;
  const kernels *k = job->be->kernels;
  int32_t d = b->head_dim;
  const float *q = b->q + row * d;
  float product[ROWS_AT_ONCE * LARGEST_HEAD];
  for (int32_t j = 0; j < d / STRIP; j++) {
    strips s = {STRIP_F32, 1, d / 2, {keys->strips + j * d * STRIP}, {0}};
    k->strip_gemm(n, q, d, &s, NULL, product + j * STRIP, d);
  }
  for (int32_t i = 0; i < n; i++, row++, q += d) {
    float variance = b->scale * b->scale * k->dot(q, product + i * d, d);
    if (variance < 0) variance = 0; /* by rounding */
    b->mean_score[row] = b->scale * k->dot(q, keys->mean, d);
    b->deviation[row] = sqrtf(variance);
    const attention_policy *p = job->policy;
    const float *c = p->coefficients ? p->coefficients + 3 * (job->layer * b->n_heads + row % b->n_heads) : NULL;
    b->bulk_mass[row] =
        bulk_estimate(p->gaussian, p->estimate, c, job->tile->n_pages * KV_BLOCK, b->mean_score[row], variance);
  }
}

static void judge(const select_job *job, int32_t query, int32_t kv_head) {
  key_model keys = key_model_of(job, kv_head);
  int32_t group = job->b->n_heads / job->b->n_kv_heads;
  int64_t first = (int64_t)query * job->b->n_heads + kv_head * group;
  for (int32_t i = 0; i < group; i += ROWS_AT_ONCE)
    judge_rows(job, first + i, group - i < ROWS_AT_ONCE ? group - i : ROWS_AT_ONCE, &keys);
}

static void judge_queries(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const select_job *job = context;
  for (int32_t i = begin; i < end; i++)
    for (int32_t g = 0; g < job->b->n_kv_heads; g++) judge(job, job->tile->first + i, g);
}

/* In decode mostly; of every head, for pyllm_session_moments folds one alone. */
static bool all_folded(const select_job *job) {
  for (int32_t g = 0; g < job->b->n_kv_heads; g++)
    if (job->cache->moments[g].n_pages != job->tile->n_pages) return false;
  return true;
}

static void estimate_bulk_mass(const backend *be, attention_batch *b, const layer_cache *cache,
                               const attention_policy *policy, int32_t layer) {
  for (int32_t t = 0; t < b->n_tiles; t++) {
    if (b->tiles[t].n_pages == 0) continue;
    select_job job = {be, b, cache, policy, layer, &b->tiles[t]};
    if (!policy->means && !all_folded(&job)) pool_run(be->pool, b->n_kv_heads, 1, fold_heads, &job);
    pool_run(be->pool, job.tile->n, 4, judge_queries, &job);
  }
}

void cpu_select(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy,
                int32_t layer) {
  bool bulk = b->tiles[b->n_tiles - 1].n_pages > 0;
  if (bulk && policy->policy == PYLLM_ADAPTIVE) estimate_bulk_mass(be, b, cache, policy, layer);
  if (bulk && policy->policy == PYLLM_ORACLE) cpu_true_bulk_mass(be, b, cache, NULL, b->bulk_mass);
  attention_decide(b, policy, layer);
  b->rest.exists = false;
  if (bulk && policy->page_bits) cpu_want_pages(be, b, cache, policy);
  attention_list_long(b, policy->page_bits != 0);
}
