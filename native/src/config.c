#include "model.h"
#include "error.h"
#include "gguf.h"
#include "gguf_name.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct key {
  char text[128];
} key;

static const char *key_of(const arch *a, const char *name, key *out) {
  snprintf(out->text, sizeof out->text, "%s.%s", a->name, name);
  return out->text;
}

/* A positive integer of at most `limit`. fallback < 0: the key must be there. */
static int32_t read_size(const pyllm_file *file, const arch *a, const char *name, int32_t fallback, int32_t limit,
                         int32_t *out, pyllm_error *err) {
  key k;
  uint32_t value = (uint32_t)fallback;
  int32_t status = gguf_get_u32(file, key_of(a, name, &k), fallback < 0, &value, err);
  if (status) return status;
  if (value == 0 || value > (uint32_t)limit)
    return fail(err, PYLLM_ERR_FORMAT, "%s: key %s is %u, expected 1 to %d", gguf_path(file), k.text, value, limit);
  *out = (int32_t)value;
  return PYLLM_OK;
}

static int32_t read_float(const pyllm_file *file, const arch *a, const char *name, bool required, float *out,
                          pyllm_error *err) {
  key k;
  int32_t status = gguf_get_f32(file, key_of(a, name, &k), required, out, err);
  if (status) return status;
  if (!isfinite(*out) || *out < 0)
    return fail(err, PYLLM_ERR_FORMAT, "%s: key %s is %g, expected a finite number >= 0", gguf_path(file), k.text,
                (double)*out);
  return PYLLM_OK;
}

static int32_t read_arch(const pyllm_file *file, const arch **out, pyllm_error *err) {
  const char *name = NULL;
  uint64_t size = 0;
  int32_t status = gguf_get_string(file, "general.architecture", true, &name, &size, err);
  if (status) return status;
  *out = arch_find(name, size);
  if (*out) return PYLLM_OK;
  gguf_shown shown;
  return fail(err, PYLLM_ERR_UNSUPPORTED, "%s: architecture %s is not supported; supported: %s", gguf_path(file),
              gguf_show(name, size, &shown), arch_supported());
}

/* Features that would silently change results if they were ignored. A sliding window does so past its end only, of
 * which sessions take care. */
static int32_t refuse_unsupported(const pyllm_file *file, config *c, pyllm_error *err) {
  key experts, window;
  uint32_t n_experts = 0;
  TRY(gguf_get_u32(file, key_of(c->arch, "expert_count", &experts), false, &n_experts, err));
  TRY(gguf_get_u32(file, key_of(c->arch, "attention.sliding_window", &window), false, &c->sliding_window, err));
  bool slides = c->sliding_window && c->sliding_window < (uint32_t)c->n_ctx_train;
  if (n_experts || slides)
    return fail(err, PYLLM_ERR_UNSUPPORTED,
                "%s: key %s is %u: mixtures of experts and sliding-window models are not supported", gguf_path(file),
                n_experts ? experts.text : window.text, n_experts ? n_experts : c->sliding_window);
  return PYLLM_OK;
}

static int32_t check_heads(const pyllm_file *file, const config *c, pyllm_error *err) {
  const char *name = c->arch->name, *path = gguf_path(file);
  if (c->n_heads % c->n_kv_heads)
    return fail(err, PYLLM_ERR_FORMAT, "%s: key %s.attention.head_count is %d, not a multiple of head_count_kv %d",
                path, name, c->n_heads, c->n_kv_heads);
  if (c->head_dim % 16 || c->head_dim > LARGEST_HEAD)
    return fail(err, PYLLM_ERR_UNSUPPORTED, "%s: head dimension %d is not supported: a multiple of 16 up to %d is",
                path, c->head_dim, LARGEST_HEAD);
  if (c->n_rot % 2 || c->n_rot > c->head_dim)
    return fail(err, PYLLM_ERR_FORMAT, "%s: key %s.rope.dimension_count is %d, expected an even number up to %d", path,
                name, c->n_rot, c->head_dim);
  if (c->n_ff % 16 || c->dim % 2)
    return fail(err, PYLLM_ERR_UNSUPPORTED,
                "%s: embedding length %d and feed-forward length %d are not supported: an even one and a "
                "multiple of 16 are",
                path, c->dim, c->n_ff);
  return PYLLM_OK;
}

