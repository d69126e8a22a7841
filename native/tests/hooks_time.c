/* How long stages take on any backend. Where it has graphs they are timed as one, as a token of decode runs them. */
#include "backend.h"
#include "error.h"
#include "hooks.h"
#include <stdlib.h>
#include <time.h>

typedef void (*stages)(void *context);

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Once as they are, which loads kernels, and once untimed as they will be run. */
static int32_t time_stages(const backend *be, stages call, void *context, int32_t repeats, double *seconds,
                           pyllm_error *err) {
  const ops *o = be->ops;
  void *graph = NULL;
  call(context);
  int32_t status = o->sync(be, err);
  if (!status && o->graph_begin) {
    o->graph_begin(be);
    call(context);
    graph = o->graph_end(be);
    if (!graph) status = alloc_failure(be, fail(err, PYLLM_ERR_DEVICE, "a graph was refused"), err);
  }
  for (int32_t i = -1; i < repeats && !status; i++) {
    double start = now();
    if (!graph) call(context);
    else if (!o->graph_run(be, graph)) status = fail(err, PYLLM_ERR_MEMORY, "memory to run a graph was refused");
    if (!status) status = o->sync(be, err);
    if (i >= 0) seconds[i] = now() - start;
  }
  if (graph) o->graph_free(be, graph);
  return status;
}

static activation new_activation(const backend *be, int32_t n, int32_t cols) {
  const ops *o = be->ops;
  size_t count = (size_t)n * (size_t)cols, halves = (size_t)n * (size_t)(cols / ACT_HALF + 1) * sizeof(float);
  return (activation){cols,
                      o->alloc(be, count * sizeof(float)),
                      {16, o->alloc(be, 2 * count), o->alloc(be, halves), o->alloc(be, halves), o->alloc(be, halves),
                       o->alloc(be, halves)}};
}

static bool is_whole(const activation *a) {
  return a->values && a->q.planes && a->q.scale && a->q.sum && a->q.product && a->q.both;
}

static void free_memory(const backend *be, void *memory) {
  if (memory) be->ops->release(be, memory);
}

static void free_activation(const backend *be, const activation *a) {
  void *memory[] = {a->values, a->q.planes, a->q.scale, a->q.sum, a->q.product, a->q.both};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free_memory(be, memory[i]);
}

/* ---- matrices ---- */

typedef struct linear_run {
  backend be;
  matrix *w; /* (copies) */
  int32_t copies, n;
  activation x;
  float *gate, *out;
} linear_run;

static void multiply(void *context) {
  linear_run *r = context;
  for (int32_t i = 0; i < r->copies; i++)
    r->be.ops->linear(&r->be, &r->x, r->n, &(linear_job){&r->w[i], NULL, false, r->out}, 1);
}

static int32_t take_matrices(linear_run *r, int32_t type, const void *weights, int32_t rows, int32_t cols,
                             pyllm_error *err) {
  int32_t status = PYLLM_OK;
  for (int32_t i = 0; i < r->copies && !status; i++) {
    status = pack(r->be.pool, quant_find(type), weights, rows, cols, "test matrix", &r->w[i], err);
    if (!status) status = backend_place(&r->be, &r->w[i], "test matrix", err);
  }
  return status;
}

/* x: random numbers, by the stage that rounds as it does in a model. */
static int32_t take_input(linear_run *r, int32_t rows, int32_t cols, pyllm_error *err) {
  const ops *o = r->be.ops;
  size_t count = (size_t)r->n * (size_t)cols, bytes = count * sizeof(float);
  float *values = malloc(bytes);
  uint32_t seed = 1;
  for (size_t i = 0; values && i < count; i++) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = (float)(seed >> 8) / (float)(1 << 24) * 8 - 4;
  }
  r->gate = values ? backend_copy(&r->be, values, bytes) : NULL;
  free(values);
  r->out = o->alloc(&r->be, (size_t)r->n * (size_t)rows * sizeof(float));
  r->x = new_activation(&r->be, r->n, cols);
  bool ok = r->gate && r->out && is_whole(&r->x);
  if (!ok) return alloc_failure(&r->be, fail(err, PYLLM_ERR_MEMORY, "memory refused"), err);
  o->swiglu(&r->be, r->gate, r->gate, r->n, true, &r->x);
  return PYLLM_OK;
}

