/* A session's attention on the CPU: its memory, and the stages as ops.h has them. */
#include "cpu.h"
#include "error.h"
#include "sketch.h"
#include <stdlib.h>
#include <string.h>

static int32_t check_shape(const attention_shape *s, pyllm_error *err) {
  if (s->kv_type == PYLLM_KV_Q8_0 && s->head_dim % KEY_GROUP != 0)
    return fail(err, PYLLM_ERR_UNSUPPORTED, "kv_type q8_0: heads of %d dimensions, expected a multiple of %d",
                s->head_dim, KEY_GROUP);
  if (s->kv_window == 0) return PYLLM_OK;
  return fail(err, PYLLM_ERR_ARGUMENT, "a KV cache split between a GPU's memory and the host's, on the CPU");
}

static int32_t memory_needed(const backend *be, const attention_shape *s, int32_t page_bits, pyllm_session_memory *out,
                             pyllm_error *err) {
  int32_t status = check_shape(s, err);
  if (status) return status;
  uint64_t heads = (uint64_t)s->n_layers * (uint64_t)s->n_kv_heads, blocks = (uint64_t)kv_blocks(s->n_ctx, s->n_sink);
  out->kv_bytes = 0;
  for (int32_t i = 0; i < s->n_layers; i++)
    out->kv_bytes += (uint64_t)s->n_kv_heads * blocks * kv_block_bytes(attention_kv_type(s, i), s->head_dim);
  out->host_bytes = 0;
  out->moment_bytes = heads * moment_floats((size_t)s->head_dim) * sizeof(float);
  out->sketch_bytes = page_bits ? heads * blocks * sketch_page_bytes(page_bits, s->head_dim) : 0;
  if (page_bits == PYLLM_GRADED)
    out->sketch_bytes += heads * usual_halves((int32_t)blocks, s->head_dim) * sizeof(uint16_t);
  out->scratch_bytes += attention_bytes(s) + cpu_scratch_bytes(pool_size(be->pool), s);
  return PYLLM_OK;
}

static void free_sketches(sketch_memory *m) {
  free(m->pages);
  free(m->usual);
  sketch_recipe_free(&m->recipe);
}

static void free_state(const backend *be, attention_state *a) {
  (void)be;
  if (!a) return;
  for (int32_t i = 0; a->layers && i < a->shape.n_layers; i++) cpu_cache_free(&a->layers[i], &a->shape);
  cpu_scratch_free(a->batch.backend_scratch);
  attention_free(&a->batch);
  free(a->layers);
  free_sketches(&a->sketch);
  free(a->calibrated);
  free(a->stats);
  free(a);
}

static bool take_memory(const backend *be, attention_state *a) {
  a->layers = calloc((size_t)a->shape.n_layers, sizeof *a->layers);
  a->stats = calloc((size_t)a->shape.n_layers, sizeof *a->stats);
  if (!a->layers || !a->stats) return false;
  for (int32_t i = 0; i < a->shape.n_layers; i++)
    if (!cpu_cache_new(&a->layers[i], &a->shape, attention_kv_type(&a->shape, i))) return false;
  bool ok = attention_new(&a->batch, &a->shape);
  a->batch.backend_scratch = cpu_scratch_new(be, &a->shape);
  return ok && a->batch.backend_scratch;
}

static int32_t new_state(const backend *be, const attention_shape *shape, attention_state **out, pyllm_error *err) {
  int32_t status = check_shape(shape, err);
  if (status) return status;
  attention_state *a = calloc(1, sizeof *a);
  if (a) a->shape = *shape;
  if (!a || !take_memory(be, a)) {
    free_state(be, a);
    return fail(err, PYLLM_ERR_MEMORY, "memory for the KV cache of a context of %d tokens was refused", shape->n_ctx);
  }
  *out = a;
  return PYLLM_OK;
}

/* Memory for the policy's sketches in every layer; false when it is refused, and what there is is still to be freed. */
static bool take_sketches(const attention_state *a, const attention_policy *p, size_t heads, sketch_memory *m) {
  int32_t blocks = a->layers->n_blocks, d = a->shape.head_dim;
  bool graded = p->page_bits == PYLLM_GRADED;
  m->pages = calloc(heads * (size_t)blocks, sketch_page_bytes(p->page_bits, d));
  if (graded) m->usual = calloc(heads * usual_halves(blocks, d), sizeof *m->usual);
  return sketch_recipe_new(p, heads * (size_t)d, &m->recipe) && m->pages && (m->usual || !graded);
}

/* The policy's covariances as strips; NULL where there are none, or when memory is refused. */
static float *calibrated_strips(const attention_policy *p, size_t heads, int32_t head_dim) {
  size_t d = (size_t)head_dim;
  float *made = p->covariances ? malloc(heads * d * d * sizeof *made) : NULL;
  for (size_t i = 0; made && i < heads; i++)
    covariance_strips(p->covariances + i * d * d, head_dim, 1.0f, made + i * d * d);
  return made;
}

