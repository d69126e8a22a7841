/* Attention of a few query rows over up to 4 strips of 16 keys. Part of kernels.c. */
#if defined(__AVX512BF16__)
#include "kernel_attend_bf16.h"
#else
#include "kernel_attend_f32.h"
#endif

/* Turns scores of one row into e^(score - new maximum), continues its softmax state, returns the factor that
 * rescales what was accumulated under the old maximum. Masked keys get weight 0. */
static inline float softmax_step(float *scores, int32_t n_valid, softmax_state *state) {
  if (n_valid < KV_BLOCK)
    for (int32_t j = n_valid; j < KV_BLOCK; j++) scores[j] = -1e30f;
  vf top = vset(state->max);
  for (int j = 0; j < KV_BLOCK; j += VL) top = vmax(top, vload(scores + j));
  float max = vreduce_max(top);
  vf sum = vset(0);
  for (int j = 0; j < KV_BLOCK; j += VL) {
    vf p = vexp(vload(scores + j) - max);
    vstore(scores + j, p);
    sum += p;
  }
  float rescale = max == state->max ? 1.0f : vsum(vexp(vset(state->max - max))) / VL;
  state->sum = state->sum * rescale + vsum(sum);
  state->max = max;
  return rescale;
}

/* With few rows the kernel waits for memory: values are asked for while keys are multiplied, and the keys behind
 * them while values are. */
enum { PREFETCH_ROWS = 8 };

static inline void prefetch_strip(const uint16_t *strip, int32_t head_dim) {
  for (int32_t i = 0; i < STRIP * head_dim; i += 32) __builtin_prefetch(strip + i);
}

static void attend_strips(const attend_args *a) {
  int32_t d = a->head_dim;
  bool few = a->rows <= PREFETCH_ROWS;
  for (int s = 0; few && a->out && s < a->n_strips; s++) prefetch_strip(a->v[s], d);
  attend_scores(a);
  for (int32_t r = 0; r < a->rows; r++) {
    if (a->n_valid[r] > 0) {
      a->alpha[r] = softmax_step(a->scores + r * KV_BLOCK, a->n_valid[r], a->state + r);
    } else {
      memset(a->scores + r * KV_BLOCK, 0, KV_BLOCK * sizeof(float));
      a->alpha[r] = 1.0f;
    }
  }
  if (!a->out) return;
  for (int s = 0; few && s < a->n_strips; s++) prefetch_strip(a->k[s] + 2 * KV_BLOCK * d, d);
  attend_values(a);
}
