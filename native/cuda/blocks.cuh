/* Where a layer's KV blocks are. All of them lie at device_layer.kv. With a split cache that is the host's memory,
 * mapped for the GPU, and the sinks and the newest n_recent blocks are in the GPU's own memory besides: every key
 * and value is written there and copied at once, so what falls out of the GPU's has nothing left to copy, and after
 * a rewind it is filled up again. A prompt's queries read the bulk from a copy of it in the GPU's memory
 * (attention.cu). */
#ifndef PYLLM_CUDA_BLOCKS_CUH
#define PYLLM_CUDA_BLOCKS_CUH
#include "attention.cuh"

/* Where block `block` is in a head's part of device_layer.recent: the sinks first, behind them a ring. */
__device__ inline int32_t recent_slot(const device_attention &a, int32_t block) {
  return block == 0 ? 0 : 1 + (block - 1) % a.n_recent;
}
__device__ inline uint16_t *recent_block(const device_attention &a, const device_layer &layer, int32_t g,
                                         int32_t block) {
  return layer.recent + ((int64_t)g * (1 + a.n_recent) + recent_slot(a, block)) * kv_block_halves(a.head_dim);
}
__device__ inline uint16_t *stored_block(const device_attention &a, const device_layer &layer, int32_t g,
                                         int32_t block) {
  return layer.kv + ((int64_t)g * a.n_blocks + block) * kv_block_halves(a.head_dim);
}

/* One head's blocks for a batch's kernels. */
struct head_blocks {
  const device_attention &a;
  const device_layer &layer;
  int32_t g, oldest_recent; /* block that is in the GPU's own memory beside the sinks */

  __device__ head_blocks(const device_attention &attention, const device_layer &l, int32_t kv_head)
      : a(attention), layer(l), g(kv_head),
        oldest_recent(kv_block_of(a.n_sink, a.now->position + a.now->n - 1) - a.n_recent + 1) {}

  __device__ const uint16_t *at(int32_t block) const {
    bool recent = a.n_recent && (block == 0 || block >= oldest_recent);
    return recent ? recent_block(a, layer, g, block) : stored_block(a, layer, g, block);
  }
};
#endif