static void free_linear(linear_run *r) {
  free_memory(&r->be, r->gate);
  free_memory(&r->be, r->out);
  free_activation(&r->be, &r->x);
  for (int32_t i = 0; i < r->copies; i++)
    if (r->w[i].data) backend_free_matrix(&r->be, &r->w[i]);
  free(r->w);
}

int32_t hook_time_linear(const char *device, int32_t n_threads, int32_t type, const void *weights, int32_t rows,
                         int32_t cols, int32_t n, int32_t copies, int32_t repeats, double *seconds, pyllm_error *err) {
  linear_run r = {.copies = copies, .n = n};
  int32_t status = backend_open(device, n_threads, NULL, &r.be, err);
  if (status) return status;
  pool_begin(r.be.pool);
  r.w = calloc((size_t)copies, sizeof *r.w);
  status = r.w ? take_matrices(&r, type, weights, rows, cols, err) : fail(err, PYLLM_ERR_MEMORY, "memory refused");
  if (!status) status = take_input(&r, rows, cols, err);
  if (!status) status = time_stages(&r.be, multiply, &r, repeats, seconds, err);
  if (r.w) free_linear(&r);
  pool_end(r.be.pool);
  backend_close(&r.be);
  return status;
}

/* ---- attention ---- */

typedef struct attention_run attention_run;
typedef void (*layer_stage)(attention_run *r, int32_t layer);

struct attention_run {
  backend be;
  attention_shape shape;
  attention_state *state;
  float *q, *k, *angles; /* angles: of no rotation */
  activation out;
  int32_t position, n;
  layer_stage stage; /* that each_layer does */
};

static void rope_store(attention_run *r, int32_t layer) {
  const attention_shape *s = &r->shape;
  float *sine = r->angles + (size_t)s->n_batch * (size_t)s->head_dim;
  rope_job rope = {ROPE_PAIRS, s->head_dim, s->n_heads, s->n_kv_heads, s->head_dim,
                   s->n_sink,  r->position, r->angles,  sine,          NULL,
                   NULL,       0,           r->q,       r->k,          r->k};
  r->be.ops->attention->rope_store(&r->be, &rope, r->n, r->state, layer);
}
static void attend_local(attention_run *r, int32_t layer) {
  r->be.ops->attention->attend_local(&r->be, r->state, layer);
}
static void select_heads(attention_run *r, int32_t layer) { r->be.ops->attention->select(&r->be, r->state, layer); }
static void attend_bulk(attention_run *r, int32_t layer) { r->be.ops->attention->attend_bulk(&r->be, r->state, layer); }
static void finish(attention_run *r, int32_t layer) {
  (void)layer;
  r->be.ops->attention->finish(&r->be, r->state, 0, 16, &r->out);
}
static const layer_stage layer_stages[] = {rope_store, attend_local, select_heads, attend_bulk, finish};

static void each_layer(void *context) {
  attention_run *r = context;
  for (int32_t i = 0; i < r->shape.n_layers; i++) r->stage(r, i);
}

static void run_stage(attention_run *r, layer_stage stage) {
  r->stage = stage;
  each_layer(r);
}

static bool take_attention(attention_run *r) {
  const ops *o = r->be.ops;
  size_t d = (size_t)r->shape.n_batch * (size_t)r->shape.head_dim;
  r->q = o->alloc(&r->be, (size_t)r->shape.n_heads * d * sizeof(float));
  r->k = o->alloc(&r->be, (size_t)r->shape.n_kv_heads * d * sizeof(float));
  float *angles = calloc(2 * d, sizeof(float));
  for (size_t i = 0; angles && i < d; i++) angles[i] = 1; /* cosines */
  r->angles = angles ? backend_copy(&r->be, angles, 2 * d * sizeof(float)) : NULL;
  free(angles);
  r->out = new_activation(&r->be, r->shape.n_batch, r->shape.n_heads * r->shape.head_dim);
  return r->q && r->k && r->angles && is_whole(&r->out);
}

