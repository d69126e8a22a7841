/* The transformer, once: prefill and decode, every architecture, every policy, over the stages of ops.h. */
#include "session.h"
#include "error.h"
#include "gguf.h"

static uint64_t matrix_bytes(const matrix *w) { return (uint64_t)tiles_of_rows(w->rows) * w->tile_bytes; }

/* Runs the matrices that share one input and books their weights as the stage's bytes. */
static void linear(pyllm_session *s, enum stage stage, const activation *x, int32_t n, const linear_job *jobs,
                   int32_t n_jobs) {
  const backend *be = &s->model->backend;
  uint64_t bytes = 0;
  for (int32_t i = 0; i < n_jobs; i++) bytes += matrix_bytes(jobs[i].w);
  be->ops->linear(be, x, n, jobs, n_jobs);
  trace_lap(&s->trace, stage, bytes);
}

static linear_job job_of(const projection *p, bool add, float *out) { return (linear_job){&p->w, p->bias, add, out}; }

/* Bits that a matrix has its input rounded to; 0: it takes floats. */
static int32_t input_bits(const matrix *w) { return w->quantized ? 16 : 0; }

/* The same of attention's output and of the feed-forward network, where the session may ask for fewer. */
static int32_t session_bits(const pyllm_session *s, const matrix *w) {
  return w->quantized && takes_bytes(&w->format) ? s->activation_bits : input_bits(w);
}

static int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

static void norm(pyllm_session *s, const float *x, const float *w, int32_t n, int32_t bits) {
  const backend *be = &s->model->backend;
  be->ops->norm(be, x, w, s->model->config.norm_eps, n, bits, &s->buffers.normed);
  trace_lap(&s->trace, STAGE_NORM, 0);
}

static void rope_store(pyllm_session *s, const layer_weights *w, int32_t n, int32_t layer) {
  const backend *be = &s->model->backend;
  const config *c = &s->model->config;
  batch_buffers *b = &s->buffers;
  rope_job job = {.kind = c->arch->rope,
                  .n_rot = c->n_rot,
                  .n_heads = c->n_heads,
                  .n_kv_heads = c->n_kv_heads,
                  .head_dim = c->head_dim,
                  .n_sink = s->shape.n_sink,
                  .position = s->position,
                  .cosine = b->cosine,
                  .sine = b->sine,
                  .q_norm = w->q_norm,
                  .k_norm = w->k_norm,
                  .norm_eps = c->norm_eps,
                  .q = b->q,
                  .k = b->k,
                  .v = b->v};
  be->ops->attention->rope_store(be, &job, n, s->attention, layer);
  trace_lap(&s->trace, STAGE_ROPE, 0);
}

static void attention(pyllm_session *s, int32_t layer, const batch_record *record) {
  const backend *be = &s->model->backend;
  const attention_ops *stages = be->ops->attention;
  attention_state *a = s->attention;
  stages->attend_local(be, a, layer);
  trace_lap(&s->trace, STAGE_ATTEND_LOCAL, 0);
  uint64_t bytes = stages->select(be, a, layer);
  trace_lap(&s->trace, STAGE_SELECT, 0);
  stages->attend_bulk(be, a, layer);
  trace_lap(&s->trace, STAGE_ATTEND_BULK, bytes);
  if (record->all) {
    pyllm_record rows = record_rows(record, layer, s->model->config.n_heads, s->model->config.head_dim);
    stages->record(be, a, layer, &rows);
    trace_lap(&s->trace, STAGE_AUDIT, 0);
  }
}

/* What the layer's attention makes of x (n, dim), the batch's tokens from `first` on. */
static void after_attention(pyllm_session *s, const layer_weights *w, int32_t first, int32_t n, float *x) {
  const backend *be = &s->model->backend;
  batch_buffers *b = &s->buffers;
  be->ops->attention->finish(be, s->attention, first, session_bits(s, &w->o.w), &b->attended);
  trace_lap(&s->trace, STAGE_FINISH, 0);
  linear_job out = job_of(&w->o, true, x);
  linear(s, STAGE_ATTENTION_OUT, &b->attended, n, &out, 1);
}