int32_t config_read(const pyllm_file *file, config *out, pyllm_error *err) {
  config c = {0};
  TRY(read_arch(file, &c.arch, err));
  TRY(read_size(file, c.arch, "block_count", -1, 1024, &c.n_layers, err));
  TRY(read_size(file, c.arch, "embedding_length", -1, 1 << 17, &c.dim, err));
  TRY(read_size(file, c.arch, "feed_forward_length", -1, 1 << 20, &c.n_ff, err));
  TRY(read_size(file, c.arch, "context_length", -1, 1 << 30, &c.n_ctx_train, err));
  TRY(read_size(file, c.arch, "attention.head_count", -1, 1024, &c.n_heads, err));
  TRY(read_size(file, c.arch, "attention.head_count_kv", c.n_heads, c.n_heads, &c.n_kv_heads, err));
  TRY(read_size(file, c.arch, "attention.key_length", c.dim / c.n_heads, LARGEST_HEAD, &c.head_dim, err));
  int32_t value_length = 0;
  TRY(read_size(file, c.arch, "attention.value_length", c.head_dim, LARGEST_HEAD, &value_length, err));
  if (value_length != c.head_dim)
    return fail(err, PYLLM_ERR_UNSUPPORTED, "%s: key length %d and value length %d differ: not supported",
                gguf_path(file), c.head_dim, value_length);
  TRY(read_size(file, c.arch, "rope.dimension_count", c.head_dim, LARGEST_HEAD, &c.n_rot, err));
  TRY(read_float(file, c.arch, "attention.layer_norm_rms_epsilon", true, &c.norm_eps, err));
  TRY(read_float(file, c.arch, "attention.scale", false, &c.attention_scale, err));
  if (c.attention_scale == 0) c.attention_scale = 1.0f / sqrtf((float)c.head_dim); /* 0 means the usual one */
  TRY(check_heads(file, &c, err));
  TRY(refuse_unsupported(file, &c, err));
  *out = c;
  return PYLLM_OK;
}

typedef struct rope_scaling {
  enum { SCALING_NONE, SCALING_LINEAR, SCALING_YARN } type;
  float base, factor, mscale;
  float n_ctx_original, ext_factor, beta_fast, beta_slow;
} rope_scaling;

static int32_t read_scaling_type(const pyllm_file *file, const config *c, rope_scaling *s, pyllm_error *err) {
  key k;
  const char *type = "linear"; /* files that give a factor only mean this; a factor of 1 changes nothing */
  uint64_t size = 6;
  TRY(gguf_get_string(file, key_of(c->arch, "rope.scaling.type", &k), false, &type, &size, err));
  if (size == 4 && memcmp(type, "none", 4) == 0) s->type = SCALING_NONE;
  else if (size == 6 && memcmp(type, "linear", 6) == 0) s->type = SCALING_LINEAR;
  else if (size == 4 && memcmp(type, "yarn", 4) == 0) s->type = SCALING_YARN;
  else {
    gguf_shown shown;
    return fail(err, PYLLM_ERR_UNSUPPORTED, "%s: key %s is %s; supported: none, linear, yarn, and llama3 by rope_freqs",
                gguf_path(file), k.text, gguf_show(type, size, &shown));
  }
  return PYLLM_OK;
}

