/* What every kernel file includes: CUDA, or its emulation where a C++ compiler builds the same source (emu/emu.h), and
 * the few operations that are written differently for the two. Halves are uint16_t bits everywhere, as in ops.h. */
#ifndef PYLLM_CUDA_COMMON_CUH
#define PYLLM_CUDA_COMMON_CUH
#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emu/emu.h"
#endif
extern "C" {
#include "quant.h"
}
#include <stdint.h>

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = ~0u;

/* ---- launching ---- */

/* Where work of one model goes, in order. The first error stays, and what follows it does nothing. */
struct queue {
  cudaStream_t stream;
  cudaError_t error;
};

inline void check(queue *to, cudaError_t error) {
  if (!to->error) to->error = error;
}

/* kernel<<<grid, block, shared_bytes>>>(args...). Shared memory is one struct of the kernel's, see block_shared. */
template <class... P, class... A>
void launch(queue *to, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  if (to->error) return;
#ifdef __CUDACC__
  if (shared_bytes > 48 << 10)
    check(to, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
  kernel<<<grid, block, shared_bytes, to->stream>>>(P(args)...);
  check(to, cudaGetLastError());
#else
  check(to, emu::launch(to->stream, grid, block, shared_bytes, [=] { kernel(P(args)...); }));
#endif
}

/* The block's shared memory: a struct T of the launch's shared_bytes. Its contents are undefined at first. */
template <class T> __device__ T &block_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic_shared[];
  return *reinterpret_cast<T *>(dynamic_shared);
#else
  return *static_cast<T *>(emu::shared());
#endif
}

/* x, of which the compiler no longer knows where it comes from: what is added to it in a loop is added to a
 * register, and not to every part of a sum that the compiler would rather work out anew. */
template <class T> __device__ inline const T *opaque(const T *x) {
#ifdef __CUDACC__
  asm("" : "+l"(x));
#endif
  return x;
}

/* ---- numbers ---- */

__device__ inline float half_to_float(uint16_t bits) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(bits));
#else
  return f16_to_f32(bits);
#endif
}

/* Rounds to nearest even. */
__device__ inline uint16_t float_to_half(float x) {
#ifdef __CUDACC__
  return __half_as_ushort(__float2half_rn(x));
#else
  return f32_to_f16(x);
#endif
}

__device__ inline float bfloat_to_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

__device__ inline uint32_t pack_halves(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }

/* ---- two halves in a register ---- */

#ifndef __CUDACC__
namespace emu {
template <class F> uint32_t each_half(uint32_t x, uint32_t y, uint32_t z, F f) {
  auto of = [&](int i) {
    return f32_to_f16(
        f(f16_to_f32((uint16_t)(x >> i)), f16_to_f32((uint16_t)(y >> i)), f16_to_f32((uint16_t)(z >> i))));
  };
  return pack_halves(of(0), of(16));
}
} // namespace emu
#endif

__device__ inline uint32_t subtract_halves(uint32_t x, uint32_t y) {
#ifdef __CUDACC__
  uint32_t out;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
  return out;
#else
  return emu::each_half(x, y, 0, [](float a, float b, float) { return a - b; });
#endif
}

__device__ inline uint32_t multiply_halves(uint32_t x, uint32_t y) {
#ifdef __CUDACC__
  uint32_t out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
  return out;
#else
  return emu::each_half(x, y, 0, [](float a, float b, float) { return a * b; });
#endif
}

/* x y + z, rounded once. */
__device__ inline uint32_t fma_halves(uint32_t x, uint32_t y, uint32_t z) {
#ifdef __CUDACC__
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(z));
  return out;
#else
  return emu::each_half(x, y, z, [](float a, float b, float c) { return fmaf(a, b, c); });
#endif
}

/* ---- copies into shared memory that pass by the registers ---- */

/* 16 bytes, or 16 zeros where there is nothing to copy. GPUs without such copies make them at once. */
__device__ inline void copy_later(void *shared, const void *from, bool there) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
#elif !defined(__CUDACC__)
  emu::copy_later(shared, there ? from : nullptr, 16);
#else
  *(uint4 *)shared = there ? __ldg((const uint4 *)from) : make_uint4(0, 0, 0, 0);
#endif
}

/* Ends a batch of this thread's copies, which may be empty. */
__device__ inline void end_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  emu::end_copies();
#endif
}

/* Until at most the last PENDING of this thread's batches are on their way; others see the rest after a barrier. */
template <int PENDING> __device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#elif !defined(__CUDACC__)
  emu::wait_for_copies(PENDING);
#endif
}

/* ---- sums over a warp and over a block ---- */

__device__ inline float warp_sum(float x) {
  for (int bits = WARP / 2; bits; bits /= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int bits = WARP / 2; bits; bits /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, bits));
  return x;
}

/* Of one value per thread, for all threads. blockDim.x: a multiple of 32. partial: (32) shared floats. Contain
 * barriers. */
__device__ inline float block_sum(float x, float *partial) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? partial[lane] : 0.0f);
  __syncthreads(); /* partial may be used again */
  return x;
}

__device__ inline float block_max(float x, float *partial) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  x = warp_max(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  x = warp_max(lane < warps ? partial[lane] : partial[0]);
  __syncthreads();
  return x;
}

/* ---- the matrix units ---- */

/* Fragments of one warp, as PTX lays them out; lane = 4 group + pair. A register holds neighbours, the first one low.
 *   a (16, 16) row-major: a[0] row group, a[1] row group + 8, columns from 2 pair; a[2], a[3] the same 8 columns on.
 *   b (16, 8) by columns: b[0] rows from 2 pair of column group, b[1] 8 rows on.
 *   d (16, 8): d[0], d[1] row group, columns 2 pair and 2 pair + 1; d[2], d[3] row group + 8. */

#ifndef __CUDACC__
namespace emu {
struct fragments {
  float a[4][2], b[2][2];
};
inline void unpack_halves(uint32_t bits, float (&out)[2]) {
  out[0] = half_to_float((uint16_t)bits);
  out[1] = half_to_float((uint16_t)(bits >> 16));
}

/* d += a b; each lane computes its four elements from what all lanes hand in. */
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  fragments mine;
  for (int i = 0; i < 4; i++) unpack_halves(a[i], mine.a[i]);
  for (int i = 0; i < 2; i++) unpack_halves(b[i], mine.b[i]);
  hand_in(~0u, mine, __LINE__);
  unsigned group = lane() / 4, pair = lane() % 4;
  for (unsigned i = 0; i < 4; i++)
    for (unsigned half = 0; half < 2; half++)
      for (unsigned from = 0; from < 4; from++) {
        const auto *left = (const fragments *)received(4 * group + from);
        const auto *right = (const fragments *)received(4 * (2 * pair + i % 2) + from);
        for (int j = 0; j < 2; j++) d[i] += left->a[2 * half + i / 2][j] * right->b[half][j];
      }
}
} // namespace emu
#endif

/* d (16, 8) += a (16, 16) b (16, 8): halves, summed in floats. */
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifndef __CUDACC__
  emu::mma(d, a, b);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int i = 0; i < 2; i++)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}
#endif
