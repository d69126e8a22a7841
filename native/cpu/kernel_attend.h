/* Attention of a few query rows over up to 4 strips of 16 keys. Part of kernels.c.
 *
 * With few rows it waits for memory, so while keys are multiplied their values are asked for, line by line, and the
 * next keys while values are: in one burst they would fill the few buffers for misses, and the products wait behind
 * them. */
#include "kernels.h"

enum { PREFETCH_ROWS = 8 };

/* What comes after strip s of the keys and of the values; NULL where there is nothing, or time enough. */
static inline const void *after_keys(const attend_args *a, int s) {
  return a->rows > PREFETCH_ROWS ? NULL : a->out ? a->v[s] : a->next_k[s];
}

static inline const void *after_values(const attend_args *a, int s) {
  return a->rows > PREFETCH_ROWS ? NULL : a->next_k[s];
}

#if defined(__AVX512BF16__)
#include "kernel_attend_bf16.h"
#else
#include "kernel_attend_f32.h"
#endif

/* The largest of a row's scores and `least`; masked keys get a score that weighs nothing. */
static inline float masked_max(float *scores, int32_t n_valid, float least) {
  for (int32_t j = n_valid; j < KV_BLOCK; j++) scores[j] = -1e30f;
  vf top = vset(least);
  for (int j = 0; j < KV_BLOCK; j += VL) top = vmax(top, vload(scores + j));
  return vreduce_max(top);
}

/* Turns scores of one row into e^(score - new maximum), continues its softmax state, returns the factor that
 * rescales what was accumulated under the old maximum. Masked keys get weight 0. */
static inline float softmax_step(float *scores, int32_t n_valid, softmax_state *state) {
  float max = masked_max(scores, n_valid, state->max);
  vf sum = vset(0);
  for (int j = 0; j < KV_BLOCK; j += VL) {
    vf p = vexp_below(vload(scores + j), max);
    vstore(scores + j, p);
    sum += p;
  }
  float rescale = max == state->max ? 1.0f : vexp_below(vset(state->max), max)[0];
  state->sum = state->sum * rescale + vsum(sum);
  state->max = max;
  return rescale;
}

#include "kernel_attend_q8.h"

static void attend_strips(const attend_args *a) {
  if (a->kv_type == PYLLM_KV_Q8_0) {
    attend_bytes(a);
    return;
  }
  attend_scores(a);
  for (int32_t r = 0; r < a->rows; r++) {
    if (a->n_valid[r] > 0) {
      a->alpha[r] = softmax_step(a->scores + r * KV_BLOCK, a->n_valid[r], a->state + r);
    } else {
      memset(a->scores + r * KV_BLOCK, 0, KV_BLOCK * sizeof(float));
      a->alpha[r] = 1.0f;
    }
  }
  if (a->out) attend_values(a);
}
