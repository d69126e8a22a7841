#include "session.h"
#include "error.h"
#include "policy.h"
#include <stdlib.h>
#include <string.h>

static int32_t check_params(const pyllm_model *m, const pyllm_session_params *p, pyllm_error *err) {
  if (p->n_ctx < 1 || p->n_ctx > 1 << 28)
    return fail(err, PYLLM_ERR_ARGUMENT, "n_ctx is %d, expected 1 to %d", p->n_ctx, 1 << 28);
  if (p->n_batch < 1 || p->n_batch > 4096)
    return fail(err, PYLLM_ERR_ARGUMENT, "n_batch is %d, expected 1 to 4096", p->n_batch);
  if (p->n_sink < 0 || p->n_sink > PYLLM_PAGE)
    return fail(err, PYLLM_ERR_ARGUMENT, "n_sink is %d, expected 0 to %d", p->n_sink, PYLLM_PAGE);
  if (p->kv_type != PYLLM_KV_F16 && p->kv_type != PYLLM_KV_Q8_0)
    return fail(err, PYLLM_ERR_ARGUMENT, "kv_type is %d, expected %d or %d", p->kv_type, PYLLM_KV_F16, PYLLM_KV_Q8_0);
  if (p->activation_bits != 16 && p->activation_bits != 8)
    return fail(err, PYLLM_ERR_ARGUMENT, "activation_bits is %d, expected 16 or 8", p->activation_bits);
  if (p->activation_bits != 16 && !m->backend.ops->on_host)
    return fail(err, PYLLM_ERR_UNSUPPORTED, "activation_bits 8: on the GPU activations are rounded to 16");
  if (p->kv_window < 0) return fail(err, PYLLM_ERR_ARGUMENT, "kv_window is %d, expected at least 0", p->kv_window);
  return PYLLM_OK;
}

/* No batch has more tokens than the context. */
static int32_t batch_within(const pyllm_session_params *p) { return p->n_batch < p->n_ctx ? p->n_batch : p->n_ctx; }

static attention_shape shape_of(const pyllm_model *m, const pyllm_session_params *p) {
  const config *c = &m->config;
  return (attention_shape){.n_layers = c->n_layers,
                           .n_batch = batch_within(p),
                           .n_ctx = p->n_ctx,
                           .n_heads = c->n_heads,
                           .n_kv_heads = c->n_kv_heads,
                           .head_dim = c->head_dim,
                           .n_sink = p->n_sink,
                           .scale = c->attention_scale,
                           .kv_type = p->kv_type,
                           .wide_keys = m->wide_keys,
                           .kv_window = p->kv_window};
}

static int32_t logit_rows(int32_t n_batch) { return n_batch < LOGITS_AT_ONCE ? n_batch : LOGITS_AT_ONCE; }

static uint64_t activation_bytes(uint64_t cols) { return cols * 6 + cols / ACT_HALF * 12 + cols / ACT_GROUP * 4; }

