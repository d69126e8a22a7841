/* Queries and keys of a batch: norms, RoPE, and keys and values into the cache. */
#include "blocks.cuh"
#include "overflow.h"

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
  float scale = rms_scale(block_sum(squares, partial), d, eps);
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

/* Where a token's key and value are: its block, and which of the block's tokens it is. */
struct token_place {
  int32_t block, slot;
};
__device__ token_place place_of(const device_attention &a, int32_t position) {
  int32_t block = kv_block_of(a.n_sink, position);
  return {block, position - kv_block_start(a.n_sink, block)};
}

/* Key and value (d) of one token, NULL for zeros, into its block. */
__device__ void store_token(uint16_t *block, int32_t d, int32_t slot, const float *key, const float *value) {
  for (int32_t i = threadIdx.x; i < d; i += THREADS)
    store_key_value(block, d, slot, i, key ? key[i] : 0, value ? value[i] : 0);
}

/* Grid (tokens, n_kv_heads): where a block begins with a token, its slot in the ring still holds an older one. */
__global__ void open_kernel(device_attention a, device_layer layer) {
  int32_t position = a.now->position + (int32_t)blockIdx.x, block = kv_block_of(a.n_sink, position);
  if (position != kv_block_start(a.n_sink, block)) return;
  uint16_t *to = recent_block(a, layer, blockIdx.y, block);
  for (int64_t i = threadIdx.x; i < kv_block_halves(a.head_dim); i += THREADS) to[i] = 0;
}

/* Grid (1 + n_recent, n_kv_heads): the sinks and the newest blocks up to `newest` into the GPU's memory. */
__global__ void fill_kernel(device_attention a, device_layer layer, int32_t newest) {
  int32_t block = blockIdx.x == 0 ? 0 : newest - (int32_t)blockIdx.x + 1, g = blockIdx.y;
  if (block < 0 || (block == 0 && blockIdx.x != 0)) return;
  const uint4 *from = (const uint4 *)stored_block(a, layer, g, block);
  uint4 *to = (uint4 *)recent_block(a, layer, g, block);
  for (int64_t i = threadIdx.x; i < kv_block_halves(a.head_dim) / 8; i += THREADS) to[i] = from[i];
}

/* Grid (tokens, query heads and behind them key/value heads): reads and writes 4 head_dim bytes each; a key/value head
 * writes 4 head_dim bytes to the cache. */
__global__ void rope_kernel(device_attention a, rope_job job, device_layer layer) {
  float *partial = block_shared<rope_shared>().partial;
  int64_t token = blockIdx.x;
  int32_t d = a.head_dim, head = blockIdx.y, g = head - a.n_heads;
  float *x = g < 0 ? job.q + (token * a.n_heads + head) * d : job.k + (token * a.n_kv_heads + g) * d;
  int64_t angle = token * (job.n_rot / 2);
  norm_head(x, g < 0 ? job.q_norm : job.k_norm, job.norm_eps, d, partial);
  rotate_head(x, job.cosine + angle, job.sine + angle, job.n_rot, job.kind == ROPE_PAIRS);
  if (g < 0) return;
  token_place at = place_of(a, a.now->position + (int32_t)token);
  uint16_t *block = a.n_recent ? recent_block(a, layer, g, at.block) : stored_block(a, layer, g, at.block);
  store_token(block, d, at.slot, x, job.v + (token * a.n_kv_heads + g) * d);
}

/* Grid (tokens, n_kv_heads), where the cache is split: a batch's strips, when all their tokens are in the GPU's
 * memory, to the host's, over the bus in 16 bytes a thread; a strip's last token in the batch copies it, 64 head_dim
 * bytes. */
__global__ void copy_kernel(device_attention a, device_layer layer) {
  int32_t token = (int32_t)blockIdx.x, g = blockIdx.y, d = a.head_dim;
  token_place at = place_of(a, a.now->position + token), next = place_of(a, a.now->position + token + 1);
  int32_t strip = at.slot / PYLLM_READ_PAGE;
  if (token + 1 < a.now->n && next.block == at.block && next.slot / PYLLM_READ_PAGE == strip) return;
  for (int32_t part = 0; part < 2; part++) { /* keys, values */
    int64_t first = part * PYLLM_PAGE * d + strip * PYLLM_READ_PAGE * d;
    const uint4 *from = (const uint4 *)(recent_block(a, layer, g, at.block) + first);
    uint4 *to = (uint4 *)(stored_block(a, layer, g, at.block) + first);
    for (int32_t i = threadIdx.x; i < PYLLM_READ_PAGE * d / 8; i += THREADS) to[i] = from[i];
  }
}

/* Grid (positions, n_kv_heads). */
__global__ void clear_kernel(device_attention a, device_layer layer, int32_t from) {
  token_place at = place_of(a, from + (int32_t)blockIdx.x);
  store_token(stored_block(a, layer, blockIdx.y, at.block), a.head_dim, at.slot, NULL, NULL);
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
  if (a.n_recent) launch(to, open_kernel, dim3((unsigned)n, (unsigned)a.n_kv_heads), dim3(THREADS), 0, a, layer);
  launch(to, rope_kernel, dim3((unsigned)n, (unsigned)(a.n_heads + a.n_kv_heads)), dim3(THREADS), sizeof(rope_shared),
         a, job, layer);
  if (a.n_recent) launch(to, copy_kernel, dim3((unsigned)n, (unsigned)a.n_kv_heads), dim3(THREADS), 0, a, layer);
}

void cuda_cut(queue *to, const device_attention &a, const device_layer &layer, int32_t from, int32_t end) {
  if (from >= end) return;
  int32_t whole_pages = from > a.n_sink ? (from - a.n_sink) / PYLLM_PAGE : 0;
  launch(to, clear_kernel, dim3((unsigned)(end - from), (unsigned)a.n_kv_heads), dim3(THREADS), 0, a, layer, from);
  launch(to, forget_kernel, dim3(1), dim3(THREADS), 0, a, layer, whole_pages);
  cuda_fill_recent(to, a, layer, from);
}

void cuda_fill_recent(queue *to, const device_attention &a, const device_layer &layer, int32_t n_tokens) {
  if (!a.n_recent || n_tokens == 0) return;
  launch(to, fill_kernel, dim3((unsigned)(1 + a.n_recent), (unsigned)a.n_kv_heads), dim3(THREADS), 0, a, layer,
         kv_block_of(a.n_sink, n_tokens - 1));
}
