/* The key sketch of one page of one key/value head: key values rounded to 2, 3 or 4 bits between the page's minimum and
 * maximum of their channel.
 *
 * With page_bits 2, 3 or 4 all channels have as many. A graded sketch takes them in the order of the policy's `channels`:
 * the first quarter has 4 bits, the second 2, and the rest none but their mean, for a few channels make most of what
 * tells one score from another. A grade is a run of channels with equally many bits.
 *
 *   lo    f16 (head_dim): of channels with bits k = lo + step * code; of those without, their mean
 *   step  f16 (channels with bits)
 *   then of each grade of n channels:
 *   low   2 bits per value, (4 strips, n / 16, 64) bytes: byte [m][4 t + c] holds channels 16 m + 4 i + c of token t at
 *         bits 2 i, i < 4; for 4 bits, (4 strips, n / 8, 64) bytes: channels 8 m + 4 i + c at bits 4 i, i < 2
 *   high  for 3 bits, 1 bit per value, (4 strips, ceil(n / 32), 64) bytes: channel 32 m + 4 i + c at bit i, i < 8
 *
 * Four channels of 16 tokens are then 64 neighbouring bytes, as 8-bit products want them on a CPU and on a GPU. */
#ifndef PYLLM_SRC_SKETCH_H
#define PYLLM_SRC_SKETCH_H
#include "geometry.h"

enum { SKETCH_GRADES = 2 };

typedef struct sketch_grade {
  int32_t bits, first, n; /* channels [first, first + n) of the sketch's order; n is a multiple of 16, or 0 */
  size_t low, high;       /* where its planes begin in the page */
} sketch_grade;

/* Of n channels. */
ANYWHERE size_t sketch_low_bytes(int32_t bits, int32_t n) { return (size_t)n * (bits == 4 ? 32 : 16); }
ANYWHERE size_t sketch_high_bytes(int32_t bits, int32_t n) {
  return bits == 3 ? (size_t)(STRIPS_PER_PAGE * 64 * ((n + 31) / 32)) : 0;
}

/* Channels of grade i: a quarter of them in whole units of 16, where there are that many left. */
ANYWHERE int32_t sketch_grade_channels(int32_t page_bits, int32_t head_dim, int32_t i) {
  if (page_bits != PYLLM_GRADED) return i == 0 ? head_dim : 0;
  int32_t quarter = (head_dim + 63) / 64 * 16, left = head_dim - i * quarter;
  return left < 0 ? 0 : left < quarter ? left : quarter;
}

/* Channels with bits. */
ANYWHERE int32_t sketch_channels(int32_t page_bits, int32_t head_dim) {
  return sketch_grade_channels(page_bits, head_dim, 0) + sketch_grade_channels(page_bits, head_dim, 1);
}

/* Grade i < SKETCH_GRADES of a page_bits that is not 0. */
ANYWHERE sketch_grade sketch_grade_at(int32_t page_bits, int32_t head_dim, int32_t i) {
  int32_t first_bits = page_bits == PYLLM_GRADED ? 4 : page_bits,
          before = sketch_grade_channels(page_bits, head_dim, 0);
  size_t planes = 2 * (size_t)(head_dim + sketch_channels(page_bits, head_dim));
  sketch_grade first = {first_bits, 0, before, planes, planes + sketch_low_bytes(first_bits, before)};
  planes = first.high + sketch_high_bytes(first_bits, before);
  int32_t n = sketch_grade_channels(page_bits, head_dim, 1);
  sketch_grade second = {2, before, n, planes, planes + sketch_low_bytes(2, n)};
  return i == 0 ? first : second;
}

ANYWHERE size_t sketch_page_bytes(int32_t page_bits, int32_t head_dim) {
  return sketch_grade_at(page_bits, head_dim, 1).high;
}

#endif