int32_t pyllm_session_memory_needed(const pyllm_model *m, const pyllm_session_params *p, int32_t page_bits,
                                    pyllm_session_memory *out, pyllm_error *err) {
  int32_t status = check_params(m, p, err);
  if (!status) status = policy_check_bits(page_bits, err);
  if (status) return status;
  const config *c = &m->config;
  uint64_t q_width = (uint64_t)c->n_heads * (uint64_t)c->head_dim,
           kv_width = (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim;
  uint64_t per_token = (uint64_t)c->dim * 4 + activation_bytes((uint64_t)c->dim) + (q_width + 2 * kv_width) * 4 +
                       activation_bytes(q_width) + (uint64_t)c->n_ff * 8 + activation_bytes((uint64_t)c->n_ff) +
                       (uint64_t)c->n_rot * 4;
  attention_shape shape = shape_of(m, p);
  int32_t n_batch = batch_within(p);
  uint64_t tokens = (uint64_t)p->n_ctx * 4, logits = (uint64_t)logit_rows(n_batch) * (uint64_t)c->n_vocab * 4;
  /* The host has its tokens and its caller's logits. */
  pyllm_session_memory all = {.scratch_bytes =
                                  (uint64_t)n_batch * per_token + (m->backend.ops->on_host ? tokens : logits)};
  status = m->backend.ops->attention->memory(&m->backend, &shape, page_bits, &all, err);
  if (!status) *out = all;
  return status;
}

static bool new_activation(const backend *be, activation *a, int32_t n, int32_t cols) {
  size_t rows = (size_t)n, width = (size_t)cols;
  a->cols = cols;
  a->values = be->ops->alloc(be, rows * width * sizeof(float));
  a->q.planes = be->ops->alloc(be, rows * width * 2);
  a->q.scale = be->ops->alloc(be, rows * (width / ACT_HALF + 1) * sizeof(float));
  a->q.sum = be->ops->alloc(be, rows * (width / ACT_HALF + 1) * sizeof(int32_t));
  a->q.product = be->ops->alloc(be, rows * (width / ACT_HALF + 1) * sizeof(float));
  a->q.both = be->ops->alloc(be, rows * (width / ACT_GROUP + 1) * sizeof(float));
  return a->values && a->q.planes && a->q.scale && a->q.sum && a->q.product && a->q.both;
}

static void free_activation(const backend *be, activation *a) {
  void *parts[] = {a->values, a->q.planes, a->q.scale, a->q.sum, a->q.product, a->q.both};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) be->ops->release(be, parts[i]);
}

static bool new_buffers(const backend *be, batch_buffers *b, const config *c, int32_t n) {
  int32_t q_width = c->n_heads * c->head_dim, kv_width = c->n_kv_heads * c->head_dim;
  struct {
    float **at;
    int32_t width;
  } plain[] = {{&b->x, c->dim},     {&b->q, q_width},  {&b->k, kv_width},          {&b->v, kv_width},
               {&b->gate, c->n_ff}, {&b->up, c->n_ff}, {&b->cosine, c->n_rot / 2}, {&b->sine, c->n_rot / 2}};
  bool ok = true;
  for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
    ok &= (*plain[i].at = be->ops->alloc(be, (size_t)n * (size_t)plain[i].width * sizeof(float))) != NULL;
  if (!be->ops->on_host)
    ok &= (b->logits = be->ops->alloc(be, (size_t)logit_rows(n) * (size_t)c->n_vocab * sizeof(float))) != NULL;
  ok &= new_activation(be, &b->normed, n, c->dim);
  ok &= new_activation(be, &b->attended, n, q_width);
  ok &= new_activation(be, &b->hidden, n, c->n_ff);
  return ok;
}

static void free_buffers(const backend *be, batch_buffers *b) {
  float *plain[] = {b->x, b->q, b->k, b->v, b->gate, b->up, b->cosine, b->sine, b->logits};
  for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) be->ops->release(be, plain[i]);
  free_activation(be, &b->normed);
  free_activation(be, &b->attended);
  free_activation(be, &b->hidden);
}

static int32_t allocate(pyllm_session *s, pyllm_error *err) {
  const backend *be = &s->model->backend;
  s->tokens = malloc((size_t)s->shape.n_ctx * sizeof *s->tokens);
  if (!s->tokens || !new_buffers(be, &s->buffers, &s->model->config, s->shape.n_batch))
    return alloc_failure(
        be, fail(err, PYLLM_ERR_MEMORY, "memory for batches of %d tokens was refused", s->shape.n_batch), err);
  int32_t status = be->ops->attention->create(be, &s->shape, &s->attention, err);
  return status ? status : be->ops->attention->set_policy(be, s->attention, &s->policy, err);
}

/* Past its sliding window a model's attention is not what this library computes. */
static int32_t check_window(const config *c, int32_t n_ctx, pyllm_error *err) {
  if (c->sliding_window == 0 || (uint32_t)n_ctx <= c->sliding_window) return PYLLM_OK;
  return fail(err, PYLLM_ERR_UNSUPPORTED,
              "a context of %d tokens is longer than the model's sliding window of %u: not supported", n_ctx,
              c->sliding_window);
}

