/* Hooks into stages of any backend, on the host's arrays. */
#include "backend.h"
#include "error.h"
#include "hooks.h"
#include <stdlib.h>
#include <string.h>

/* An opened backend and the memory that a hook takes of it. */
typedef struct stage_run {
  backend be;
  void *memory[16];
  int32_t n_memory;
} stage_run;

static void *take(stage_run *run, const void *data, size_t bytes) {
  void *memory = data ? backend_copy(&run->be, data, bytes) : run->be.ops->alloc(&run->be, bytes);
  run->memory[run->n_memory++] = memory;
  return memory;
}

static activation take_activation(stage_run *run, int32_t n, int32_t cols) {
  size_t count = (size_t)n * (size_t)cols, halves = (size_t)n * (size_t)(cols / ACT_HALF + 1) * 4;
  quantized q = {16,
                 take(run, NULL, 2 * count),
                 take(run, NULL, halves),
                 take(run, NULL, halves),
                 take(run, NULL, halves),
                 take(run, NULL, halves)};
  return (activation){cols, take(run, NULL, count * 4), q};
}

static int32_t open_run(stage_run *run, const char *device, const char *isa, int32_t n_threads, pyllm_error *err) {
  *run = (stage_run){0};
  int32_t status = backend_open(device, n_threads, isa, &run->be, err);
  if (!status) pool_begin(run->be.pool);
  return status;
}

static int32_t close_run(stage_run *run, int32_t status, pyllm_error *err) {
  if (!status) status = run->be.ops->sync(&run->be, err);
  for (int32_t i = 0; i < run->n_memory; i++) run->be.ops->release(&run->be, run->memory[i]);
  pool_end(run->be.pool);
  backend_close(&run->be);
  return status;
}

static bool same(float a, float b) { return a == b || (a != a && b != b); }

/* Of either number of bits; false where sums and products are not theirs. */
static bool read_planes(const backend *be, const activation *a, int32_t n, float *out) {
  size_t count = (size_t)n * (size_t)a->cols, halves = count / ACT_HALF, group = (size_t)act_group(a->q.bits);
  quantized q = {a->q.bits,
                 malloc(2 * count + 1),
                 malloc(halves * 4 + 1),
                 malloc(halves * 4 + 1),
                 malloc(halves * 4 + 1),
                 malloc(halves * 2 + 1)};
  be->ops->read(be, q.planes, a->q.planes, count * (size_t)q.bits / 8);
  be->ops->read(be, q.scale, a->q.scale, count / group * 4);
  be->ops->read(be, q.sum, a->q.sum, halves * 4);
  be->ops->read(be, q.product, a->q.product, halves * 4);
  be->ops->read(be, q.both, a->q.both, halves / 2 * 4);
  bool consistent = true;
  for (size_t h = 0; h < halves; h++) {
    int32_t sums[2] = {0}; /* of the first and the last two of every four */
    float scale = q.scale[h * ACT_HALF / group];
    for (size_t i = h * ACT_HALF; i < (h + 1) * ACT_HALF; i++) {
      int32_t value = quantized_at(&q, be->ops->on_host && be->kernels->words, i);
      out[i] = scale * (float)value;
      sums[i % 4 / 2] += value;
    }
    int32_t total = sums[0] + sums[1], words = (int32_t)((uint16_t)sums[0] | (uint32_t)sums[1] << 16);
    consistent &= (q.bits == 8 ? words : total) == q.sum[h] && same(scale * (float)total, q.product[h]);
    if (be->ops->on_host && h % 2) consistent &= same(q.product[h - 1] + q.product[h], q.both[h / 2]);
  }
  free(q.planes), free(q.scale), free(q.sum), free(q.product), free(q.both);
  return consistent;
}

/* Halves with one scale per token: what a GPU makes of more than a few tokens (cuda.cuh). */
static void read_halves(const backend *be, const activation *a, int32_t n, float *out) {
  size_t count = (size_t)n * (size_t)a->cols;
  uint16_t *halves = malloc(2 * count + 1);
  float *scale = malloc((size_t)n * sizeof *scale);
  be->ops->read(be, halves, a->q.planes, 2 * count);
  be->ops->read(be, scale, a->q.scale, (size_t)n * sizeof *scale);
  for (size_t i = 0; i < count; i++) out[i] = f16_to_f32(halves[i]) * scale[i / (size_t)a->cols];
  free(halves), free(scale);
}

/* The activation as quantized weights see it. */
static int32_t read_rounded(const backend *be, const activation *a, int32_t n, float *out, pyllm_error *err) {
  if (!be->ops->on_host && n > 4) read_halves(be, a, n, out);
  else if (!read_planes(be, a, n, out)) return fail(err, PYLLM_ERR_NUMERIC, "sums do not belong to the rounded values");
  return PYLLM_OK;
}

static int32_t read_activation(const backend *be, const activation *a, int32_t n, float *out, float *rounded,
                               pyllm_error *err) {
  be->ops->read(be, out, a->values, (size_t)n * (size_t)a->cols * sizeof *out);
  return rounded ? read_rounded(be, a, n, rounded, err) : PYLLM_OK;
}

int32_t hook_norm(const char *device, const char *isa, const float *x, const float *w, float eps, int32_t n,
                  int32_t cols, float *out, float *rounded, pyllm_error *err) {
  stage_run run;
  int32_t status = open_run(&run, device, isa, 1, err);
  if (status) return status;
  activation a = take_activation(&run, n, cols);
  const float *input = take(&run, x, (size_t)n * (size_t)cols * sizeof *x);
  run.be.ops->norm(&run.be, input, take(&run, w, (size_t)cols * sizeof *w), eps, n, rounded ? 16 : 0, &a);
  return close_run(&run, read_activation(&run.be, &a, n, out, rounded, err), err);
}

