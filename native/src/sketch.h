/* The key sketch of one page of one key/value head: every key value rounded to 2, 3 or 4 bits between the page's
 * minimum and maximum of its channel.
 *
 *   lo, step  f16 (head_dim) each: k = lo + step * code
 *   low       2 bits per value, (4 strips, head_dim / 16, 64) bytes: byte [m][4 t + c] holds channels 16 m + 4 i + c of
 *             token t at bits 2 i, i < 4
 *   high      for 3 bits, 1 bit per value, (4 strips, ceil(head_dim / 32), 64) bytes: channel 32 m + 4 i + c at bit i, i < 8;
 *             for 4 bits, as low
 *
 * Four channels of 16 tokens are then 64 neighbouring bytes, as 8-bit products want them on a CPU and on a GPU. */
#ifndef PYLLM_SRC_SKETCH_H
#define PYLLM_SRC_SKETCH_H
#include "geometry.h"

ANYWHERE int32_t sketch_low_bytes(int32_t head_dim) { return head_dim * 16; } /* of a page */

ANYWHERE int32_t sketch_high_bytes(int32_t bits, int32_t head_dim) {
  return bits == 3 ? 4 * 64 * ((head_dim + 31) / 32) : bits == 4 ? sketch_low_bytes(head_dim) : 0;
}

ANYWHERE size_t sketch_page_bytes(int32_t bits, int32_t head_dim) {
  return (size_t)(4 * head_dim + sketch_low_bytes(head_dim) + sketch_high_bytes(bits, head_dim));
}

#endif