int32_t pyllm_session_open(const pyllm_model *model, const pyllm_session_params *params, pyllm_session **out,
                           pyllm_error *err) {
  int32_t status = check_params(model, params, err);
  if (!status) status = check_window(&model->config, params->n_ctx, err);
  if (status) return status;
  pyllm_session *s = calloc(1, sizeof *s);
  if (!s) return fail(err, PYLLM_ERR_MEMORY, "memory for a session was refused");
  s->model = model;
  s->shape = shape_of(model, params);
  s->activation_bits = params->activation_bits;
  model_hold(model);
  s->policy = (attention_policy){.policy = PYLLM_DENSE, .granularity = PYLLM_GROUP, .n_window = 1024};
  atomic_flag_clear(&s->busy);
  session_take_device(s);
  status = allocate(s, err);
  session_give_device(s);
  if (status) pyllm_session_close(s);
  else *out = s;
  return status;
}

void pyllm_session_close(pyllm_session *s) {
  if (!s) return;
  const backend *be = &s->model->backend;
  session_take_device(s);
  forward_changed(s);
  be->ops->attention->destroy(be, s->attention);
  free_buffers(be, &s->buffers);
  session_give_device(s);
  policy_free(&s->policy);
  free(s->tokens);
  pyllm_model_close((pyllm_model *)s->model);
  free(s);
}

void session_take_device(const pyllm_session *s) {
  if (!s->model->backend.ops->on_host) pool_begin(s->model->backend.pool);
}

void session_give_device(const pyllm_session *s) {
  if (!s->model->backend.ops->on_host) pool_end(s->model->backend.pool);
}

int32_t session_enter(pyllm_session *s, pyllm_error *err) {
  if (atomic_flag_test_and_set(&s->busy))
    return fail(err, PYLLM_ERR_ARGUMENT, "the session is in use by another thread");
  session_take_device(s);
  return PYLLM_OK;
}

int32_t session_leave(pyllm_session *s, int32_t status) {
  session_give_device(s);
  atomic_flag_clear(&s->busy);
  return status;
}

static int32_t replace_policy(pyllm_session *s, const pyllm_attention *a, pyllm_error *err) {
  const backend *be = &s->model->backend;
  const config *c = &s->model->config;
  policy_shape shape = {c->n_layers, c->n_heads, c->n_kv_heads, c->head_dim};
  attention_policy p;
  int32_t status = policy_new(a, &shape, &p, err);
  if (status) return status;
  forward_changed(s);
  status = be->ops->attention->set_policy(be, s->attention, &p, err);
  policy_free(status ? &p : &s->policy);
  if (!status) s->policy = p;
  return status;
}

int32_t pyllm_session_set_attention(pyllm_session *s, const pyllm_attention *a, pyllm_error *err) {
  int32_t status = session_enter(s, err);
  return status ? status : session_leave(s, replace_policy(s, a, err));
}

static int32_t check_eval(const pyllm_session *s, const int32_t *tokens, int32_t n, int32_t n_logits,
                          pyllm_error *err) {
  if (n < 1) return fail(err, PYLLM_ERR_ARGUMENT, "no tokens to evaluate");
  if (n_logits < 0 || n_logits > n)
    return fail(err, PYLLM_ERR_ARGUMENT, "logits of %d tokens asked for, with %d tokens to evaluate", n_logits, n);
  if (n > s->shape.n_ctx - s->position)
    return fail(err, PYLLM_ERR_CONTEXT, "%d tokens at position %d do not fit the context of %d tokens", n, s->position,
                s->shape.n_ctx);
  for (int32_t i = 0; i < n; i++)
    if (tokens[i] < 0 || tokens[i] >= s->model->config.n_vocab)
      return fail(err, PYLLM_ERR_ARGUMENT, "token id %d at index %d is not in the vocabulary of %d", tokens[i], i,
                  s->model->config.n_vocab);
  return PYLLM_OK;
}

