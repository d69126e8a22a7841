/* Hooks into a layer's attention, on any backend. */
#include "backend.h"
#include "error.h"
#include "hooks.h"
#include "record.h"

/* One layer's attention and one batch of its inputs, in the backend's memory. */
typedef struct attention_run {
  backend be;
  attention_shape shape;
  attention_state *state;
  float *q, *k, *v;
  activation out;
} attention_run;

static int32_t open_run(attention_run *r, const char *device, const char *isa, int32_t n_threads,
                        const attention_policy *policy, pyllm_error *err) {
  int32_t status = backend_open(device, n_threads, isa, &r->be, err);
  if (status) return status;
  const ops *o = r->be.ops;
  size_t d = (size_t)r->shape.n_batch * (size_t)r->shape.head_dim * sizeof(float);
  status = o->attention->create(&r->be, &r->shape, &r->state, err);
  if (!status) status = o->attention->set_policy(&r->be, r->state, policy, err);
  r->q = o->alloc(&r->be, (size_t)r->shape.n_heads * d);
  r->k = o->alloc(&r->be, (size_t)r->shape.n_kv_heads * d);
  r->v = o->alloc(&r->be, (size_t)r->shape.n_kv_heads * d);
  r->out = (activation){r->shape.n_heads * r->shape.head_dim, o->alloc(&r->be, (size_t)r->shape.n_heads * d), {0}};
  if (!status && !(r->q && r->k && r->v && r->out.values)) status = fail(err, PYLLM_ERR_MEMORY, "memory refused");
  pool_begin(r->be.pool);
  return status;
}

static int32_t close_run(attention_run *r, int32_t status, pyllm_error *err) {
  const ops *o = r->be.ops;
  if (!o) return status;
  if (!status) status = o->sync(&r->be, err);
  o->attention->destroy(&r->be, r->state);
  float *memory[] = {r->q, r->k, r->v, r->out.values};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) o->release(&r->be, memory[i]);
  pool_end(r->be.pool);
  backend_close(&r->be);
  return status;
}

/* Begins a batch of n tokens from `position` on and stores their keys and values, which begin there. */
static void begin(attention_run *r, int32_t position, int32_t n, const float *q, const float *k, const float *v) {
  const attention_shape *s = &r->shape;
  const ops *o = r->be.ops;
  size_t d = (size_t)n * (size_t)s->head_dim * sizeof(float);
  o->write(&r->be, r->q, q, (size_t)s->n_heads * d);
  o->write(&r->be, r->k, k, (size_t)s->n_kv_heads * d);
  o->write(&r->be, r->v, v, (size_t)s->n_kv_heads * d);
  rope_job rope = {ROPE_PAIRS, 0,    s->n_heads, s->n_kv_heads, s->head_dim, s->n_sink, position, r->q, r->q,
                   NULL,       NULL, 0,          r->q,          r->k,        r->v};
  o->begin(&r->be, position, n);
  o->attention->begin(&r->be, r->state, position, n, r->q);
  o->attention->rope_store(&r->be, &rope, n, r->state, 0);
}

static void run_chunk(attention_run *r, int32_t position, const pyllm_record *record, int32_t n_all) {
  const attention_ops *o = r->be.ops->attention;
  o->attend_local(&r->be, r->state, 0);
  o->select(&r->be, r->state, 0);
  o->attend_bulk(&r->be, r->state, 0);
  batch_record rows = {record, n_all, position};
  pyllm_record chunk = record_rows(&rows, 0, r->shape.n_heads, r->shape.head_dim);
  o->record(&r->be, r->state, 0, &chunk);
  o->finish(&r->be, r->state, 0, 0, &r->out);
}

int32_t hook_attention(const char *device, const char *isa, int32_t n_threads, const hook_attention_shape *s,
                       const pyllm_attention *attention, const float *q, const float *k, const float *v, float *out,
                       pyllm_layer_stats *stats, const pyllm_record *record, pyllm_error *err) {
  policy_shape shape = {1, s->n_heads, s->n_kv_heads, s->head_dim};
  attention_policy policy;
  int32_t status = policy_new(attention, &shape, &policy, err);
  if (status) return status;
  attention_run r = {.shape = {1, s->chunk, s->n, s->n_heads, s->n_kv_heads, s->head_dim, s->n_sink, s->scale,
                               s->kv_type, NULL, s->kv_window}};
  status = open_run(&r, device, isa, n_threads, &policy, err);
  size_t q_width = (size_t)s->n_heads * (size_t)s->head_dim, kv_width = (size_t)s->n_kv_heads * (size_t)s->head_dim;
  for (int32_t t = 0; t < s->n && !status; t += s->chunk) {
    int32_t n = s->n - t < s->chunk ? s->n - t : s->chunk;
    size_t at = (size_t)t;
    begin(&r, t, n, q + at * q_width, k + at * kv_width, v + at * kv_width);
    run_chunk(&r, t, record, s->n);
    r.be.ops->read(&r.be, out + at * q_width, r.out.values, (size_t)n * q_width * sizeof *out);
  }
  if (!status) r.be.ops->attention->read_stats(&r.be, r.state, stats);
  status = close_run(&r, status, err);
  policy_free(&policy);
  return status;
}

int32_t hook_moments(const char *device, const char *isa, const float *k, int32_t n_pages, int32_t head_dim,
                     float *mean, float *cov, pyllm_error *err) {
  attention_run r = {.shape = {1, PYLLM_PAGE, n_pages * PYLLM_PAGE, 1, 1, head_dim, 0, 1, PYLLM_KV_F16, 0}};
  int32_t status = open_run(&r, device, isa, 1, &(attention_policy){.n_window = 1}, err);
  size_t d = (size_t)head_dim;
  for (int32_t p = 0; p < n_pages && !status; p++) {
    const float *page = k + (size_t)p * PYLLM_PAGE * d;
    begin(&r, p * PYLLM_PAGE, PYLLM_PAGE, page, page, page);
    r.be.ops->attention->read_moments(&r.be, r.state, 0, 0, p + 1, mean + (size_t)p * d, cov + (size_t)p * d * d);
  }
  return close_run(&r, status, err);
}
