/* Stages that work on one token at a time. */
#include "cpu.h"
#include <math.h>
#include <string.h>

enum { TOKENS_PER_PIECE = 8 };

/* Rounds a row where q.bits asks for it. */
static void round_row(const kernels *k, const activation *a, int32_t row) {
  if (!a->q.bits) return;
  quantized to = quantized_after(&a->q, a->cols, row);
  k->quantize(a->values + (int64_t)row * a->cols, a->cols, &to);
}

void cpu_begin(const backend *be, int32_t position, int32_t n) { (void)be, (void)position, (void)n; }

void cpu_angles(const backend *be, const double *frequency, int32_t half, float mscale, int32_t position, int32_t n,
                float *cosine, float *sine) {
  (void)be;
  for (int32_t t = 0; t < n; t++)
    for (int32_t i = 0; i < half; i++) {
      double angle = (position + t) * frequency[i];
      cosine[t * half + i] = (float)cos(angle) * mscale;
      sine[t * half + i] = (float)sin(angle) * mscale;
    }
}

typedef struct embed_run {
  const quant_type *type;
  const unsigned char *table;
  const int32_t *tokens;
  int32_t cols;
  float *x;
} embed_run;

static void embed_rows(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const embed_run *run = context;
  size_t row_bytes = (size_t)(run->cols / run->type->block) * (size_t)run->type->bytes;
  for (int32_t t = begin; t < end; t++)
    quant_dequantize(run->type, run->table + (size_t)run->tokens[t] * row_bytes, run->x + (int64_t)t * run->cols,
                     run->cols);
}

int32_t cpu_embed(const backend *be, const quant_type *type, const void *table, int32_t cols, const int32_t *tokens,
                  int32_t n, float *x, pyllm_error *err) {
  (void)err;
  embed_run run = {type, table, tokens, cols, x};
  pool_run(be->pool, n, TOKENS_PER_PIECE, embed_rows, &run);
  return PYLLM_OK;
}

typedef struct norm_run {
  const kernels *k;
  const float *x, *w;
  float eps;
  activation *out;
} norm_run;

static void norm_rows(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const norm_run *run = context;
  int32_t cols = run->out->cols;
  for (int32_t t = begin; t < end; t++) {
    run->k->rms_norm(run->x + (int64_t)t * cols, run->w, run->eps, cols, run->out->values + (int64_t)t * cols);
    round_row(run->k, run->out, t);
  }
}

void cpu_norm(const backend *be, const float *x, const float *w, float eps, int32_t n, int32_t bits, activation *out) {
  out->q.bits = bits;
  norm_run run = {be->kernels, x, w, eps, out};
  pool_run(be->pool, n, TOKENS_PER_PIECE, norm_rows, &run);
}

typedef struct swiglu_run {
  const kernels *k;
  const float *gate, *up;
  activation *out;
} swiglu_run;

static void swiglu_rows(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const swiglu_run *run = context;
  int64_t cols = run->out->cols;
  for (int32_t t = begin; t < end; t++) {
    run->k->swiglu(run->gate + t * cols, run->up + t * cols, run->out->cols, run->out->values + t * cols);
    round_row(run->k, run->out, t);
  }
}

void cpu_swiglu(const backend *be, const float *gate, const float *up, int32_t n, int32_t bits, activation *out) {
  out->q.bits = bits;
  swiglu_run run = {be->kernels, gate, up, out};
  pool_run(be->pool, n, TOKENS_PER_PIECE, swiglu_rows, &run);
}

typedef struct finish_run {
  const kernels *k;
  const attention_batch *b;
  int32_t first;
  activation *out;
} finish_run;

/* What stands for what a batch of one query left out is one more span of its rows. */
static void merge_rest(const attention_batch *b) {
  for (int32_t h = 0; h < b->n_heads; h++)
    cpu_merge_row(b, &b->state[h], b->out + h * b->head_dim, (softmax_state){b->local_mass[h], b->rest.weight[h]},
                  b->rest.out + h * b->head_dim);
}

static void finish_rows(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const finish_run *run = context;
  const attention_batch *b = run->b;
  for (int32_t t = begin; t < end; t++) {
    for (int32_t h = 0; h < b->n_heads; h++) {
      int64_t row = (int64_t)(run->first + t) * b->n_heads + h;
      const float *from = b->out + row * b->head_dim;
      float *to = run->out->values + ((int64_t)t * b->n_heads + h) * b->head_dim, weight = 1.0f / b->state[row].sum;
      for (int32_t i = 0; i < b->head_dim; i++) to[i] = from[i] * weight;
    }
    round_row(run->k, run->out, t);
  }
}

void cpu_finish(const backend *be, const attention_batch *b, int32_t first, int32_t bits, activation *out) {
  out->q.bits = bits;
  if (b->rest.exists) merge_rest(b);
  finish_run run = {be->kernels, b, first, out};
  pool_run(be->pool, b->n - first, TOKENS_PER_PIECE, finish_rows, &run);
}

typedef struct rope_run {
  const kernels *k;
  const rope_job *job;
  layer_cache *cache;
} rope_run;

static void rotate_heads(const rope_run *run, int32_t t, float *x, int32_t n_heads, const float *norm) {
  const rope_job *job = run->job;
  const float *cosine = job->cosine + (int64_t)t * (job->n_rot / 2), *sine = job->sine + (int64_t)t * (job->n_rot / 2);
  for (int32_t h = 0; h < n_heads; h++, x += job->head_dim) {
    if (norm) run->k->rms_norm(x, norm, job->norm_eps, job->head_dim, x);
    run->k->rope(x, cosine, sine, job->n_rot, job->kind == ROPE_PAIRS);
  }
}

static void rope_rows(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const rope_run *run = context;
  const rope_job *job = run->job;
  int32_t d = job->head_dim;
  for (int32_t t = begin; t < end; t++) {
    float *q = job->q + (int64_t)t * job->n_heads * d, *k = job->k + (int64_t)t * job->n_kv_heads * d;
    const float *v = job->v + (int64_t)t * job->n_kv_heads * d;
    rotate_heads(run, t, q, job->n_heads, job->q_norm);
    rotate_heads(run, t, k, job->n_kv_heads, job->k_norm);
    int32_t position = job->position + t, block = kv_block_of(job->n_sink, position);
    int32_t slot = position - kv_block_start(job->n_sink, block);
    for (int32_t g = 0; g < job->n_kv_heads; g++) {
      void *at = cache_block(run->cache, g, block, d);
      run->k->kv_store(run->cache->kv_type, k + g * d, v + g * d, d, slot, at);
    }
  }
}

void cpu_rope_store(const backend *be, const rope_job *job, int32_t n, layer_cache *cache) {
  rope_run run = {be->kernels, job, cache};
  pool_run(be->pool, n, TOKENS_PER_PIECE, rope_rows, &run);
}

bool cpu_finite(const backend *be, const float *x, int64_t n) {
  (void)be;
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, &x[i], sizeof bits);
    bad |= (bits & 0x7f800000) == 0x7f800000;
  }
  return !bad;
}
