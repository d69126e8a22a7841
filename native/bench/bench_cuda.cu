/* The ceilings of one GPU, as JSON: bytes per second of a copy within its memory, counting those read and those
 * written, of one from the host, and multiply-adds of the matrix instruction that the kernels use (common.cuh) from
 * registers. */
#include "common.cuh"
#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace {
enum { REPEATS = 9, STEPS = 4096, CHAINS = 8, WARPS = 8, BLOCKS_PER_PROCESSOR = 8 };
constexpr size_t BYTES = size_t(1) << 30;

void must(cudaError_t error) {
  if (!error) return;
  fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  exit(1);
}

/* The median of several, in seconds; the first is not counted. */
template <class F> double seconds(F work) {
  double times[REPEATS];
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  for (int i = -1; i < REPEATS; i++) {
    float milliseconds;
    must(cudaEventRecord(begin));
    work();
    must(cudaEventRecord(end));
    must(cudaEventSynchronize(end));
    must(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 0) times[i] = 1e-3 * milliseconds;
  }
  std::sort(times, times + REPEATS);
  return times[REPEATS / 2];
}

/* seeds: (32) halves in pairs, so that no operand is known to the compiler. */
__global__ void __launch_bounds__(WARPS *WARP) multiply_kernel(const uint32_t *seeds, float *out) {
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = seeds[(threadIdx.x + i) % 32];
  for (int i = 0; i < 2; i++) b[i] = seeds[(threadIdx.x + 7 * i) % 32];
  float sum[CHAINS][4] = {};
  for (int step = 0; step < STEPS; step++)
#pragma unroll
    for (int c = 0; c < CHAINS; c++) mma_f16(sum[c], a, b);
  float total = 0;
  for (int c = 0; c < CHAINS; c++) total += sum[c][0] + sum[c][1] + sum[c][2] + sum[c][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

double multiplies_per_second() {
  cudaDeviceProp card;
  must(cudaGetDeviceProperties(&card, 0));
  unsigned blocks = unsigned(card.multiProcessorCount * BLOCKS_PER_PROCESSOR);
  uint32_t seeds[32], *on_gpu;
  float *out;
  for (uint32_t i = 0; i < 32; i++) seeds[i] = 0x3c003800u + 0x00110013u * i; /* about 1 and 0.5 */
  must(cudaMalloc((void **)&on_gpu, sizeof seeds));
  must(cudaMalloc((void **)&out, blocks * WARPS * WARP * sizeof *out));
  must(cudaMemcpy(on_gpu, seeds, sizeof seeds, cudaMemcpyHostToDevice));
  double taken = seconds([=] { multiply_kernel<<<blocks, WARPS * WARP>>>(on_gpu, out); });
  must(cudaGetLastError());
  return double(blocks) * double(WARPS * STEPS * CHAINS) * 16 * 8 * 16 / taken;
}
} // namespace

int main() {
  void *from, *to, *host;
  must(cudaMalloc(&from, BYTES));
  must(cudaMalloc(&to, BYTES));
  must(cudaMallocHost(&host, BYTES));
  must(cudaMemset(from, 0x5a, BYTES));
  double inside = seconds([=] { must(cudaMemcpyAsync(to, from, BYTES, cudaMemcpyDeviceToDevice)); });
  double bus = seconds([=] { must(cudaMemcpyAsync(to, host, BYTES, cudaMemcpyHostToDevice)); });
  printf("{\"copy_gb_s\": %.0f, \"from_host_gb_s\": %.1f, \"f16_tera_multiply_adds_s\": %.1f}\n",
         2e-9 * double(BYTES) / inside, 1e-9 * double(BYTES) / bus, 1e-12 * multiplies_per_second());
  return 0;
}
