#include "model.h"
#include "backend.h"
#include "error.h"
#include "gguf.h"
#include "gguf_name.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Binding goes tensor by tensor; the first failure stops the rest, and closing frees whatever was bound. */
typedef struct binder {
  pyllm_model *model;
  pyllm_error *err;
  int32_t status;
  bool counting; /* nothing is read, and no memory taken: the model counts what binding would take */
  bool *found;   /* (tensors of the file) which of them the model has a use for */
} binder;

static const pyllm_tensor *find_tensor(binder *b, const char *name, bool required) {
  if (b->status) return NULL;
  const pyllm_tensor *t = gguf_find_tensor(b->model->file, name);
  if (t) b->found[t - pyllm_file_tensor(b->model->file, 0)] = true;
  else if (required)
    b->status = fail(b->err, PYLLM_ERR_FORMAT, "%s: tensor %s is missing", gguf_path(b->model->file), name);
  return t;
}

/* A tensor that nothing here multiplies with would be missing from every result. */
static void refuse_unused(binder *b) {
  const pyllm_file *file = b->model->file;
  find_tensor(b, ROPE_FREQS, false);
  for (uint64_t i = 0; i < pyllm_file_n_tensors(file) && !b->status; i++) {
    if (b->found[i]) continue;
    const pyllm_tensor *t = pyllm_file_tensor(file, i);
    gguf_shown shown;
    b->status =
        fail(b->err, PYLLM_ERR_UNSUPPORTED, "%s: tensor %s has no place in a model of architecture %s",
             gguf_part_path(file, t->part), gguf_show(t->name, t->name_size, &shown), b->model->config.arch->name);
  }
}

static bool check_shape(binder *b, const pyllm_tensor *t, const char *name, int32_t rows, int32_t cols) {
  uint64_t expected_rows = (uint64_t)rows;
  bool fits = t->shape[0] == (uint64_t)cols && t->shape[1] == expected_rows && t->shape[2] == 1 && t->shape[3] == 1;
  if (!fits)
    b->status = fail(b->err, PYLLM_ERR_FORMAT, "%s: tensor %s has shape (%llu, %llu, %llu, %llu), expected (%d, %d)",
                     gguf_part_path(b->model->file, t->part), name, (unsigned long long)t->shape[0],
                     (unsigned long long)t->shape[1], (unsigned long long)t->shape[2], (unsigned long long)t->shape[3],
                     cols, rows);
  return fits;
}

static void count(pyllm_model *m, const pyllm_tensor *t, uint64_t resident) {
  m->n_params += t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3];
  m->weight_bytes += t->size;
  m->resident_bytes += resident;
}

static void bind_matrix(binder *b, const char *name, int32_t rows, int32_t cols, matrix *out) {
  const pyllm_tensor *t = find_tensor(b, name, true);
  if (!t || !check_shape(b, t, name, rows, cols)) return;
  const quant_type *type = quant_find(t->type);
  if (b->counting) {
    count(b->model, t, pack_bytes(type, rows, cols));
    return;
  }
  char where[512];
  snprintf(where, sizeof where, "%s: tensor %s", gguf_part_path(b->model->file, t->part), name);
  b->status = pack(b->model->backend.pool, type, t->data, rows, cols, where, out, b->err);
  if (!b->status) b->status = backend_place(&b->model->backend, out, where, b->err);
  if (b->status) return;
  count(b->model, t, pack_bytes(type, rows, cols));
  gguf_release_pages(b->model->file);
}

/* A small vector as floats in the backend's memory: NULL where it is absent and not required. */
static float *bind_vector(binder *b, const char *name, int32_t n, bool required) {
  const pyllm_tensor *t = find_tensor(b, name, required);
  if (!t || !check_shape(b, t, name, 1, n)) return NULL;
  if (b->counting) {
    count(b->model, t, (uint64_t)n * sizeof(float));
    return NULL;
  }
  float *host = malloc((size_t)n * sizeof *host), *v = NULL;
  const char *path = gguf_part_path(b->model->file, t->part);
  if (host) {
    quant_dequantize(quant_find(t->type), t->data, host, n);
    for (int32_t i = 0; i < n && !b->status; i++)
      if (!isfinite(host[i]))
        b->status = fail(b->err, PYLLM_ERR_NUMERIC, "%s: tensor %s holds NaN or infinity at %d", path, name, i);
    v = backend_copy(&b->model->backend, host, (size_t)n * sizeof *host);
  }
  free(host);
  if (!v)
    b->status = alloc_failure(&b->model->backend,
                              fail(b->err, PYLLM_ERR_MEMORY, "%s: tensor %s: memory refused", path, name), b->err);
  else count(b->model, t, (uint64_t)n * sizeof *v);
  return v; /* owned by the model even when status is set: closing frees it */
}