static int32_t read_scaling(const pyllm_file *file, const config *c, rope_scaling *s, pyllm_error *err) {
  *s = (rope_scaling){.base = 10000.0f,
                      .factor = 1.0f,
                      .mscale = 1.0f,
                      .n_ctx_original = (float)c->n_ctx_train,
                      .ext_factor = 1.0f,
                      .beta_fast = 32.0f,
                      .beta_slow = 1.0f};
  TRY(read_float(file, c->arch, "rope.freq_base", false, &s->base, err));
  TRY(read_scaling_type(file, c, s, err));
  TRY(read_float(file, c->arch, "rope.scale_linear", false, &s->factor, err)); /* the factor's name in old files */
  TRY(read_float(file, c->arch, "rope.scaling.factor", false, &s->factor, err));
  if (s->factor == 0) s->factor = 1.0f; /* 0 means none */
  float yarn_mscale = 1.0f;
  TRY(read_float(file, c->arch, "rope.scaling.attn_factor", false, &s->mscale, err));
  TRY(read_float(file, c->arch, "rope.scaling.yarn_ext_factor", false, &s->ext_factor, err));
  TRY(read_float(file, c->arch, "rope.scaling.yarn_attn_factor", false, &yarn_mscale, err));
  s->mscale *= yarn_mscale;
  TRY(read_float(file, c->arch, "rope.scaling.yarn_beta_fast", false, &s->beta_fast, err));
  TRY(read_float(file, c->arch, "rope.scaling.yarn_beta_slow", false, &s->beta_slow, err));
  key k;
  uint32_t original = (uint32_t)c->n_ctx_train;
  TRY(gguf_get_u32(file, key_of(c->arch, "rope.scaling.original_context_length", &k), false, &original, err));
  s->n_ctx_original = (float)original;
  if (s->base <= 1.0f || s->factor <= 0 || s->mscale <= 0 || original == 0)
    return fail(err, PYLLM_ERR_FORMAT,
                "%s: RoPE base %g, scaling factor %g, attention factor %g and original context %u are not usable",
                gguf_path(file), (double)s->base, (double)s->factor, (double)s->mscale, original);
  return PYLLM_OK;
}

/* The dimension pair whose wavelength makes `turns` turns over the original context (YaRN, section 3.2). */
static double yarn_pair(const config *c, const rope_scaling *s, double turns) {
  const double tau = 6.283185307179586;
  return c->n_rot * log(s->n_ctx_original / (turns * tau)) / (2 * log((double)s->base));
}

static double scaled_frequency(const config *c, const rope_scaling *s, int32_t i) {
  double plain = pow((double)s->base, -2.0 * i / c->n_rot);
  if (s->type == SCALING_NONE) return plain;
  if (s->type == SCALING_LINEAR) return plain / s->factor;
  double low = fmax(0, floor(yarn_pair(c, s, s->beta_fast)));
  double high = fmin(c->n_rot - 1, ceil(yarn_pair(c, s, s->beta_slow)));
  double ramp = fmin(1, fmax(0, (i - low) / fmax(0.001, high - low)));
  double keep = (1 - ramp) * s->ext_factor; /* share of the unscaled frequency */
  return plain / s->factor * (1 - keep) + plain * keep;
}

/* Llama 3 ships its scaling as divisors of the frequencies. */
static int32_t divide_by_rope_freqs(const pyllm_file *file, const config *c, double *frequency, pyllm_error *err) {
  const pyllm_tensor *t = gguf_find_tensor(file, ROPE_FREQS);
  if (!t) return PYLLM_OK;
  if (t->type != TYPE_F32 || t->n_dims != 1 || t->shape[0] != (uint64_t)(c->n_rot / 2))
    return fail(err, PYLLM_ERR_FORMAT, "%s: tensor " ROPE_FREQS " is %s with %llu values, expected F32 with %d",
                gguf_path(file), pyllm_type_name(t->type), (unsigned long long)t->shape[0], c->n_rot / 2);
  for (int32_t i = 0; i < c->n_rot / 2; i++) {
    float divisor;
    memcpy(&divisor, (const char *)t->data + 4 * (size_t)i, 4);
    if (!isfinite(divisor) || divisor <= 0)
      return fail(err, PYLLM_ERR_NUMERIC, "%s: tensor " ROPE_FREQS " holds %g at %d, expected a positive number",
                  gguf_path(file), (double)divisor, i);
    frequency[i] /= divisor;
  }
  return PYLLM_OK;
}

int32_t config_rope(const pyllm_file *file, config *c, double **out, pyllm_error *err) {
  rope_scaling s;
  TRY(read_scaling(file, c, &s, err));
  c->rope_mscale = s.mscale;
  if (s.type == SCALING_YARN && s.ext_factor != 0) c->rope_mscale *= 1.0f + 0.1f * logf(s.factor);
  double *frequency = malloc((size_t)(c->n_rot / 2) * sizeof *frequency);
  if (!frequency) return fail(err, PYLLM_ERR_MEMORY, "%s: RoPE table refused", gguf_path(file));
  for (int32_t i = 0; i < c->n_rot / 2; i++) frequency[i] = scaled_frequency(c, &s, i);
  int32_t status = divide_by_rope_freqs(file, c, frequency, err);
  if (status) {
    free(frequency);
    return status;
  }
  *out = frequency;
  return PYLLM_OK;
}
