/* What a format does not hold becomes NaN where it arises, which every check after it sees: infinity could turn into
 * a zero on the way. */
#ifndef PYLLM_SRC_OVERFLOW_H
#define PYLLM_SRC_OVERFLOW_H
#include "anywhere.h"
#include <math.h>
#include <stdint.h>

/* The factor that makes the root mean square of n values 1, by the sum of their squares; 1 / infinity would be 0. */
ANYWHERE float rms_scale(float squares, int32_t n, float eps) {
  return 1.0f / sqrtf(squares / (float)n + eps) + squares * 0.0f;
}

/* A key's half: infinity could hide behind a weight of 0 until another token looks at it. */
ANYWHERE uint16_t key_half(uint16_t half) { return (uint16_t)(half | ((half & 0x7fff) == 0x7c00)); }

#endif