static void free_attention(attention_run *r) {
  free_memory(&r->be, r->q);
  free_memory(&r->be, r->k);
  free_memory(&r->be, r->angles);
  free_activation(&r->be, &r->out);
  if (r->state) r->be.ops->attention->destroy(&r->be, r->state);
}

/* A batch of n keys from `position` on into all layers. */
static void begin(attention_run *r, const float *k, int32_t position, int32_t n) {
  const ops *o = r->be.ops;
  size_t width = (size_t)r->shape.n_kv_heads * (size_t)r->shape.head_dim;
  o->write(&r->be, r->k, k + (size_t)position * width, (size_t)n * width * sizeof *k);
  o->begin(&r->be, position, n);
  o->attention->begin(&r->be, r->state, position, n, r->q);
  r->position = position, r->n = n;
  run_stage(r, rope_store);
}

static int32_t time_attention(attention_run *r, const hook_time_shape *s, const float *q, const float *k,
                              int32_t repeats, double *seconds, pyllm_layer_stats *stats, pyllm_error *err) {
  const ops *o = r->be.ops;
  size_t n_stages = sizeof layer_stages / sizeof *layer_stages;
  o->write(&r->be, r->q, q, (size_t)s->n * (size_t)s->n_heads * (size_t)s->head_dim * sizeof *q);
  for (int32_t t = 0; t < s->depth; t += r->shape.n_batch)
    begin(r, k, t, s->depth - t < r->shape.n_batch ? s->depth - t : r->shape.n_batch);
  begin(r, k, s->depth, s->n);
  for (size_t i = 1; i < n_stages; i++) run_stage(r, layer_stages[i]);
  o->attention->read_stats(&r->be, r->state, stats);
  int32_t status = o->sync(&r->be, err);
  for (size_t i = 0; i < n_stages && !status; i++) {
    r->stage = layer_stages[i];
    status = time_stages(&r->be, each_layer, r, repeats, seconds + i * (size_t)repeats, err);
  }
  return status;
}

int32_t hook_time_attention(const char *device, int32_t n_threads, const hook_time_shape *s,
                            const pyllm_attention *attention, const float *q, const float *k, int32_t repeats,
                            double *seconds, pyllm_layer_stats *stats, pyllm_error *err) {
  policy_shape shape = {s->n_layers, s->n_heads, s->n_kv_heads, s->head_dim};
  attention_policy policy;
  int32_t status = policy_new(attention, &shape, &policy, err);
  if (status) return status;
  enum { BATCH = 512 };
  pyllm_layer_stats *all = calloc((size_t)s->n_layers, sizeof *all);
  attention_run r = {.shape = {s->n_layers, s->n > BATCH ? s->n : BATCH, s->depth + s->n, s->n_heads, s->n_kv_heads,
                               s->head_dim, s->n_sink, s->scale, PYLLM_KV_F16, 0}};
  status = backend_open(device, n_threads, NULL, &r.be, err);
  if (!status) {
    pool_begin(r.be.pool);
    status = r.be.ops->attention->create(&r.be, &r.shape, &r.state, err);
    if (!status) status = r.be.ops->attention->set_policy(&r.be, r.state, &policy, err);
    if (!status && !(all && take_attention(&r))) status = fail(err, PYLLM_ERR_MEMORY, "memory refused");
    if (!status) status = time_attention(&r, s, q, k, repeats, seconds, all, err);
    if (!status) *stats = all[0];
    free_attention(&r);
    pool_end(r.be.pool);
    backend_close(&r.be);
  }
  free(all);
  policy_free(&policy);
  return status;
}