static void feed_forward(pyllm_session *s, const layer_weights *w, int32_t n, float *x) {
  const backend *be = &s->model->backend;
  batch_buffers *b = &s->buffers;
  norm(s, x, w->ffn_norm, n, larger(session_bits(s, &w->gate.w), session_bits(s, &w->up.w)));
  linear_job gate_up[] = {job_of(&w->gate, false, b->gate), job_of(&w->up, false, b->up)};
  linear(s, STAGE_GATE_UP, &b->normed, n, gate_up, 2);
  be->ops->swiglu(be, b->gate, b->up, n, session_bits(s, &w->down.w), &b->hidden);
  trace_lap(&s->trace, STAGE_SWIGLU, 0);
  linear_job down = job_of(&w->down, true, x);
  linear(s, STAGE_DOWN, &b->hidden, n, &down, 1);
}

/* The batch's n tokens. All of them leave keys and values; those from `first` on go through to the layer's end. */
static void layer(pyllm_session *s, int32_t i, int32_t first, int32_t n, const batch_record *record) {
  const layer_weights *w = &s->model->layers[i];
  batch_buffers *b = &s->buffers;
  norm(s, b->x, w->attn_norm, n, larger(input_bits(&w->q.w), larger(input_bits(&w->k.w), input_bits(&w->v.w))));
  linear_job qkv[] = {job_of(&w->q, false, b->q), job_of(&w->k, false, b->k), job_of(&w->v, false, b->v)};
  linear(s, STAGE_QKV, &b->normed, n, qkv, 3);
  rope_store(s, w, n, i);
  attention(s, i, record);
  if (first == n) return;
  float *x = b->x + (int64_t)first * s->model->config.dim;
  after_attention(s, w, first, n - first, x);
  feed_forward(s, w, n - first, x);
}

/* Logits of rows [first, first + n) of the batch into `to` (n, n_vocab), in the backend's memory. */
static void logits_of(pyllm_session *s, int32_t first, int32_t n, float *to) {
  const pyllm_model *m = s->model;
  norm(s, s->buffers.x + (int64_t)first * m->config.dim, m->output_norm, n, input_bits(&m->output));
  linear_job output = {&m->output, NULL, false, to};
  linear(s, STAGE_LOGITS, &s->buffers.normed, n, &output, 1);
}

static void read_logits(pyllm_session *s, int32_t n, float *out) {
  const backend *be = &s->model->backend;
  be->ops->read(be, out, s->buffers.logits, (size_t)n * (size_t)s->model->config.n_vocab * sizeof *out);
}

/* Logits of the batch's tokens [first, n) into out (n - first, n_vocab), which is the host's. */
static void logits_to_host(pyllm_session *s, int32_t first, int32_t n, float *out) {
  if (s->model->backend.ops->on_host) {
    logits_of(s, first, n - first, out);
    return;
  }
  for (int32_t t = first; t < n; t += LOGITS_AT_ONCE) {
    int32_t rows = n - t < LOGITS_AT_ONCE ? n - t : LOGITS_AT_ONCE;
    logits_of(s, t, rows, s->buffers.logits);
    read_logits(s, rows, out + (int64_t)(t - first) * s->model->config.n_vocab);
  }
}

static int32_t check_logits(const pyllm_session *s, const float *logits, int32_t n_logits, pyllm_error *err) {
  const backend *be = &s->model->backend;
  if (be->cpu->finite(be, logits, (int64_t)n_logits * s->model->config.n_vocab)) return PYLLM_OK;
  return fail(err, PYLLM_ERR_NUMERIC, "the logits after position %d hold NaN or infinity: activations overflowed",
              s->position);
}

/* Of the batch's first n tokens, whose logits nobody sees: what overflowed stays in the residual stream. */
static int32_t check_activations(const pyllm_session *s, int32_t n, pyllm_error *err) {
  const backend *be = &s->model->backend;
  if (be->ops->finite(be, s->buffers.x, (int64_t)n * s->model->config.dim)) return PYLLM_OK;
  return fail(err, PYLLM_ERR_NUMERIC, "activations after position %d overflowed to NaN or infinity", s->position);
}

