#include "policy.h"
#include "error.h"
#include "geometry.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

int32_t policy_check_bits(int32_t page_bits, pyllm_error *err) {
  if (page_bits >= 0 && page_bits <= 4) return PYLLM_OK;
  return fail(err, PYLLM_ERR_ARGUMENT, "a key sketch of %d bits: 0 (none), 1 (graded), 2, 3 and 4 are possible",
              page_bits);
}

/* A copy of `bytes`, or NULL of nothing; sets *refused when memory is. */
static void *copy_of(const void *source, size_t bytes, bool *refused) {
  void *copy = source ? malloc(bytes) : NULL;
  *refused |= source && !copy;
  return copy ? memcpy(copy, source, bytes) : NULL;
}

bool policy_needs_sketch(const attention_policy *p, size_t n, int32_t page_bits, const sketch_recipe *recipe) {
  if (p->page_bits == 0) return false;
  if (p->page_bits != page_bits) return true;
  return p->page_bits == PYLLM_GRADED && (memcmp(p->channels, recipe->channels, n * sizeof *p->channels) != 0 ||
                                          memcmp(p->query_means, recipe->queries, n * sizeof *p->query_means) != 0);
}

bool sketch_recipe_new(const attention_policy *p, size_t n, sketch_recipe *out) {
  bool refused = false;
  out->channels = copy_of(p->channels, n * sizeof *p->channels, &refused);
  out->queries = copy_of(p->query_means, n * sizeof *p->query_means, &refused);
  return !refused;
}

void sketch_recipe_free(sketch_recipe *recipe) {
  free(recipe->channels);
  free(recipe->queries);
}

static int32_t check_numbers(const pyllm_attention *a, pyllm_error *err) {
  if (a->policy < PYLLM_DENSE || a->policy > PYLLM_ADAPTIVE)
    return fail(err, PYLLM_ERR_ARGUMENT, "attention policy %d is unknown", a->policy);
  if (a->granularity != PYLLM_HEAD && a->granularity != PYLLM_GROUP)
    return fail(err, PYLLM_ERR_ARGUMENT, "attention granularity %d is unknown", a->granularity);
  if (a->gaussian < PYLLM_LOGNORMAL || a->gaussian > PYLLM_TRUNCATED)
    return fail(err, PYLLM_ERR_ARGUMENT, "Gaussian form %d is unknown", a->gaussian);
  if (a->estimate < PYLLM_GAUSSIAN || a->estimate > PYLLM_MAXIMUM)
    return fail(err, PYLLM_ERR_ARGUMENT, "estimate %d is unknown", a->estimate);
  if (a->n_window < 1) return fail(err, PYLLM_ERR_ARGUMENT, "attention window is %d, expected at least 1", a->n_window);
  if (!(a->page_share >= 0) || !(a->decode_share >= 0) || !(a->page_drop >= 0))
    return fail(err, PYLLM_ERR_ARGUMENT, "page_share is %g, decode_share %g and page_drop %g, expected at least 0",
                (double)a->page_share, (double)a->decode_share, (double)a->page_drop);
  if (!(a->page_rest >= 0 && a->page_rest <= 1))
    return fail(err, PYLLM_ERR_ARGUMENT, "page_rest is %g, expected 0 to 1", (double)a->page_rest);
  if (a->page_rest > 0 && a->page_bits != PYLLM_GRADED)
    return fail(err, PYLLM_ERR_ARGUMENT, "page_rest is %g, but only a graded key sketch has what it takes",
                (double)a->page_rest);
  return policy_check_bits(a->page_bits, err);
}

static int32_t check_presence(const pyllm_attention *a, pyllm_error *err) {
  if ((a->policy == PYLLM_ORACLE || a->policy == PYLLM_ADAPTIVE) && !a->thresholds)
    return fail(err, PYLLM_ERR_ARGUMENT, "this attention policy needs thresholds");
  if (a->policy == PYLLM_STATIC && !a->static_local)
    return fail(err, PYLLM_ERR_ARGUMENT, "static attention needs its head labels");
  if (a->estimate != PYLLM_GAUSSIAN && !a->coefficients)
    return fail(err, PYLLM_ERR_ARGUMENT, "an estimate by regression needs its coefficients");
  if (!a->means != !a->covariances)
    return fail(err, PYLLM_ERR_ARGUMENT, "calibrated moments need means and covariances");
  if (a->page_bits == PYLLM_GRADED && !(a->channels && a->query_means))
    return fail(err, PYLLM_ERR_ARGUMENT, "a graded key sketch needs the order of the channels and the mean queries");
  return PYLLM_OK;
}

static int32_t check_finite(const char *name, const float *values, size_t n, pyllm_error *err) {
  for (size_t i = 0; values && i < n; i++)
    if (!isfinite(values[i])) return fail(err, PYLLM_ERR_ARGUMENT, "%s %zu is not finite", name, i);
  return PYLLM_OK;
}