static int32_t set_policy(const backend *be, attention_state *a, const attention_policy *policy, pyllm_error *err) {
  (void)be;
  size_t heads = (size_t)a->shape.n_layers * (size_t)a->shape.n_kv_heads, d = (size_t)a->shape.head_dim;
  bool renew = policy_needs_sketch(policy, heads * d, a->layers->sketch_bits, &a->sketch.recipe);
  sketch_memory sketch = {0};
  float *calibrated = calibrated_strips(policy, heads, a->shape.head_dim);
  if ((renew && !take_sketches(a, policy, heads, &sketch)) || (policy->covariances && !calibrated)) {
    free_sketches(&sketch);
    free(calibrated);
    return fail(err, PYLLM_ERR_MEMORY, "memory for the policy's key sketch or calibrated moments was refused");
  }
  size_t layer_floats = (size_t)a->shape.n_kv_heads * d * d;
  for (int32_t i = 0; i < a->shape.n_layers; i++)
    a->layers[i].calibrated = calibrated ? calibrated + (size_t)i * layer_floats : NULL;
  free(a->calibrated);
  a->calibrated = calibrated;
  if (renew) {
    for (int32_t i = 0; i < a->shape.n_layers; i++)
      cpu_cache_sketch(&a->layers[i], &a->shape, policy->page_bits, i, &sketch);
    free_sketches(&a->sketch);
    a->sketch = sketch;
  }
  a->policy = *policy;
  return PYLLM_OK;
}

static void cut(const backend *be, attention_state *a, int32_t from, int32_t to) {
  for (int32_t i = 0; i < a->shape.n_layers; i++) cpu_cache_cut(be->kernels, &a->layers[i], &a->shape, from, to);
}

static void read_blocks(const backend *be, attention_state *a, int32_t layer, int32_t kv_head, int32_t n,
                        void *blocks) {
  (void)be;
  const layer_cache *l = &a->layers[layer];
  int32_t d = a->shape.head_dim;
  memcpy(blocks, cache_block(l, kv_head, 0, d), (size_t)n * kv_block_bytes(l->kv_type, d));
}

static void write_blocks(const backend *be, attention_state *a, int32_t layer, int32_t kv_head, int32_t n,
                         const void *blocks) {
  (void)be;
  const layer_cache *l = &a->layers[layer];
  int32_t d = a->shape.head_dim;
  memcpy(cache_block(l, kv_head, 0, d), blocks, (size_t)n * kv_block_bytes(l->kv_type, d));
}

static void read_moments(const backend *be, attention_state *a, int32_t layer, int32_t kv_head, int32_t n_pages,
                         float *mean, float *cov) {
  key_moments *m = &a->layers[layer].moments[kv_head];
  int32_t d = a->shape.head_dim;
  moments_fold(be->kernels, &a->layers[layer], kv_head, d, n_pages);
  memcpy(mean, m->mean, (size_t)d * sizeof *mean);
  for (int64_t i = 0; i < (int64_t)d * d; i++) cov[i] = m->m2[i] / (float)(n_pages * PYLLM_PAGE);
}

static void read_stats(const backend *be, attention_state *a, pyllm_layer_stats *stats) {
  (void)be;
  memcpy(stats, a->stats, (size_t)a->shape.n_layers * sizeof *stats);
}

static void begin(const backend *be, attention_state *a, int32_t position, int32_t n, const float *q) {
  (void)be;
  a->batch.q = q;
  attention_plan(&a->batch, a->policy.n_window, position, n);
}

static void rope_store(const backend *be, const rope_job *job, int32_t n, attention_state *a, int32_t layer) {
  cpu_rope_store(be, job, n, &a->layers[layer]);
}

static void attend_local(const backend *be, attention_state *a, int32_t layer) {
  cpu_attend_local(be, &a->batch, &a->layers[layer]);
}

static uint64_t select_heads(const backend *be, attention_state *a, int32_t layer) {
  pyllm_layer_stats *stats = &a->stats[layer];
  uint64_t before = stats->bytes_read;
  cpu_select(be, &a->batch, &a->layers[layer], &a->policy, layer);
  attention_count(&a->batch, a->layers[layer].kv_type, &a->policy, stats);
  return stats->bytes_read - before;
}

static void attend_bulk(const backend *be, attention_state *a, int32_t layer) {
  cpu_attend_bulk(be, &a->batch, &a->layers[layer]);
}

static void record(const backend *be, attention_state *a, int32_t layer, const pyllm_record *out) {
  cpu_record(be, &a->batch, &a->layers[layer], &a->policy, out);
}

static void finish(const backend *be, attention_state *a, int32_t first, int32_t bits, activation *out) {
  cpu_finish(be, &a->batch, first, bits, out);
}

const attention_ops cpu_attention_ops = {
    .memory = memory_needed,
    .create = new_state,
    .destroy = free_state,
    .set_policy = set_policy,
    .cut = cut,
    .read_blocks = read_blocks,
    .write_blocks = write_blocks,
    .read_moments = read_moments,
    .read_stats = read_stats,
    .begin = begin,
    .rope_store = rope_store,
    .attend_local = attend_local,
    .select = select_heads,
    .attend_bulk = attend_bulk,
    .record = record,
    .finish = finish,
};
