/* A model: its configuration and its weights, read-only after pyllm_model_open. */
#ifndef PYLLM_SRC_MODEL_H
#define PYLLM_SRC_MODEL_H
#include "arch.h"
#include "ops.h"
#include "pack.h"
#include "pyllm.h"

typedef struct config {
  const arch *arch;
  int32_t n_layers, n_heads, n_kv_heads, head_dim;
  int32_t dim, n_ff, n_vocab, n_ctx_train;
  uint32_t sliding_window; /* tokens a query sees at most, not less than n_ctx_train; 0: all */
  int32_t n_rot;           /* dimensions of a head that RoPE rotates; even */
  float norm_eps;
  float attention_scale; /* c: score = c * q . k */
  float rope_mscale;     /* factor on cosine and sine (YaRN) */
} config;

typedef struct projection {
  matrix w;
  float *bias; /* (w.rows); NULL where absent */
} projection;

typedef struct layer_weights {
  float *attn_norm;       /* (dim) */
  projection q, k, v;     /* (n_heads * head_dim, dim), (n_kv_heads * head_dim, dim) twice */
  float *q_norm, *k_norm; /* (head_dim); NULL where absent */
  projection o;           /* (dim, n_heads * head_dim) */
  float *ffn_norm;        /* (dim) */
  projection gate, up;    /* (n_ff, dim) */
  projection down;        /* (dim, n_ff) */
} layer_weights;

/* Largest bias beside which bytes still hold the rest of a key: with a step of a quarter. On Qwen2.5-Coder-0.5B,
 * whose biases reach 211, five layers of 24 have larger ones, and halves in these lose a 40th of what bytes
 * everywhere do (docs/performance.md). */
#define WIDE_BIAS 32.0f

struct pyllm_model {
  const pyllm_file *file; /* held */
  _Atomic int32_t n_holders;
  config config;
  backend backend;
  double *rope_frequency;        /* (n_rot / 2) radians per position; like all weights in the backend's memory */
  const pyllm_tensor *embedding; /* (n_vocab, dim), read from the mapping */
  const quant_type *embedding_type;
  layer_weights *layers; /* (n_layers) */
  bool *wide_keys;       /* (n_layers) whether keys have biases of more than WIDE_BIAS; false on a GPU */
  float *output_norm;    /* (dim) */
  matrix output;         /* (n_vocab, dim) */
  uint64_t n_params, weight_bytes, resident_bytes;
};

/* Divisors of the RoPE frequencies, which are read with the configuration. */
#define ROPE_FREQS "rope_freqs.weight"

/* One more holder: pyllm_model_close frees with the last. */
void model_hold(const pyllm_model *m);

/* config.c: everything the model says about itself, checked. */
int32_t config_read(const pyllm_file *file, config *out, pyllm_error *err);
/* (n_rot / 2) doubles, owned by the caller; also sets c->rope_mscale. */
int32_t config_rope(const pyllm_file *file, config *c, double **out, pyllm_error *err);

#endif