/* cov (d, d): a covariance up to rounding, as far as its diagonal and symmetry tell. */
static bool is_covariance(const float *cov, int32_t d) {
  float largest = 0;
  for (int32_t i = 0; i < d; i++) {
    if (cov[i * d + i] < 0) return false;
    largest = fmaxf(largest, cov[i * d + i]);
  }
  for (int32_t i = 0; i < d; i++)
    for (int32_t j = 0; j < i; j++)
      if (fabsf(cov[i * d + j] - cov[j * d + i]) > 1e-4f * largest) return false;
  return true;
}

/* channels (heads, d): each head's are 0 to d - 1 in some order. */
static int32_t check_channels(const uint16_t *channels, size_t heads, size_t d, pyllm_error *err) {
  for (size_t i = 0; channels && i < heads; i++) {
    bool seen[LARGEST_HEAD] = {false};
    for (size_t j = 0; j < d; j++) {
      size_t channel = channels[i * d + j];
      if (channel >= d || seen[channel])
        return fail(err, PYLLM_ERR_ARGUMENT, "channel %zu of key/value head %zu is %zu: out of range or named twice", j,
                    i, channel);
      seen[channel] = true;
    }
  }
  return PYLLM_OK;
}

static int32_t check_arrays(const pyllm_attention *a, const policy_shape *s, pyllm_error *err) {
  size_t heads = (size_t)s->n_layers * (size_t)s->n_heads, kv_heads = (size_t)s->n_layers * (size_t)s->n_kv_heads;
  size_t d = (size_t)s->head_dim;
  for (size_t i = 0; a->thresholds && i < heads; i++)
    if (isnan(a->thresholds[i])) return fail(err, PYLLM_ERR_ARGUMENT, "attention threshold %zu is NaN", i);
  int32_t status = check_finite("regression coefficient", a->coefficients, heads * 3, err);
  if (!status) status = check_finite("calibrated mean", a->means, kv_heads * d, err);
  if (!status) status = check_finite("calibrated covariance", a->covariances, kv_heads * d * d, err);
  if (!status) status = check_finite("mean query", a->query_means, kv_heads * d, err);
  if (!status) status = check_channels(a->channels, kv_heads, d, err);
  for (size_t i = 0; !status && a->covariances && i < kv_heads; i++)
    if (!is_covariance(a->covariances + i * d * d, s->head_dim))
      status = fail(err, PYLLM_ERR_ARGUMENT, "calibrated covariance of layer %zu, key/value head %zu: not symmetric",
                    i / (size_t)s->n_kv_heads, i % (size_t)s->n_kv_heads);
  return status;
}

int32_t policy_new(const pyllm_attention *a, const policy_shape *s, attention_policy *out, pyllm_error *err) {
  int32_t status = check_numbers(a, err);
  if (!status) status = check_presence(a, err);
  if (!status) status = check_arrays(a, s, err);
  if (status) return status;
  size_t heads = (size_t)s->n_layers * (size_t)s->n_heads, kv_heads = (size_t)s->n_layers * (size_t)s->n_kv_heads;
  size_t d = (size_t)s->head_dim;
  bool refused = false, graded = a->page_bits == PYLLM_GRADED, shared = s->n_heads / s->n_kv_heads <= SHARED_ROWS;
  attention_policy p = {.policy = a->policy,
                        .granularity = a->granularity,
                        .n_window = a->n_window,
                        .thresholds = copy_of(a->thresholds, heads * sizeof(float), &refused),
                        .static_local = copy_of(a->static_local, heads, &refused),
                        .gaussian = a->gaussian,
                        .estimate = a->estimate,
                        .coefficients = copy_of(a->coefficients, heads * 3 * sizeof(float), &refused),
                        .means = copy_of(a->means, kv_heads * d * sizeof(float), &refused),
                        .covariances = copy_of(a->covariances, kv_heads * d * d * sizeof(float), &refused),
                        .page_bits = a->page_bits,
                        .page_share = a->page_share,
                        .decode_share = a->decode_share,
                        .page_drop = a->page_drop,
                        .channels = copy_of(graded ? a->channels : NULL, kv_heads * d * sizeof(uint16_t), &refused),
                        .page_rest = shared ? a->page_rest : 0,
                        .query_means = copy_of(graded ? a->query_means : NULL, kv_heads * d * sizeof(float), &refused)};
  if (refused) {
    policy_free(&p);
    return fail(err, PYLLM_ERR_MEMORY, "memory for an attention policy of %zu heads was refused", heads);
  }
  *out = p;
  return PYLLM_OK;
}

void policy_free(attention_policy *p) {
  free(p->thresholds);
  free(p->static_local);
  free(p->coefficients);
  free(p->means);
  free(p->covariances);
  free(p->channels);
  free(p->query_means);
}
