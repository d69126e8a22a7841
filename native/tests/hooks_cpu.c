/* Hooks into the CPU backend: whole stages on the caller's arrays. */
#include "cpu.h"
#include "error.h"
#include "estimate.h"
#include "hooks.h"
#include "record.h"
#include <stdlib.h>
#include <string.h>

static int32_t open_backend(const char *isa, int32_t n_threads, backend *be, pyllm_error *err) {
  *be = (backend){&cpu_ops, NULL, kernels_find(isa), NULL, &cpu_ops};
  if (!be->kernels) return fail(err, PYLLM_ERR_UNSUPPORTED, "no %s here: %s", isa, kernels_available());
  be->pool = pool_new(n_threads);
  return be->pool ? PYLLM_OK : fail(err, PYLLM_ERR_MEMORY, "threads refused");
}

int32_t hook_rounded(const char *isa, const float *x, float *out, int32_t n, pyllm_error *err) {
  const kernels *k = kernels_find(isa);
  if (!k || n % ACT_GROUP) return fail(err, PYLLM_ERR_ARGUMENT, "no such instruction set, or %d values", n);
  int8_t planes[2 * ACT_GROUP];
  int32_t sum[2];
  float scale, product[2];
  for (int32_t i = 0; i < n; i += ACT_GROUP) {
    k->quantize(x + i, ACT_GROUP, planes, &scale, sum, product);
    for (int32_t j = 0; j < ACT_GROUP; j++) out[i + j] = scale * (float)quantized_at(planes, k->words, (size_t)j);
  }
  return PYLLM_OK;
}

int32_t hook_moments(const char *isa, const float *k, int32_t n_pages, int32_t head_dim, float *mean, float *cov,
                     pyllm_error *err) {
  const kernels *kernel = kernels_find(isa);
  if (!kernel) return fail(err, PYLLM_ERR_UNSUPPORTED, "no %s here: %s", isa, kernels_available());
  size_t d = (size_t)head_dim, block = 2 * KV_BLOCK * d;
  uint16_t *blocks = calloc((size_t)(1 + n_pages) * block, sizeof *blocks); /* the first one is the sinks' */
  float *memory = calloc(d * (1 + 2 * d), sizeof *memory);
  key_moments m = {0, memory, memory + d, memory + d + d * d};
  for (int32_t p = 0; p < n_pages; p++) {
    uint16_t *keys = blocks + (size_t)(1 + p) * block;
    for (int32_t t = 0; t < KV_BLOCK; t++) {
      const float *key = k + ((size_t)p * KV_BLOCK + (size_t)t) * d;
      kernel->kv_store(key, key, head_dim, t, keys, keys + KV_BLOCK * d);
    }
    moments_fold(kernel, &m, blocks, head_dim, p + 1);
    memcpy(mean + (size_t)p * d, m.mean, d * sizeof *mean);
    for (size_t i = 0; i < d * d; i++) cov[(size_t)p * d * d + i] = m.m2[i] / (float)((p + 1) * KV_BLOCK);
  }
  free(memory);
  free(blocks);
  return PYLLM_OK;
}

int32_t hook_bulk_estimate(int32_t gaussian, int32_t estimate, const float *coefficients, int32_t n_keys,
                           const float *mean_score, const float *variance, int32_t n, float *out) {
  attention_policy p = {.gaussian = gaussian, .estimate = estimate, .coefficients = (float *)coefficients};
  for (int32_t i = 0; i < n; i++) out[i] = bulk_estimate(&p, 0, n_keys, mean_score[i], variance[i]);
  return PYLLM_OK;
}

typedef struct attention_run {
  backend be;
  attention_batch batch;
  layer_cache cache;
  attention_policy policy;
} attention_run;

static bool open_run(attention_run *run, const hook_attention_shape *s) {
  size_t d = (size_t)s->head_dim, g = (size_t)s->n_kv_heads;
  run->cache.n_blocks = 2 + s->n / PYLLM_PAGE;
  run->cache.kv = calloc(g * (size_t)run->cache.n_blocks * 2 * PYLLM_PAGE * d, sizeof(uint16_t));
  run->cache.moments = calloc(g, sizeof(key_moments));
  for (size_t i = 0; i < g; i++) {
    float *memory = calloc(d * (1 + 2 * d), sizeof *memory);
    run->cache.moments[i] = (key_moments){0, memory, memory + d, memory + d + d * d};
  }
  attention_shape shape = {s->chunk, s->n, s->n_heads, s->n_kv_heads, s->head_dim, s->n_sink, s->scale};
  run->cache.sketches = calloc(g, sizeof(key_sketch));
  run->cache.sketch_bits = run->policy.page_bits;
  for (size_t i = 0; i < g && run->policy.page_bits; i++)
    run->cache.sketches[i].pages =
        calloc((size_t)run->cache.n_blocks, run->be.ops->sketch_bytes(run->policy.page_bits, s->head_dim));
  bool ok = attention_new(&run->batch, &shape);
  run->batch.backend_scratch = run->be.ops->scratch_new(&run->be, &shape);
  return ok && run->batch.backend_scratch;
}