typedef struct tensor_name {
  char text[64];
} tensor_name;

static const char *layer_tensor(int32_t layer, const char *part, const char *kind, tensor_name *out) {
  snprintf(out->text, sizeof out->text, "blk.%d.%s.%s", layer, part, kind);
  return out->text;
}

/* Layer i's NAME.weight (rows, cols) and NAME.bias (rows). */
static void bind_projection(binder *b, int32_t i, const char *part, int32_t rows, int32_t cols, bool needs_bias,
                            projection *out) {
  tensor_name name;
  bind_matrix(b, layer_tensor(i, part, "weight", &name), rows, cols, &out->w);
  out->bias = bind_vector(b, layer_tensor(i, part, "bias", &name), rows, needs_bias);
}

/* bias (n), the host's, or NULL. */
static bool is_wide(const float *bias, int32_t n) {
  float largest = 0;
  for (int32_t i = 0; bias && i < n; i++) largest = fmaxf(largest, fabsf(bias[i]));
  return largest > WIDE_BIAS;
}

static void bind_attention(binder *b, int32_t i, layer_weights *w) {
  const config *c = &b->model->config;
  tensor_name name;
  int32_t q_width = c->n_heads * c->head_dim, kv_width = c->n_kv_heads * c->head_dim;
  w->attn_norm = bind_vector(b, layer_tensor(i, "attn_norm", "weight", &name), c->dim, true);
  bind_projection(b, i, "attn_q", q_width, c->dim, c->arch->qkv_bias, &w->q);
  bind_projection(b, i, "attn_k", kv_width, c->dim, c->arch->qkv_bias, &w->k);
  bind_projection(b, i, "attn_v", kv_width, c->dim, c->arch->qkv_bias, &w->v);
  if (!b->counting && b->model->backend.ops->on_host) b->model->wide_keys[i] = is_wide(w->k.bias, kv_width);
  if (c->arch->qk_norm) {
    w->q_norm = bind_vector(b, layer_tensor(i, "attn_q_norm", "weight", &name), c->head_dim, true);
    w->k_norm = bind_vector(b, layer_tensor(i, "attn_k_norm", "weight", &name), c->head_dim, true);
  }
  bind_projection(b, i, "attn_output", c->dim, q_width, false, &w->o);
}

static void bind_feed_forward(binder *b, int32_t i, layer_weights *w) {
  const config *c = &b->model->config;
  tensor_name name;
  w->ffn_norm = bind_vector(b, layer_tensor(i, "ffn_norm", "weight", &name), c->dim, true);
  bind_projection(b, i, "ffn_gate", c->n_ff, c->dim, false, &w->gate);
  bind_projection(b, i, "ffn_up", c->n_ff, c->dim, false, &w->up);
  bind_projection(b, i, "ffn_down", c->dim, c->n_ff, false, &w->down);
}

/* The embedding table stays in the mapping: a token reads one row. Its row count is the vocabulary. */
static void bind_embedding(binder *b) {
  pyllm_model *m = b->model;
  const pyllm_tensor *t = find_tensor(b, "token_embd.weight", true);
  if (!t) return;
  if (t->shape[1] == 0 || t->shape[1] > (1 << 24)) {
    b->status = fail(b->err, PYLLM_ERR_FORMAT, "%s: tensor token_embd.weight has %llu rows, expected 1 to %d",
                     gguf_part_path(m->file, t->part), (unsigned long long)t->shape[1], 1 << 24);
    return;
  }
  m->config.n_vocab = (int32_t)t->shape[1];
  m->embedding = t;
  m->embedding_type = quant_find(t->type);
  check_shape(b, t, "token_embd.weight", m->config.n_vocab, m->config.dim);
}

static void bind_output(binder *b) {
  pyllm_model *m = b->model;
  bool tied = !find_tensor(b, "output.weight", false);
  m->output_norm = bind_vector(b, "output_norm.weight", m->config.dim, true);
  bind_matrix(b, tied ? "token_embd.weight" : "output.weight", m->config.n_vocab, m->config.dim, &m->output);
  if (!tied && m->embedding) count(m, m->embedding, 0);
}

static int32_t bind_rope(pyllm_model *m, pyllm_error *err) {
  double *frequency = NULL;
  int32_t status = config_rope(m->file, &m->config, &frequency, err);
  if (status) return status;
  m->rope_frequency = backend_copy(&m->backend, frequency, (size_t)(m->config.n_rot / 2) * sizeof *frequency);
  free(frequency);
  if (m->rope_frequency) return PYLLM_OK;
  return alloc_failure(&m->backend, fail(err, PYLLM_ERR_MEMORY, "%s: RoPE table refused", gguf_path(m->file)), err);
}

