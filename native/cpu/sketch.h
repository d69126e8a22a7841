/* The key sketch of one page of one key/value head: every key value rounded to a code of 2, 3 or 4 bits between the
 * page's minimum and maximum of its channel.
 *
 *   lo, step  f16 (head_dim) each: k = lo + step * code
 *   planes    (4 strips, bundles of channels, planes of a bundle, 64) bytes: byte 4 t + c of a plane holds, of token t,
 *             parts of the codes of channels c of several fours of channels, as sketch_fields says.
 *
 * A part masked out of a plane is, without a shift, a multiple of its code for four channels of 16 tokens: what one
 * 8-bit product takes. */
#ifndef PYLLM_CPU_SKETCH_H
#define PYLLM_CPU_SKETCH_H
#include <stddef.h>
#include <stdint.h>

/* Bits [from, from + bits) of the codes of the bundle's `four`-th four of channels lie in `plane` at bit `at`. */
typedef struct sketch_field {
  int8_t plane, four, at, bits, from;
} sketch_field;

enum { SKETCH_FIELDS = 10, SKETCH_PLANES = 3, SKETCH_FOURS = 8 };

typedef struct sketch_format {
  int8_t fours, planes, n_fields; /* of a bundle */
  sketch_field fields[SKETCH_FIELDS];
} sketch_format;

/* By bits - 2. Three bits of 8 channels fill 3 bytes: two codes in each, and the last two codes in what is left. */
static const sketch_format SKETCH_FORMATS[3] = {
    {4, 1, 4, {{0, 0, 0, 2, 0}, {0, 1, 2, 2, 0}, {0, 2, 4, 2, 0}, {0, 3, 6, 2, 0}}},
    {8,
     3,
     10,
     {{0, 0, 0, 3, 0},
      {0, 1, 3, 3, 0},
      {1, 2, 0, 3, 0},
      {1, 3, 3, 3, 0},
      {2, 4, 0, 3, 0},
      {2, 5, 3, 3, 0},
      {0, 6, 6, 2, 0},
      {1, 7, 6, 2, 0},
      {2, 6, 6, 1, 2},
      {2, 7, 7, 1, 2}}},
    {2, 1, 2, {{0, 0, 0, 4, 0}, {0, 1, 4, 4, 0}}},
};

static inline int32_t sketch_bundles(int32_t bits, int32_t head_dim) {
  int32_t channels = 4 * SKETCH_FORMATS[bits - 2].fours;
  return (head_dim + channels - 1) / channels;
}

static inline int32_t sketch_strip_bytes(int32_t bits, int32_t head_dim) {
  return sketch_bundles(bits, head_dim) * SKETCH_FORMATS[bits - 2].planes * 64;
}

static inline size_t sketch_page_bytes(int32_t bits, int32_t head_dim) {
  return 4 * (size_t)head_dim + 4 * (size_t)sketch_strip_bytes(bits, head_dim);
}

#endif
