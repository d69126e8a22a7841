/* Queries and keys of a batch: norms, RoPE, and keys and values into the cache. */
#include "attention.cuh"

namespace {
enum { THREADS = 128 };

struct rope_shared {
  float partial[WARP];
};

/* One head, in place, by the whole block: RMS norm with weight w, or none. */
__device__ void norm_head(float *x, const float *w, float eps, int32_t d, float *partial) {
  if (!w) return;
  float squares = 0;
  for (int32_t i = threadIdx.x; i < d; i += THREADS) squares += x[i] * x[i];
  float scale = 1.0f / sqrtf(block_sum(squares, partial) / (float)d + eps);
  for (int32_t i = threadIdx.x; i < d; i += THREADS) x[i] = x[i] * scale * w[i];
  __syncthreads();
}

/* Rotates pairs (2 i, 2 i + 1), or (i, i + n_rot / 2). cosine, sine: (n_rot / 2). */
__device__ void rotate_head(float *x, const float *cosine, const float *sine, int32_t n_rot, bool pairs) {
  for (int32_t i = threadIdx.x; i < n_rot / 2; i += THREADS) {
    float *a = x + (pairs ? 2 * i : i), *b = pairs ? a + 1 : a + n_rot / 2, first = *a, second = *b;
    *a = first * cosine[i] - second * sine[i];
    *b = first * sine[i] + second * cosine[i];
  }
  __syncthreads();
}

/* Grid (tokens, query heads and behind them key/value heads): reads and writes 4 head_dim bytes each; a key/value head
 * writes 4 head_dim bytes to the cache. */
__global__ void rope_kernel(device_attention a, rope_job job, uint16_t *kv) {
  float *partial = block_shared<rope_shared>().partial;
  int64_t token = blockIdx.x;
  int32_t d = a.head_dim, head = blockIdx.y, g = head - a.n_heads;
  float *x = g < 0 ? job.q + (token * a.n_heads + head) * d : job.k + (token * a.n_kv_heads + g) * d;
  int64_t angle = token * (job.n_rot / 2);
  norm_head(x, g < 0 ? job.q_norm : job.k_norm, job.norm_eps, d, partial);
  rotate_head(x, job.cosine + angle, job.sine + angle, job.n_rot, job.kind == ROPE_PAIRS);
  if (g < 0) return;
  int32_t position = a.now->position + (int32_t)token, block = kv_block_of(a.n_sink, position);
  uint16_t *to = kv + ((int64_t)g * a.n_blocks + block) * kv_block_halves(d);
  const float *value = job.v + (token * a.n_kv_heads + g) * d;
  for (int32_t i = threadIdx.x; i < d; i += THREADS)
    store_key_value(to, d, position - kv_block_start(a.n_sink, block), i, x[i], value[i]);
}

/* Grid (positions, n_kv_heads). */
__global__ void clear_kernel(device_attention a, uint16_t *kv, int32_t from) {
  int32_t position = from + blockIdx.x, block = kv_block_of(a.n_sink, position), d = a.head_dim;
  uint16_t *to = kv + ((int64_t)blockIdx.y * a.n_blocks + block) * kv_block_halves(d);
  for (int32_t i = threadIdx.x; i < d; i += THREADS)
    store_key_value(to, d, position - kv_block_start(a.n_sink, block), i, 0, 0);
}

/* One block: what counts pages that are no longer whole counts them no more. */
__global__ void forget_kernel(device_attention a, device_layer layer, int32_t whole_pages) {
  int32_t moments = a.n_kv_heads * (a.head_dim / MOMENT_ROWS), sketches = a.n_kv_heads * sketch_parts(a.head_dim);
  for (int32_t i = threadIdx.x; i < moments; i += THREADS)
    if (layer.folded[i] > whole_pages) layer.folded[i] = 0;
  for (int32_t i = threadIdx.x; layer.sketch.folded && i < sketches; i += THREADS)
    if (layer.sketch.folded[i] > whole_pages) layer.sketch.folded[i] = whole_pages;
}
} // namespace

void cuda_rope_store(queue *to, const device_attention &a, const device_layer &layer, const rope_job &job, int32_t n) {
  launch(to, rope_kernel, dim3((unsigned)n, (unsigned)(a.n_heads + a.n_kv_heads)), dim3(THREADS), sizeof(rope_shared),
         a, job, layer.kv);
}

void cuda_cut(queue *to, const device_attention &a, const device_layer &layer, int32_t from, int32_t end) {
  if (from >= end) return;
  int32_t whole_pages = from > a.n_sink ? (from - a.n_sink) / PYLLM_PAGE : 0;
  launch(to, clear_kernel, dim3((unsigned)(end - from), (unsigned)a.n_kv_heads), dim3(THREADS), 0, a, layer.kv, from);
  launch(to, forget_kernel, dim3(1), dim3(THREADS), 0, a, layer, whole_pages);
}