static int32_t bind_weights(pyllm_model *m, bool counting, pyllm_error *err) {
  binder b = {m, err, PYLLM_OK, counting, calloc((size_t)pyllm_file_n_tensors(m->file) + 1, sizeof *b.found)};
  m->layers = calloc((size_t)m->config.n_layers, sizeof *m->layers);
  m->wide_keys = calloc((size_t)m->config.n_layers, sizeof *m->wide_keys);
  if (!m->layers || !m->wide_keys || !b.found)
    b.status = fail(err, PYLLM_ERR_MEMORY, "%s: memory for %d layers refused", gguf_path(m->file), m->config.n_layers);
  bind_embedding(&b);
  for (int32_t i = 0; i < m->config.n_layers && !b.status; i++) {
    bind_attention(&b, i, &m->layers[i]);
    bind_feed_forward(&b, i, &m->layers[i]);
  }
  bind_output(&b);
  refuse_unused(&b);
  free(b.found);
  return b.status;
}

static int32_t load_weights(pyllm_model *m, pyllm_error *err) {
  pool_begin(m->backend.pool);
  int32_t status = bind_weights(m, false, err);
  pool_end(m->backend.pool);
  return status;
}

int32_t pyllm_model_open(const pyllm_file *file, const pyllm_model_params *params, pyllm_model **out,
                         pyllm_error *err) {
  pyllm_model *m = calloc(1, sizeof *m);
  if (!m) return fail(err, PYLLM_ERR_MEMORY, "%s: memory refused", gguf_path(file));
  m->n_holders = 1;
  m->file = file;
  gguf_hold(file);
  int32_t status = config_read(file, &m->config, err);
  if (!status) status = backend_open(params->device, params->n_threads, params->isa, &m->backend, err);
  if (!status) status = bind_rope(m, err);
  if (!status) status = load_weights(m, err);
  if (status) {
    pyllm_model_close(m);
    return status;
  }
  *out = m;
  return PYLLM_OK;
}

static void free_layer(const backend *be, layer_weights *w) {
  float *norms[] = {w->attn_norm, w->q_norm, w->k_norm, w->ffn_norm};
  projection *projections[] = {&w->q, &w->k, &w->v, &w->o, &w->gate, &w->up, &w->down};
  for (size_t i = 0; i < sizeof norms / sizeof *norms; i++) be->ops->release(be, norms[i]);
  for (size_t i = 0; i < sizeof projections / sizeof *projections; i++) {
    backend_free_matrix(be, &projections[i]->w);
    be->ops->release(be, projections[i]->bias);
  }
}

void model_hold(const pyllm_model *m) { ((pyllm_model *)m)->n_holders++; }

void pyllm_model_close(pyllm_model *m) {
  if (!m || --m->n_holders > 0) return;
  const backend *be = &m->backend;
  for (int32_t i = 0; m->layers && i < m->config.n_layers; i++) free_layer(be, &m->layers[i]);
  free(m->layers);
  free(m->wide_keys);
  if (be->ops) {
    be->ops->release(be, m->output_norm);
    be->ops->release(be, m->rope_frequency);
    backend_free_matrix(be, &m->output);
    backend_close(&m->backend);
  }
  pyllm_file_close((pyllm_file *)m->file);
  free(m);
}

void pyllm_model_get_info(const pyllm_model *m, pyllm_model_info *out) {
  const config *c = &m->config;
  *out = (pyllm_model_info){.n_layers = c->n_layers,
                            .n_heads = c->n_heads,
                            .n_kv_heads = c->n_kv_heads,
                            .head_dim = c->head_dim,
                            .dim = c->dim,
                            .n_ff = c->n_ff,
                            .n_vocab = c->n_vocab,
                            .n_ctx_train = c->n_ctx_train,
                            .n_threads = pool_size(m->backend.pool),
                            .n_params = m->n_params,
                            .weight_bytes = m->weight_bytes,
                            .resident_bytes = m->resident_bytes};
  snprintf(out->architecture, sizeof out->architecture, "%s", c->arch->name);
  snprintf(out->isa, sizeof out->isa, "%s", m->backend.kernels->name);
}

int32_t pyllm_model_memory(const pyllm_file *file, uint64_t *bytes, pyllm_error *err) {
  pyllm_model m = {.file = file};
  int32_t status = config_read(file, &m.config, err);
  if (!status) status = bind_weights(&m, true, err);
  free(m.layers);
  free(m.wide_keys);
  if (!status) *bytes = m.resident_bytes;
  return status;
}