static int32_t eval_batches(pyllm_session *s, const int32_t *tokens, int32_t n, float *logits, int32_t n_logits,
                            const pyllm_record *record, pyllm_error *err) {
  int32_t first = s->position;
  for (int32_t done = 0; done < n;) {
    int32_t m = n - done < s->shape.n_batch ? n - done : s->shape.n_batch, start = s->position;
    int32_t skipped = n - n_logits - done; /* tokens of this batch that need no logits */
    int32_t wanted = skipped <= 0 ? m : skipped < m ? m - skipped : 0;
    float *out = logits + (skipped > 0 ? 0 : (int64_t)-skipped * s->model->config.n_vocab);
    batch_record rows = {record, n, done};
    int32_t status = forward(s, tokens + done, m, out, wanted, &rows, err);
    if (status) {
      /* What overflowed may have been stored, as a key that no token has looked at, before it showed. */
      session_cut(s, status == PYLLM_ERR_NUMERIC ? first : start, start + m);
      return status;
    }
    done += m;
  }
  return PYLLM_OK;
}

int32_t pyllm_session_eval(pyllm_session *s, const int32_t *tokens, int32_t n, float *logits, int32_t n_logits,
                           const pyllm_record *record, pyllm_error *err) {
  uint32_t aborts = atomic_load(&s->aborts); /* entering may have to wait, and be aborted while it does */
  int32_t status = session_enter(s, err);
  if (status) return status;
  s->aborts_before = aborts;
  status = check_eval(s, tokens, n, n_logits, err);
  if (status) return session_leave(s, status);
  bool on_host = s->model->backend.ops->on_host; /* on a GPU the session has the pool already */
  if (on_host) pool_begin(s->model->backend.pool);
  status = eval_batches(s, tokens, n, logits, n_logits, record, err);
  if (on_host) pool_end(s->model->backend.pool);
  return session_leave(s, status);
}

void session_cut(pyllm_session *s, int32_t from, int32_t to) {
  const backend *be = &s->model->backend;
  be->ops->attention->cut(be, s->attention, from, to);
  s->position = from;
}

static int32_t rewind_to(pyllm_session *s, int32_t n, pyllm_error *err) {
  if (n < 0 || n > s->position)
    return fail(err, PYLLM_ERR_ARGUMENT, "cannot rewind to position %d: the session is at %d", n, s->position);
  if (n < s->position) session_cut(s, n, s->position);
  return PYLLM_OK;
}

int32_t pyllm_session_rewind(pyllm_session *s, int32_t n, pyllm_error *err) {
  int32_t status = session_enter(s, err);
  return status ? status : session_leave(s, rewind_to(s, n, err));
}

int32_t pyllm_session_sync(pyllm_session *s, const int32_t *tokens, int32_t n, int32_t *n_kept, pyllm_error *err) {
  if (n < 1) return fail(err, PYLLM_ERR_ARGUMENT, "no tokens to evaluate");
  int32_t status = session_enter(s, err);
  if (status) return status;
  int32_t kept = 0;
  while (kept < s->position && kept < n - 1 && s->tokens[kept] == tokens[kept]) kept++;
  status = rewind_to(s, kept, err);
  if (!status) *n_kept = kept;
  return session_leave(s, status);
}

int32_t pyllm_session_position(const pyllm_session *s) { return s->position; }

int32_t pyllm_session_tokens(pyllm_session *s, int32_t *out, int32_t n, pyllm_error *err) {
  int32_t status = session_enter(s, err);
  if (status) return status;
  if (n < 0 || n > s->position)
    status = fail(err, PYLLM_ERR_ARGUMENT, "%d tokens asked for: the session holds %d", n, s->position);
  else memcpy(out, s->tokens, (size_t)n * sizeof *out);
  return session_leave(s, status);
}

void pyllm_session_abort(pyllm_session *s) { atomic_fetch_add(&s->aborts, 1); }

void pyllm_session_layer_stats(const pyllm_session *s, pyllm_layer_stats *out) {
  const backend *be = &s->model->backend;
  session_take_device(s);
  be->ops->attention->read_stats(be, s->attention, out);
  session_give_device(s);
}

int32_t pyllm_session_stage_stats(const pyllm_session *s, pyllm_stage_stats *out, int32_t n) {
  for (int32_t i = 0; i < n && i < N_STAGES; i++) out[i] = trace_stage(&s->trace, (enum stage)i);
  return N_STAGES;
}
