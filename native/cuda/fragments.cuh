/* Quantized weights as the matrix units take them: from where they lie into the registers of mma_f16, as halves,
 * without shared memory. The instruction takes its rows and the columns of one step in any order, so each lane has
 * what lies together: rows 2 (lane / 4) and the next of a tile stand for the fragment's rows lane / 4 and 8 more,
 * and columns 4 (lane % 4) to 4 (lane % 4) + 3 of 16 for its columns 2 (lane % 4), the next, and both of those 8 on. */
#ifndef PYLLM_CUDA_FRAGMENTS_CUH
#define PYLLM_CUDA_FRAGMENTS_CUH
#include "weights.cuh"

/* One lane's part of a group of 32 columns of a tile, as it lies in memory; .x is of its first row, .y of the
 * second, and what is smaller has both rows in one number. */
template <class Q> struct packed_group {
  static constexpr int FOURS = Q::NIBBLES ? 1 : 2, ABOVE = Q::HIGH_WORDS;
  uint2 fours[FOURS], above[ABOVE ? ABOVE : 1];
  uint32_t d, m;                                 /* halves */
  uint32_t scale[Q::HALVES], minimum[Q::HALVES]; /* bytes */
};

/* Where a lane reads a tile, in bytes from an address that the block shares: 32 bits, for addresses are a good part
 * of all that the block computes beside products. */
template <class Q> struct packed_tile {
  uint32_t scales, quants;

  /* tile: its first byte. */
  __device__ static packed_tile at(uint32_t tile, int32_t cols) {
    int row = threadIdx.x % WARP / 4 * 2;
    return {tile + row, tile + (uint32_t)scale_bytes<Q>(cols) + 4 * row};
  }

  __device__ packed_group<Q> load(const unsigned char *tiles, uint32_t group) const {
    packed_group<Q> out = {};
    uint32_t row = threadIdx.x % WARP / 4 * 2, four = threadIdx.x % 4 * 4 * TILE_ROWS;
    const unsigned char *from = tiles + (quants + group * Q::GROUP_BYTES);
    for (int i = 0; i < packed_group<Q>::ABOVE; i++)
      out.above[i] = __ldg((const uint2 *)(from + (4 + i) * 4 * TILE_ROWS));
    from = tiles + (quants + four + group * Q::GROUP_BYTES);
    for (int i = 0; i < packed_group<Q>::FOURS; i++) out.fours[i] = __ldg((const uint2 *)(from + i * 16 * TILE_ROWS));
    uint32_t block = (Q::SCALED ? group / 8 : group) * Q::BLOCK_BYTES;
    from = tiles + (scales + row + block);
    out.d = __ldg((const uint32_t *)from);
    if (Q::HAS_MIN) out.m = __ldg((const uint32_t *)(from + 2 * TILE_ROWS));
    if (!Q::SCALED) return out;
    from = tiles + (scales + (block + Q::D_BYTES + group % 8 * Q::HALVES * TILE_ROWS));
    for (int i = 0; i < Q::HALVES; i++) {
      out.scale[i] = __ldg((const uint16_t *)(from + i * TILE_ROWS));
      if (Q::HAS_MIN) out.minimum[i] = __ldg((const uint16_t *)(from + (Q::N + i) * TILE_ROWS));
    }
    return out;
  }
};

/* 1024 + x twice, x <= 255. Its higher bytes are 0x64, under which another byte is 1024 and that byte. */
__device__ inline uint32_t two_of(int x) { return (0x6400u + (uint32_t)x) * 0x10001u; }

/* Bytes 2 i and 2 i + 1 of x as halves, less an offset, exact. offsets: two_of it. */
__device__ inline uint32_t halves_of_bytes(uint32_t x, int i, uint32_t offsets) {
  return subtract_halves(__byte_perm(x, offsets, i ? 0x7372u : 0x7170u), offsets);
}

/* The scales of both rows, and what is added to their weights: products of halves and bytes, rounded to halves. They
 * are multiples of 2^-24 as d is, so the rounding is relative however small they are. */
template <class Q>
__device__ inline void group_scales(const packed_group<Q> &g, int i, uint32_t &scale, uint32_t &min) {
  scale = g.d, min = g.m;
  if (!Q::SCALED) return;
  scale = multiply_halves(scale, halves_of_bytes(g.scale[i] ^ 0x8080u, 0, two_of(128)));
  if (Q::HAS_MIN) min = multiply_halves(min, halves_of_bytes(g.minimum[i], 0, two_of(0)));
}

/* One lane's quants of the group's columns [16 half, + 16): four bytes of its first row in .x, of the second in .y. */
template <class Q> __device__ inline uint2 group_quants(const packed_group<Q> &g, int half) {
  if constexpr (!Q::NIBBLES) return g.fours[half];
  int four = threadIdx.x % 4;
  uint2 q = g.fours[0];
  q.x = q.x >> 4 * half & 0x0f0f0f0fu;
  q.y = q.y >> 4 * half & 0x0f0f0f0fu;
  if constexpr (Q::BITS == 5) { /* bit `four` of each byte, or the one 4 above it */
    q.x |= (half ? g.above[0].x >> four : g.above[0].x << (4 - four)) & 0x10101010u;
    q.y |= (half ? g.above[0].y >> four : g.above[0].y << (4 - four)) & 0x10101010u;
  }
  if constexpr (Q::BITS == 6) {
    q.x |= (g.above[half].x >> 2 * four & 0x03030303u) << 4;
    q.y |= (g.above[half].y >> 2 * four & 0x03030303u) << 4;
  }
  return q;
}

/* Columns [16 half, + 16) of the tile's group as mma_f16's left operand. offsets: two_of the format's. */
template <class Q>
__device__ inline void load_fragment(const packed_group<Q> &g, int half, uint32_t offsets, uint32_t (&a)[4]) {
  uint32_t scale, min;
  group_scales(g, Q::GROUP == 16 ? half : 0, scale, min);
  uint2 q = group_quants(g, half);
#pragma unroll
  for (int row = 0; row < 2; row++) {
    uint32_t s = __byte_perm(scale, 0, row ? 0x3232u : 0x1010u), m = __byte_perm(min, 0, row ? 0x3232u : 0x1010u);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t x = halves_of_bytes(row ? q.y : q.x, i, offsets);
      a[row + 2 * i] = Q::HAS_MIN ? fma_halves(x, s, m) : multiply_halves(x, s);
    }
  }
}
#endif