static void close_run(attention_run *run, const hook_attention_shape *s) {
  for (int32_t i = 0; i < s->n_kv_heads; i++) free(run->cache.moments[i].mean);
  for (int32_t i = 0; i < s->n_kv_heads; i++) free(run->cache.sketches[i].pages);
  free(run->cache.moments);
  free(run->cache.sketches);
  free(run->cache.kv);
  attention_free(&run->batch);
  policy_free(&run->policy);
  run->be.ops->scratch_free(run->batch.backend_scratch);
  pool_free(run->be.pool);
}

static void run_chunk(attention_run *run, const hook_attention_shape *s, int32_t position, int32_t n, float *q,
                      float *k, const float *v, const pyllm_record *record, uint64_t sketch_bytes,
                      pyllm_layer_stats *stats, activation *out) {
  rope_job rope = {ROPE_PAIRS, 0, s->n_heads, s->n_kv_heads, s->head_dim, s->n_sink, position, q, q, NULL, NULL, 0,
                   q,          k, v};
  const ops *o = run->be.ops;
  run->batch.q = q;
  attention_plan(&run->batch, run->policy.n_window, position, n);
  o->rope_store(&run->be, &rope, n, &run->cache);
  o->attend_local(&run->be, &run->batch, &run->cache);
  o->select(&run->be, &run->batch, &run->cache, &run->policy, 0);
  o->attend_bulk(&run->be, &run->batch, &run->cache);
  attention_count(&run->batch, sketch_bytes, stats);
  if (record) {
    batch_record rows = {record, s->n, position};
    pyllm_record chunk = record_rows(&rows, 0, s->n_heads);
    o->record(&run->be, &run->batch, &run->cache, &run->policy, &chunk);
  }
  o->finish(&run->be, &run->batch, false, out);
}

int32_t hook_attention(const char *isa, int32_t n_threads, const hook_attention_shape *s,
                       const pyllm_attention *attention, const float *q, const float *k, const float *v, float *out,
                       uint8_t *is_long, float *local_mass, float *bulk_mass, pyllm_layer_stats *stats,
                       const pyllm_record *record, pyllm_error *err) {
  attention_run run = {0};
  policy_shape shape = {1, s->n_heads, s->n_kv_heads, s->head_dim};
  int32_t status = policy_new(attention, &shape, &run.policy, err);
  if (!status) status = open_backend(isa, n_threads, &run.be, err);
  if (status) {
    policy_free(&run.policy);
    return status;
  }
  *stats = (pyllm_layer_stats){0};
  if (!open_run(&run, s)) status = fail(err, PYLLM_ERR_MEMORY, "memory refused");
  uint64_t sketch_bytes = attention->page_bits ? run.be.ops->sketch_bytes(attention->page_bits, s->head_dim) : 0;
  pool_begin(run.be.pool);
  size_t q_width = (size_t)s->n_heads * (size_t)s->head_dim, kv_width = (size_t)s->n_kv_heads * (size_t)s->head_dim;
  for (int32_t t = 0; t < s->n && !status; t += s->chunk) {
    int32_t n = s->n - t < s->chunk ? s->n - t : s->chunk;
    activation result = {(int32_t)q_width, out + (size_t)t * q_width, {0}};
    run_chunk(&run, s, t, n, (float *)q + (size_t)t * q_width, (float *)k + (size_t)t * kv_width,
              v + (size_t)t * kv_width, record, sketch_bytes, stats, &result);
    size_t row = (size_t)t * (size_t)s->n_heads, rows = (size_t)n * (size_t)s->n_heads;
    memcpy(is_long + row, run.batch.is_long, rows);
    memcpy(local_mass + row, run.batch.local_mass, rows * sizeof(float));
    memcpy(bulk_mass + row, run.batch.bulk_mass, rows * sizeof(float));
  }
  pool_end(run.be.pool);
  close_run(&run, s);
  return status;
}
