/* Drawing the next token: penalties, then top_k, top_p, min_p, then temperature, as pyllm.h orders them. */
#include "error.h"
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct candidate {
  int32_t token;
  float logit;
  float p;
} candidate;

static int by_token(const void *a, const void *b) {
  int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  return (x > y) - (x < y);
}

/* Highest logit first, then lowest token: a total order, so that ties are the same everywhere. */
static int by_logit(const void *a, const void *b) {
  const candidate *x = a, *y = b;
  if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
  return (x->token > y->token) - (x->token < y->token);
}

static bool has_penalties(const pyllm_sampling *s) {
  return s->repeat_penalty != 1.0f || s->frequency_penalty != 0 || s->presence_penalty != 0;
}

/* Penalties may take a logit past what floats hold, where the difference of two would be no number. */
static float within_floats(float x) { return fminf(fmaxf(x, -FLT_MAX), FLT_MAX); }

static float penalized(float logit, int32_t times, const pyllm_sampling *s) {
  if (logit == -INFINITY) return logit; /* not allowed, and stays so */
  float repeated = within_floats(logit > 0 ? logit / s->repeat_penalty : logit * s->repeat_penalty);
  return within_floats(repeated - within_floats((float)times * s->frequency_penalty + s->presence_penalty));
}

/* Applies the penalties to each distinct recent token; false when memory is refused. */
static bool penalize(float *logits, int32_t n_vocab, const pyllm_sampling *s, const int32_t *recent, int32_t n_recent) {
  int32_t *sorted = malloc((size_t)n_recent * sizeof *sorted);
  if (!sorted) return false;
  for (int32_t i = 0; i < n_recent; i++) sorted[i] = recent[i];
  qsort(sorted, (size_t)n_recent, sizeof *sorted, by_token);
  for (int32_t i = 0, end; i < n_recent; i = end) {
    for (end = i; end < n_recent && sorted[end] == sorted[i];) end++;
    if (sorted[i] < 0 || sorted[i] >= n_vocab) continue;
    logits[sorted[i]] = penalized(logits[sorted[i]], end - i, s);
  }
  free(sorted);
  return true;
}

static void softmax(candidate *c, int32_t n, float temperature) {
  double sum = 0;
  for (int32_t i = 0; i < n; i++) sum += c[i].p = expf((c[i].logit - c[0].logit) / temperature);
  for (int32_t i = 0; i < n; i++) c[i].p = (float)(c[i].p / sum);
}

/* Smallest set of the best tokens whose probability reaches top_p. */
static int32_t keep_top_p(candidate *c, int32_t n, float top_p) {
  if (top_p >= 1) return n;
  softmax(c, n, 1.0f);
  double sum = 0;
  for (int32_t i = 0; i < n; i++)
    if ((sum += c[i].p) >= top_p) return i + 1;
  return n;
}

/* Tokens at least min_p times as probable as the best. */
static int32_t keep_min_p(const candidate *c, int32_t n, float min_p) {
  if (min_p <= 0) return n;
  int32_t kept = 1;
  while (kept < n && expf(c[kept].logit - c[0].logit) >= min_p) kept++;
  return kept;
}

