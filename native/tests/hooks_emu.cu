/* Kernels with and without mistakes, for tests of the emulator itself (tests/test_emu.py). Only in the emulated
 * library. */
#include "common.cuh"
extern "C" {
#include "error.h"
#include "hooks_emu.h"
}

namespace {
struct numbers {
  float value[64];
};

/* Reverses a block's values through shared memory. */
__global__ void reverse(const float *in, float *out) {
  numbers &s = block_shared<numbers>();
  s.value[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s.value[blockDim.x - 1 - threadIdx.x];
}

__global__ void reverse_without_barrier(const float *in, float *out) {
  numbers &s = block_shared<numbers>();
  s.value[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  out[blockIdx.x * blockDim.x + threadIdx.x] = s.value[blockDim.x - 1 - threadIdx.x];
}

__global__ void sums(const float *in, float *out) {
  numbers &s = block_shared<numbers>();
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = block_sum(in[i], s.value);
}

/* Sums within halves of a warp, which take different paths. */
__global__ void half_warps(const float *in, float *out) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x, half = i / 16 % 2;
  float x = in[i];
  if (half) x += __shfl_xor_sync(0xffff0000u, x, 1);
  else
    for (int bits = 8; bits; bits /= 2) x += __shfl_xor_sync(0x0000ffffu, x, bits);
  out[i] = x + (float)__popc(__ballot_sync(ALL_LANES, half));
}

__global__ void barrier_in_branch(const float *, float *) {
  if (threadIdx.x < 5) __syncthreads();
}

__global__ void two_barriers(const float *, float *) {
  if (threadIdx.x < 5) __syncthreads();
  else __syncthreads();
}

__global__ void shuffle_with_ended_lanes(const float *in, float *out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, in[threadIdx.x], 1);
}

__global__ void shuffle_outside_mask(const float *in, float *out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, in[threadIdx.x], 20);
}

__global__ void shuffle_some_do_not_reach(const float *in, float *out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(ALL_LANES, in[threadIdx.x], 0);
  __syncthreads();
}

typedef void kernel(const float *, float *);
const struct {
  const char *name;
  kernel *run;
} CASES[] = {{"reverse", reverse},
             {"reverse_without_barrier", reverse_without_barrier},
             {"sums", sums},
             {"half_warps", half_warps},
             {"barrier_in_branch", barrier_in_branch},
             {"two_barriers", two_barriers},
             {"shuffle_with_ended_lanes", shuffle_with_ended_lanes},
             {"shuffle_outside_mask", shuffle_outside_mask},
             {"shuffle_some_do_not_reach", shuffle_some_do_not_reach}};

/* One warp: d (16, 8) = a (16, 16) b (16, 8), all row-major. */
__global__ void matrix_f16(const uint16_t *a, const uint16_t *b, float *d) {
  int group = threadIdx.x / 4, pair = threadIdx.x % 4;
  uint32_t left[4], right[2];
  float sum[4] = {};
  for (int i = 0; i < 4; i++) {
    const uint16_t *at = a + (group + i % 2 * 8) * 16 + i / 2 * 8 + 2 * pair;
    left[i] = pack_halves(at[0], at[1]);
  }
  for (int i = 0; i < 2; i++)
    right[i] = pack_halves(b[(8 * i + 2 * pair) * 8 + group], b[(8 * i + 2 * pair + 1) * 8 + group]);
  mma_f16(sum, left, right);
  for (int i = 0; i < 4; i++) d[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = sum[i];
}

int32_t finish(queue *q, pyllm_error *err) {
  check(q, cudaStreamSynchronize(q->stream));
  cudaStreamDestroy(q->stream);
  return q->error ? fail(err, PYLLM_ERR_DEVICE, "%s", cudaGetErrorString(q->error)) : PYLLM_OK;
}

queue open_queue() {
  queue q = {};
  check(&q, cudaSetDevice(0));
  check(&q, cudaStreamCreateWithFlags(&q.stream, cudaStreamNonBlocking));
  return q;
}
} // namespace

int32_t hook_emu(const char *name, int32_t blocks, int32_t threads, const float *in, float *out, pyllm_error *err) {
  for (const auto &c : CASES) {
    if (strcmp(c.name, name)) continue;
    queue q = open_queue();
    launch(&q, c.run, dim3((unsigned)blocks), dim3((unsigned)threads), sizeof(numbers), in, out);
    return finish(&q, err);
  }
  return fail(err, PYLLM_ERR_ARGUMENT, "no kernel %s", name);
}

int32_t hook_emu_matrix(const uint16_t *a, const uint16_t *b, float *d, pyllm_error *err) {
  queue q = open_queue();
  launch(&q, matrix_f16, dim3(1), dim3(WARP), 0, a, b, d);
  return finish(&q, err);
}

void hook_emu_memory(uint64_t bytes) { emu::set_memory(bytes); }

void hook_emu_fail(const char *call, int32_t error, int32_t times) { emu::fail_next(call, error, times); }
