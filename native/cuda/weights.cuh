/* Weights as cpu/pack.c lays them out (kernels.h), read by a GPU: tiles of 16 rows, quants interleaved by fours of
 * columns. A warp reads a tile as it lies in memory, and a lane ends up with four rows. One reader serves every format:
 * they differ in four numbers, which are template parameters. */
#ifndef PYLLM_CUDA_WEIGHTS_CUH
#define PYLLM_CUDA_WEIGHTS_CUH
#include "cuda.cuh"

/* kernels.h's tile_format as a type; the offset stays a number. */
template <int BITS_, int GROUP_, bool SCALED_, bool HAS_MIN_> struct quants {
  static constexpr int BITS = BITS_, GROUP = GROUP_;
  static constexpr bool SCALED = SCALED_, HAS_MIN = HAS_MIN_;
  static constexpr int GROUP_BYTES = ACT_GROUP * TILE_ROWS * BITS / 8; /* of 32 columns of a tile */
  static constexpr bool NIBBLES = BITS < 8;                            /* two fours of columns share bytes */
  static constexpr int HIGH_WORDS = NIBBLES ? BITS - 4 : 0; /* of a row's 32 columns: what is above their nibbles */
  static constexpr int FOURS_PER_HIGH = HIGH_WORDS ? 8 / HIGH_WORDS : 8;
  /* Scales: halves, then where SCALED bytes, of N groups in 256 columns; of 32 columns' HALVES; behind them the
   * minimums'. */
  static constexpr int KINDS = HAS_MIN ? 2 : 1, N = 256 / GROUP, HALVES = ACT_GROUP / GROUP;
  static constexpr int D_BYTES = 2 * TILE_ROWS * KINDS;
  static constexpr int BLOCK_BYTES = D_BYTES + (SCALED ? N * TILE_ROWS * KINDS : 0); /* of 256 columns, or of 32 */
};

/* Calls f(quants<...>()) with the format's type; false where no such format exists. */
template <class F> __device__ inline bool with_format(const tile_format &f, F call) {
  if (f.bits == 4 && f.group == 32 && !f.scaled && !f.has_min) call(quants<4, 32, false, false>());      /* Q4_0 */
  else if (f.bits == 4 && f.group == 32 && !f.scaled) call(quants<4, 32, false, true>());                /* Q4_1 */
  else if (f.bits == 5 && f.group == 32 && !f.scaled && !f.has_min) call(quants<5, 32, false, false>()); /* Q5_0 */
  else if (f.bits == 5 && f.group == 32 && !f.scaled) call(quants<5, 32, false, true>());                /* Q5_1 */
  else if (f.bits == 8 && f.group == 32 && !f.scaled) call(quants<8, 32, false, false>()); /* Q8_0, IQ4_NL */
  else if (f.bits == 4 && f.group == 16 && f.has_min) call(quants<4, 16, true, true>());   /* Q2_K */
  else if (f.bits == 4 && f.group == 16) call(quants<4, 16, true, false>());               /* Q3_K */
  else if (f.bits == 4 && f.has_min) call(quants<4, 32, true, true>());                    /* Q4_K */
  else if (f.bits == 5) call(quants<5, 32, true, true>());                                 /* Q5_K */
  else if (f.bits == 6) call(quants<6, 16, true, false>());                                /* Q6_K */
  else if (f.bits == 8 && f.group == 32) call(quants<8, 32, true, false>());               /* IQ4_XS */
  else return false;
  return true;
}

/* What the bytes of the i-th four of a row's 32 columns, i < 8, have above 4 bits, in place; word: the high one it
 * is in. */
template <class Q> __device__ inline uint32_t above_nibble(uint32_t word, int i) {
  int at = i % Q::FOURS_PER_HIGH * Q::HIGH_WORDS;
  return (at > 4 ? word >> (at - 4) : word << (4 - at)) & (Q::HIGH_WORDS == 1 ? 0x10101010u : 0x30303030u);
}

/* As tile_scale_bytes in cpu/isa.c. */
template <class Q> __device__ inline int64_t scale_bytes(int32_t cols) {
  int64_t bytes = (int64_t)(cols / (Q::SCALED ? 256 : ACT_GROUP)) * Q::BLOCK_BYTES;
  return (bytes + 63) / 64 * 64;
}

/* x = scale (q - offset) + min, of four rows. */
struct row_scales {
  float scale[4], min[4];
};

/* The scales of four neighbouring rows of a group of 32 columns as they lie in memory: halves, then bytes. */
template <class Q> struct packed_scales {
  uint2 d, m;
  uint32_t scale[Q::HALVES], minimum[Q::HALVES];

  /* scales: where the tile begins; row: a multiple of 4. */
  __device__ static packed_scales load(const unsigned char *scales, int32_t group, int row) {
    packed_scales out = {};
    const unsigned char *block = scales + (Q::SCALED ? group / 8 : group) * Q::BLOCK_BYTES;
    out.d = __ldg((const uint2 *)(block + 2 * row));
    if (Q::HAS_MIN) out.m = __ldg((const uint2 *)(block + 2 * (TILE_ROWS + row)));
    if (!Q::SCALED) return out;
    const unsigned char *bytes = block + Q::D_BYTES + group % 8 * Q::HALVES * TILE_ROWS + row;
    for (int h = 0; h < Q::HALVES; h++) {
      out.scale[h] = __ldg((const uint32_t *)(bytes + h * TILE_ROWS));
      if (Q::HAS_MIN) out.minimum[h] = __ldg((const uint32_t *)(bytes + (Q::N + h) * TILE_ROWS));
    }
    return out;
  }

  __device__ row_scales of(int half) const {
    row_scales out = {};
    for (int r = 0; r < 4; r++) {
      out.scale[r] = half_to_float((uint16_t)((r < 2 ? d.x : d.y) >> 16 * (r % 2)));
      if (Q::SCALED) out.scale[r] *= (float)(int8_t)(scale[half] >> 8 * r);
      if (Q::HAS_MIN) out.min[r] = half_to_float((uint16_t)((r < 2 ? m.x : m.y) >> 16 * (r % 2)));
      if (Q::HAS_MIN && Q::SCALED) out.min[r] *= (float)(minimum[half] >> 8 * r & 255);
    }
    return out;
  }
};

/* The value of a strip (kernels.h) as a float. */
template <enum strip_type TYPE> __device__ inline float strip_value(const unsigned char *strip, int64_t i) {
  if (TYPE == STRIP_F32) return ((const float *)strip)[i];
  uint16_t bits = ((const uint16_t *)strip)[i];
  return TYPE == STRIP_F16 ? half_to_float(bits) : bfloat_to_float(bits);
}
#endif
