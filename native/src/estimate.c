#include "estimate.h"
#include <math.h>

/* ln(e^(y^2) erfc(y) / 2): for large y by three terms of the asymptotic series (Abramowitz and Stegun 7.1.23). */
static double log_half_erfcx(double y) {
  if (y < 20) return y * y + log(erfc(y) / 2);
  double z = 1 / (y * y);
  return log1p(z * (-0.5 + 0.75 * z)) - log(2 * y * sqrt(M_PI));
}

/* G for a finite number of keys, the Gaussian cut off at its largest draw, edge = sqrt(2 ln N) deviations:
 * s^2/2 + ln Phi(edge - s), rearranged so that no large terms cancel. */
static float truncated(float variance, double log_n) {
  double s = sqrt((double)variance), edge = sqrt(2 * log_n);
  return (float)(s * edge - log_n + log_half_erfcx((s - edge) / M_SQRT2));
}

/* G for a finite number of keys as in the random energy model: beyond the edge the largest draw alone counts. */
static float frozen(float variance, float log_n) {
  float s = sqrtf(variance), edge = sqrtf(2 * log_n);
  return s <= edge ? variance / 2 : s * edge - log_n;
}

/* G(s^2, N): ln of the mean of e^score over N scores of mean 0, were they Gaussian. */
static float gaussian(int32_t form, float variance, float log_n) {
  switch (form) {
  case PYLLM_FROZEN: return frozen(variance, log_n);
  case PYLLM_TRUNCATED: return truncated(variance, (double)log_n);
  default: return variance / 2; /* arXiv 2502.09647: the mean of a log-normal */
  }
}

/* In place of G: what a dense prefill of other text showed for this head. b: (3) of 1, s^2, s. */
static float regression(const float *b, float variance) { return b[0] + b[1] * variance + b[2] * sqrtf(variance); }

float bulk_estimate(const attention_policy *p, size_t layer_head, int32_t n_keys, float mean_score, float variance) {
  float log_n = logf((float)n_keys), location = log_n + mean_score;
  float by_gaussian = location + gaussian(p->gaussian, variance, log_n);
  if (p->estimate == PYLLM_GAUSSIAN) return by_gaussian;
  float by_regression = location + regression(p->coefficients + 3 * layer_head, variance);
  if (p->estimate == PYLLM_REGRESSION) return by_regression;
  return by_gaussian > by_regression || isnan(by_gaussian) ? by_gaussian : by_regression;
}