/* splitmix64; in [0, 1). */
static double uniform(uint64_t *state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

enum {
  INSERTION_LIMIT = 256, /* so many are kept in order while the others pass by; more are sorted with all */
  AT_ONCE = 32           /* logits that are compared with the worst of the kept ones before any is looked at */
};

static bool any_above(const float *logits, float least) {
  uint32_t above = 0;
  for (int32_t i = 0; i < AT_ONCE; i++) above |= logits[i] > least;
  return above != 0;
}

/* The k best of n logits, in order; 1 <= k <= n. */
static void select_best(const float *logits, int32_t n, int32_t k, candidate *best) {
  int32_t kept = 0;
  for (int32_t i = 0; i < n; i++) {
    while (kept == k && i + AT_ONCE <= n && !any_above(logits + i, best[k - 1].logit)) i += AT_ONCE;
    if (i == n || (kept == k && logits[i] <= best[k - 1].logit)) continue;
    int32_t at = kept < k ? kept++ : kept - 1;
    for (; at > 0 && best[at - 1].logit < logits[i]; at--) best[at] = best[at - 1];
    best[at] = (candidate){i, logits[i], 0};
  }
}

static void sort_all(const float *logits, int32_t n, candidate *all) {
  for (int32_t i = 0; i < n; i++) all[i] = (candidate){i, logits[i], 0};
  qsort(all, (size_t)n, sizeof *all, by_logit);
}

/* c: the n best, best first. */
static int32_t draw(candidate *c, int32_t n, const pyllm_sampling *s, uint64_t *rng) {
  n = keep_top_p(c, n, s->top_p);
  n = keep_min_p(c, n, s->min_p);
  softmax(c, n, s->temperature);
  while (n > 1 && c[n - 1].p == 0) n--; /* rounding may leave the last one some luck */
  double left = uniform(rng);
  for (int32_t i = 0; i < n - 1; i++)
    if ((left -= c[i].p) < 0) return c[i].token;
  return c[n - 1].token;
}

static int32_t check(const float *logits, int32_t n_vocab, const pyllm_sampling *s, pyllm_error *err) {
  if (n_vocab < 1) return fail(err, PYLLM_ERR_ARGUMENT, "no logits to sample from");
  const float settings[] = {s->temperature,       s->top_p,           s->min_p, s->repeat_penalty,
                            s->frequency_penalty, s->presence_penalty};
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
    if (!isfinite(settings[i])) return fail(err, PYLLM_ERR_ARGUMENT, "a sampling parameter is not a finite number");
  if (s->repeat_penalty <= 0)
    return fail(err, PYLLM_ERR_ARGUMENT, "repeat_penalty is %g, expected above 0", (double)s->repeat_penalty);
  uint32_t any = 0, bad = 0; /* not bool, which GCC does not put into vectors */
  for (int32_t i = 0; i < n_vocab; i++) {
    any |= logits[i] > -INFINITY;
    bad |= !(logits[i] < INFINITY);
  }
  for (int32_t i = 0; bad && i < n_vocab; i++)
    if (!(logits[i] < INFINITY)) return fail(err, PYLLM_ERR_NUMERIC, "logit %d is %g", i, (double)logits[i]);
  return any ? PYLLM_OK : fail(err, PYLLM_ERR_ARGUMENT, "every logit is -infinity: no token is allowed");
}

/* false when memory is refused. */
static bool sample(const float *logits, int32_t n_vocab, const pyllm_sampling *s, uint64_t *rng, int32_t *token) {
  bool greedy = s->temperature <= 0;
  int32_t k = greedy ? 1 : s->top_k > 0 && s->top_k < n_vocab ? s->top_k : n_vocab;
  bool few = k <= INSERTION_LIMIT;
  candidate *c = malloc((size_t)(few ? k : n_vocab) * sizeof *c);
  if (!c) return false;
  if (few) select_best(logits, n_vocab, k, c);
  else sort_all(logits, n_vocab, c);
  *token = greedy ? c[0].token : draw(c, k, s, rng);
  free(c);
  return true;
}

int32_t pyllm_sample(const float *logits, int32_t n_vocab, const pyllm_sampling *params, const int32_t *recent,
                     int32_t n_recent, uint64_t *rng, int32_t *token, pyllm_error *err) {
  int32_t status = check(logits, n_vocab, params, err);
  if (status) return status;
  float *changed = NULL;
  bool ok = true;
  if (n_recent > 0 && has_penalties(params)) {
    size_t bytes = (size_t)n_vocab * sizeof *changed;
    changed = malloc(bytes);
    ok = changed && penalize(memcpy(changed, logits, bytes), n_vocab, params, recent, n_recent);
  }
  ok = ok && sample(changed ? changed : logits, n_vocab, params, rng, token);
  free(changed);
  return ok ? PYLLM_OK : fail(err, PYLLM_ERR_MEMORY, "memory to sample from %d logits was refused", n_vocab);
}