/* What comes before the layers, but for what the host does. */
static void before_layers(pyllm_session *s, int32_t n) {
  const pyllm_model *m = s->model;
  const backend *be = &m->backend;
  be->ops->angles(be, m->rope_frequency, m->config.n_rot / 2, m->config.rope_mscale, s->position, n, s->buffers.cosine,
                  s->buffers.sine);
  be->ops->attention->begin(be, s->attention, s->position, n, s->buffers.q);
  trace_lap(&s->trace, STAGE_EMBED, 0);
}

static bool aborted(const pyllm_session *s) {
  return atomic_load_explicit(&s->aborts, memory_order_relaxed) != s->aborts_before;
}

/* After the last layer's attention nobody reads tokens but the n_logits last ones. */
static int32_t layers(pyllm_session *s, int32_t n, int32_t n_logits, const batch_record *record, pyllm_error *err) {
  int32_t last = s->model->config.n_layers - 1;
  for (int32_t i = 0; i <= last; i++) {
    if (aborted(s)) return fail(err, PYLLM_ERR_ABORTED, "evaluation stopped at position %d", s->position);
    layer(s, i, i == last ? n - n_logits : 0, n, record);
  }
  return PYLLM_OK;
}

enum { GRAPH_TRIES = 2 };

/* Writes down what one token and its logits take; false where that is not to be had. */
static bool write_graph(pyllm_session *s) {
  const backend *be = &s->model->backend;
  if (s->graph.failures == GRAPH_TRIES) return false;
  uint64_t before = trace_bytes(&s->trace);
  be->ops->graph_begin(be);
  before_layers(s, 1);
  for (int32_t i = 0; i < s->model->config.n_layers; i++) layer(s, i, 0, 1, &(batch_record){NULL, 1, 0});
  logits_of(s, 0, 1, s->buffers.logits);
  s->graph.stages = be->ops->graph_end(be);
  s->graph.bytes = trace_bytes(&s->trace) - before;
  s->graph.failures += s->graph.stages == NULL;
  return s->graph.stages != NULL;
}

/* One token in one launch; false where it has to be done stage by stage. Its first time after a change is: a
 * kernel's first launch may load it, which no graph can hold. */
static bool token_graph(pyllm_session *s, const batch_record *record, float *logits) {
  const backend *be = &s->model->backend;
  if (!be->ops->graph_begin || !s->graph.warm || record->all || aborted(s)) return false;
  bool written = s->graph.stages == NULL;
  if (written && !write_graph(s)) return false;
  if (!be->ops->graph_run(be, s->graph.stages)) return false;
  read_logits(s, 1, logits);
  trace_lap(&s->trace, STAGE_TOKEN, written ? 0 : s->graph.bytes);
  return true;
}

void forward_changed(pyllm_session *s) {
  const backend *be = &s->model->backend;
  if (s->graph.stages) be->ops->graph_free(be, s->graph.stages);
  s->graph = (struct token_graph){0};
}

int32_t forward(pyllm_session *s, const int32_t *tokens, int32_t n, float *logits, int32_t n_logits,
                const batch_record *record, pyllm_error *err) {
  const pyllm_model *m = s->model;
  const backend *be = &m->backend;
  trace_begin(&s->trace);
  be->ops->begin(be, s->position, n);
  int32_t status =
      be->ops->embed(be, m->embedding_type, m->embedding->data, m->config.dim, tokens, n, s->buffers.x, err);
  /* Prompts read rows from all over the table, which would stay resident beside its packed copy. */
  if (n > 1) gguf_release_pages(m->file);
  if (status) return status;
  if (n != 1 || n_logits != 1 || !token_graph(s, record, logits)) {
    before_layers(s, n);
    status = layers(s, n, n_logits, record, err);
    if (!status && n_logits > 0) logits_to_host(s, n - n_logits, n, logits);
    if (!status && n_logits < n) status = check_activations(s, n - n_logits, err);
  }
  if (!status) status = be->ops->sync(be, err);
  if (!status) status = check_logits(s, logits, n_logits, err);
  if (status) return status;
  s->graph.warm |= n == 1 && n_logits == 1;
  for (int32_t i = 0; i < n; i++) s->tokens[s->position + i] = tokens[i];
  s->position += n;
  return PYLLM_OK;
}
