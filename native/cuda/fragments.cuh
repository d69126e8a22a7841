/* Quantized weights as the matrix units take them: from where they lie into the registers of mma_f16, as halves, without
 * shared memory. The instruction takes its rows and the columns of one step in any order, so each lane has what lies
 * together: rows 2 (lane / 4) and the next of a tile stand for the fragment's rows lane / 4 and 8 more, and columns
 * 4 (lane % 4) to 4 (lane % 4) + 3 of 16 for its columns 2 (lane % 4), the next, and both of those 8 on. */
#ifndef PYLLM_CUDA_FRAGMENTS_CUH
#define PYLLM_CUDA_FRAGMENTS_CUH
#include "weights.cuh"

/* One lane's part of a group of 32 columns of a tile, as it lies in memory; .x is of its first row, .y of the second, and
 * what is smaller has both rows in one number. */
template <class Q> struct packed_group {
  static constexpr int FOURS = Q::NIBBLES ? 1 : 2, ABOVE = Q::NIBBLES ? Q::BITS - 4 : 0,
                       SCALES = Q::GROUP == 16 ? 2 : 1;
  uint2 fours[FOURS], above[ABOVE ? ABOVE : 1];
  uint32_t d, m;                           /* halves */
  uint16_t scale[SCALES], minimum[SCALES]; /* bytes */
};

/* tile: its first byte. */
template <class Q>
__device__ inline packed_group<Q> load_group(const unsigned char *tile, int32_t cols, int32_t group) {
  typedef packed_group<Q> packed;
  constexpr int kinds = Q::HAS_MIN ? 2 : 1, n = 256 / Q::GROUP; /* of scales in 256 columns */
  int row = threadIdx.x % WARP / 4 * 2, four = threadIdx.x % 4;
  packed out = {};
  const unsigned char *quants_at = tile + scale_bytes<Q>(cols) + (int64_t)group * Q::GROUP_BYTES + 4 * row;
#pragma unroll
  for (int i = 0; i < packed::FOURS; i++)
    out.fours[i] = __ldg((const uint2 *)(quants_at + (four + 4 * i) * 4 * TILE_ROWS));
#pragma unroll
  for (int i = 0; i < packed::ABOVE; i++) out.above[i] = __ldg((const uint2 *)(quants_at + (4 + i) * 4 * TILE_ROWS));
  const unsigned char *scales =
      tile + (int64_t)(Q::SCALED ? group / 8 : group) * kinds * (2 * TILE_ROWS + (Q::SCALED ? n * TILE_ROWS : 0));
  out.d = __ldg((const uint32_t *)(scales + 2 * row));
  if (Q::HAS_MIN) out.m = __ldg((const uint32_t *)(scales + 2 * TILE_ROWS + 2 * row));
  if (!Q::SCALED) return out;
  scales += 2 * TILE_ROWS * kinds + group % 8 * packed::SCALES * TILE_ROWS + row;
#pragma unroll
  for (int i = 0; i < packed::SCALES; i++) {
    out.scale[i] = __ldg((const uint16_t *)(scales + i * TILE_ROWS));
    if (Q::HAS_MIN) out.minimum[i] = __ldg((const uint16_t *)(scales + (n + i) * TILE_ROWS));
  }
  return out;
}

/* Bytes 2 i and 2 i + 1 of x as halves, plus 1024: under the byte 0x64 they are its last bits. */
__device__ inline uint32_t bytes_to_halves(uint32_t x, int i) {
  return __byte_perm(x, 0x64646464u, i ? 0x4342u : 0x4140u);
}

/* 1024 + x twice, x <= 1024. */
__device__ inline uint32_t two_of(int x) { return (0x6400u + (uint32_t)x) * 0x10001u; }

/* The scales of both rows, and what is added to their weights: products of halves and bytes, rounded to halves. They are
 * multiples of 2^-24 as d is, so the rounding is relative however small they are. */
template <class Q>
__device__ inline void group_scales(const packed_group<Q> &g, int i, uint32_t &scale, uint32_t &min) {
  scale = g.d, min = g.m;
  if (!Q::SCALED) return;
  uint32_t signed_bytes = bytes_to_halves(g.scale[i] ^ 0x8080u, 0);
  scale = multiply_halves(scale, subtract_halves(signed_bytes, two_of(128)));
  if (Q::HAS_MIN) min = multiply_halves(min, subtract_halves(bytes_to_halves(g.minimum[i], 0), two_of(0)));
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

/* Columns [16 half, + 16) of the tile's group as mma_f16's left operand. offset: the format's. */
template <class Q>
__device__ inline void load_fragment(const packed_group<Q> &g, int half, int offset, uint32_t (&a)[4]) {
  uint32_t scale, min;
  group_scales(g, Q::GROUP == 16 ? half : 0, scale, min);
  uint2 q = group_quants(g, half);
#pragma unroll
  for (int row = 0; row < 2; row++) {
    uint32_t s = __byte_perm(scale, 0, row ? 0x3232u : 0x1010u), m = __byte_perm(min, 0, row ? 0x3232u : 0x1010u);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t x = subtract_halves(bytes_to_halves(row ? q.y : q.x, i), two_of(offset)); /* exact */
      a[row + 2 * i] = Q::HAS_MIN ? fma_halves(x, s, m) : multiply_halves(x, s);
    }
  }
}
#endif
