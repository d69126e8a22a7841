/* How attention decides, checked and resolved to arrays: an owned copy of what the caller set. */
#ifndef PYLLM_SRC_POLICY_H
#define PYLLM_SRC_POLICY_H
#include "pyllm.h"
#include <stdbool.h>
#include <stddef.h>

typedef struct policy_shape {
  int32_t n_layers, n_heads, n_kv_heads, head_dim;
} policy_shape;

typedef struct attention_policy {
  int32_t policy, granularity, n_window;
  float *thresholds;     /* (n_layers, n_heads) */
  uint8_t *static_local; /* (n_layers, n_heads) */
  int32_t gaussian, estimate;
  float *coefficients; /* (n_layers, n_heads, 3) */
  float *means;        /* (n_layers, n_kv_heads, head_dim); NULL: the moments are the prompt's */
  float *covariances;  /* (n_layers, n_kv_heads, head_dim, head_dim) */
  int32_t page_bits;   /* 0: long heads read the whole bulk */
  float page_share, decode_share, page_drop;
  uint16_t *channels; /* (n_layers, n_kv_heads, head_dim) of a graded sketch; NULL with others */
  float page_rest;    /* 0 where a group has more than SHARED_ROWS heads */
  float *query_means; /* as channels */
} attention_policy;

/* Fails where there is no such key sketch. */
int32_t policy_check_bits(int32_t page_bits, pyllm_error *err);
/* What a graded sketch is made with; both (n_layers, n_kv_heads, head_dim), NULL of others. */
typedef struct sketch_recipe {
  uint16_t *channels;
  float *queries; /* the usual ones */
} sketch_recipe;

/* Whether a policy has a sketch, and other than of these page_bits made with this, n values each. */
bool policy_needs_sketch(const attention_policy *p, size_t n, int32_t page_bits, const sketch_recipe *recipe);
/* Copies of the policy's, where its sketch is graded; false when memory is refused, and what there is is still to be
 * freed. */
bool sketch_recipe_new(const attention_policy *p, size_t n, sketch_recipe *out);
void sketch_recipe_free(sketch_recipe *recipe);
/* Fails with one sentence for what no policy can be; out is owned by the caller. */
int32_t policy_new(const pyllm_attention *a, const policy_shape *shape, attention_policy *out, pyllm_error *err);
void policy_free(attention_policy *p);

#endif
