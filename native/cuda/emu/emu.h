/* Enough of CUDA for g++ to compile and run the kernels of this folder on the processor, so that they are tested
 * where there is no GPU. Blocks run one after another, the threads of a block as fibers that switch at barriers and
 * warp operations (fibers.cpp). Memory is the host's, so the address sanitizer sees every access of a kernel.
 *
 * Found as errors of the launch: threads that leave or wait at different lines while others wait at a barrier, warp
 * operations whose mask names a lane that does not take part, a shuffle from such a lane. Shared memory begins as
 * NaN and has exactly the launch's size. Not found: blocks that wait for each other hang. */
#ifndef PYLLM_CUDA_EMU_H
#define PYLLM_CUDA_EMU_H
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

/* ---- the language ---- */

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

/* ---- threads ---- */

namespace emu {
enum { WARP = 32, SLOT_BYTES = 64 };

/* Runs every block; false when a thread did something undefined, which failure() then tells in a sentence. */
bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &thread);
const char *failure();

void *shared();
void wait_block(int line);
/* This thread's copies into shared memory, from NULL zeros: as PTX's cp.async, commit_group and wait_group. */
void copy_later(void *to, const void *from, size_t bytes);
void end_copies();
void wait_for_copies(int pending);
/* Hands in this lane's value and waits for the other lanes of mask. */
void exchange(unsigned mask, const void *value, size_t bytes, int line);
/* What a lane of the same mask handed in. */
const void *received(unsigned lane);
unsigned lane();
[[noreturn]] void fail(const char *what, int line);

template <class T> T value_of(unsigned from) {
  T value;
  memcpy(&value, received(from), sizeof value);
  return value;
}

template <class T> void hand_in(unsigned mask, const T &value, int line) {
  static_assert(sizeof value <= SLOT_BYTES, "a lane hands in at most SLOT_BYTES");
  exchange(mask, &value, sizeof value, line);
}

template <class T> T shuffle(unsigned mask, T value, unsigned from, int line) {
  hand_in(mask, value, line);
  if (from >= WARP || !(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask", line);
  return value_of<T>(from);
}
} // namespace emu

inline void __syncthreads(int line = __builtin_LINE()) { emu::wait_block(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { emu::hand_in(mask, 0, line); }

template <class T> T __shfl_sync(unsigned mask, T value, int from, int line = __builtin_LINE()) {
  return emu::shuffle(mask, value, (unsigned)from, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int line = __builtin_LINE()) {
  return emu::shuffle(mask, value, emu::lane() ^ (unsigned)bits, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  return emu::shuffle(mask, value, emu::lane() < delta ? emu::lane() : emu::lane() - delta, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  unsigned bits = 0;
  emu::hand_in(mask, predicate, line);
  for (unsigned i = 0; i < emu::WARP; i++)
    if (mask >> i & 1 && emu::value_of<int>(i)) bits |= 1u << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}

/* Threads never run at the same time. */
template <class T> T atomicAdd(T *at, T value) {
  T before = *at;
  *at += value;
  return before;
}

/* ---- arithmetic ---- */

template <class T> T __ldg(const T *at) { return *at; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline int __float2int_rn(float x) { return (int)lrintf(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned long long bytes = (unsigned long long)y << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += (int8_t)(a >> i) * (int8_t)(b >> i);
  return sum;
}
template <class T> constexpr T min(T a, T b) { return a < b ? a : b; }

#include "runtime.h"
#endif