int32_t hook_graph(const char *device, const float *x, const float *w, float eps, int32_t n, int32_t cols, float *out,
                   pyllm_error *err) {
  stage_run run;
  int32_t status = open_run(&run, device, NULL, 1, err);
  if (status) return status;
  const ops *o = run.be.ops;
  if (!o->graph_begin) return close_run(&run, fail(err, PYLLM_ERR_UNSUPPORTED, "%s has no graphs", o->name), err);
  size_t bytes = (size_t)cols * sizeof *x;
  activation a = take_activation(&run, 1, cols);
  float *input = take(&run, NULL, bytes), *weight = take(&run, w, bytes);
  o->graph_begin(&run.be);
  o->norm(&run.be, input, weight, eps, 1, 0, &a);
  void *graph = o->graph_end(&run.be);
  for (int32_t i = 0; i < n; i++) {
    o->write(&run.be, input, x + (size_t)i * (size_t)cols, bytes);
    o->graph_run(&run.be, graph);
    o->read(&run.be, out + (size_t)i * (size_t)cols, a.values, bytes);
  }
  o->graph_free(&run.be, graph);
  return close_run(&run, PYLLM_OK, err);
}

int32_t hook_swiglu(const char *device, const char *isa, const float *gate, const float *up, int32_t n, int32_t cols,
                    float *out, float *rounded, pyllm_error *err) {
  stage_run run;
  int32_t status = open_run(&run, device, isa, 1, err);
  if (status) return status;
  activation a = take_activation(&run, n, cols);
  size_t bytes = (size_t)n * (size_t)cols * sizeof *gate;
  run.be.ops->swiglu(&run.be, take(&run, gate, bytes), take(&run, up, bytes), n, rounded ? 16 : 0, &a);
  return close_run(&run, read_activation(&run.be, &a, n, out, rounded, err), err);
}

/* x as a stage's result. silu(64) is 64, so swiglu gives exactly what it is given, and rounds it. */
static int32_t make_activation(stage_run *run, const float *x, int32_t n, int32_t cols, int32_t bits, activation *out,
                               float *seen, pyllm_error *err) {
  size_t count = (size_t)n * (size_t)cols, bytes = count * sizeof *x;
  *out = take_activation(run, n, cols);
  memcpy(seen, x, bytes);
  if (!bits) {
    run->be.ops->write(&run->be, out->values, x, bytes);
    return PYLLM_OK;
  }
  float *gate = malloc(bytes), *up = malloc(bytes);
  for (size_t i = 0; i < count; i++) gate[i] = 64.0f, up[i] = x[i] / 64.0f;
  run->be.ops->swiglu(&run->be, take(run, gate, bytes), take(run, up, bytes), n, bits, out);
  free(gate), free(up);
  return read_rounded(&run->be, out, n, seen, err);
}

int32_t hook_linear(const char *device, const char *isa, int32_t n_threads, int32_t type, const void *weights,
                    int32_t rows, int32_t cols, const float *x, int32_t n, int32_t bits, const float *bias, int32_t add,
                    float *out, float *seen, pyllm_error *err) {
  stage_run run;
  matrix w = {0};
  int32_t status = open_run(&run, device, isa, n_threads, err);
  if (status) return status;
  status = pack(run.be.pool, quant_find(type), weights, rows, cols, "test matrix", &w, err);
  if (!status) status = backend_place(&run.be, &w, "test matrix", err);
  if (!status && bits == 8 && !takes_bytes(&w.format))
    status = fail(err, PYLLM_ERR_ARGUMENT, "weights of %d bits take activations of 16", (int)w.format.bits);
  activation a;
  if (!status) status = make_activation(&run, x, n, cols, w.quantized ? bits : 0, &a, seen, err);
  if (!status) {
    size_t bytes = (size_t)n * (size_t)rows * sizeof *out;
    float *result = take(&run, out, bytes);
    linear_job job = {&w, bias ? take(&run, bias, (size_t)rows * sizeof *bias) : NULL, add != 0, result};
    run.be.ops->linear(&run.be, &a, n, &job, 1);
    run.be.ops->read(&run.be, out, result, bytes);
  }
  backend_free_matrix(&run.be, &w);
  return close_run(&run, status, err);
}

int32_t hook_begin(const char *device, const char *isa, int32_t type, const void *table, int32_t cols,
                   const int32_t *tokens, int32_t n, int32_t position, const double *frequency, int32_t half,
                   float mscale, float *x, float *cosine, float *sine, pyllm_error *err) {
  stage_run run;
  int32_t status = open_run(&run, device, isa, 1, err);
  if (status) return status;
  const ops *o = run.be.ops;
  size_t bytes = (size_t)n * (size_t)half * sizeof(float), row_bytes = (size_t)n * (size_t)cols * sizeof(float);
  float *to = take(&run, NULL, row_bytes), *cos_to = take(&run, NULL, bytes), *sin_to = take(&run, NULL, bytes);
  o->begin(&run.be, position, n);
  status = o->embed(&run.be, quant_find(type), table, cols, tokens, n, to, err);
  o->angles(&run.be, take(&run, frequency, (size_t)half * sizeof *frequency), half, mscale, position, n, cos_to,
            sin_to);
  o->read(&run.be, x, to, row_bytes);
  o->read(&run.be, cosine, cos_to, bytes);
  o->read(&run.be, sine, sin_to, bytes);
  return close_run(&run, status, err);
}
