/* How heavy a head's bulk is, judged by mean and variance of its scores, and what follows from that: one small
 * formula per form, on scalars. */
#ifndef PYLLM_SRC_ESTIMATE_H
#define PYLLM_SRC_ESTIMATE_H
#include "anywhere.h"
#include "pyllm.h"
#include <math.h>
#include <stdbool.h>

/* ln(e^(y^2) erfc(y) / 2): for large y by three terms of the asymptotic series (Abramowitz and Stegun 7.1.23). */
ANYWHERE double log_half_erfcx(double y) {
  if (y < 20) return y * y + log(erfc(y) / 2);
  double z = 1 / (y * y);
  return log1p(z * (-0.5 + 0.75 * z)) - log(2 * y * sqrt(M_PI));
}

/* G for a finite number of keys, the Gaussian cut off at its largest draw, edge = sqrt(2 ln N) deviations:
 * s^2/2 + ln Phi(edge - s), rearranged so that no large terms cancel. */
ANYWHERE float truncated_gaussian(float variance, double log_n) {
  double s = sqrt((double)variance), edge = sqrt(2 * log_n);
  return (float)(s * edge - log_n + log_half_erfcx((s - edge) / M_SQRT2));
}

/* G for a finite number of keys as in the random energy model: beyond the edge the largest draw alone counts. */
ANYWHERE float frozen_gaussian(float variance, float log_n) {
  float s = sqrtf(variance), edge = sqrtf(2 * log_n);
  return s <= edge ? variance / 2 : s * edge - log_n;
}

/* G(s^2, N): ln of the mean of e^score over N scores of mean 0, were they Gaussian. */
ANYWHERE float gaussian_excess(int32_t form, float variance, float log_n) {
  switch (form) {
  case PYLLM_FROZEN: return frozen_gaussian(variance, log_n);
  case PYLLM_TRUNCATED: return truncated_gaussian(variance, (double)log_n);
  default: return variance / 2; /* arXiv 2502.09647: the mean of a log-normal */
  }
}

/* In place of G: what a dense prefill of other text showed for this head. b: (3) of 1, s^2, s. */
ANYWHERE float regression_excess(const float *b, float variance) {
  return b[0] + b[1] * variance + b[2] * sqrtf(variance);
}

/* M^ of a bulk of n_keys >= 1. form: enum pyllm_gaussian; kind: enum pyllm_estimate; b: (3) of the head, unless kind is
 * PYLLM_GAUSSIAN. mean_score: c q.mu; variance: s^2 = c^2 q'Sq, >= 0. NaN where either is NaN. */
ANYWHERE float bulk_estimate(int32_t form, int32_t kind, const float *b, int32_t n_keys, float mean_score,
                             float variance) {
  float log_n = logf((float)n_keys), location = log_n + mean_score;
  float by_gaussian = location + gaussian_excess(form, variance, log_n);
  if (kind == PYLLM_GAUSSIAN) return by_gaussian;
  float by_regression = location + regression_excess(b, variance);
  if (kind == PYLLM_REGRESSION) return by_regression;
  return by_gaussian > by_regression || isnan(by_gaussian) ? by_gaussian : by_regression;
}

/* Whether a head with a bulk is long. local_label: of PYLLM_STATIC. NaN in either mass makes it long: the safe side. */
ANYWHERE bool head_is_long(int32_t policy, bool local_label, float threshold, float local_mass, float bulk_mass) {
  switch (policy) {
  case PYLLM_WINDOW: return false;
  case PYLLM_STATIC: return !local_label;
  case PYLLM_ORACLE:
  case PYLLM_ADAPTIVE: return !(1.0f / (1.0f + expf(bulk_mass - local_mass)) >= threshold);
  default: return true;
  }
}

#endif
