/* How heavy a head's bulk is, judged by mean and variance of its scores: one small formula per form, on scalars. */
#ifndef PYLLM_SRC_ESTIMATE_H
#define PYLLM_SRC_ESTIMATE_H
#include "policy.h"

/* M^ of a bulk of n_keys >= 1. layer_head: layer * n_heads + head. mean_score: c q.mu; variance: s^2 = c^2 q'Sq, >= 0.
 * NaN where either is NaN. */
float bulk_estimate(const attention_policy *p, size_t layer_head, int32_t n_keys, float mean_score, float variance);

#endif
