/* The KV cache on the GPU: blocks as on the CPU (block 0 the sinks, block 1 + i page i, 64 tokens each, head-major), with
 * another order inside a block:
 *   keys    (64, head_dim)      f16: a token's key is one row
 *   values  (4, head_dim, 16)   f16: strips of 16 tokens, transposed
 * A strip of 16 tokens is contiguous in both: the unit in which parts of the bulk are read. The matrix instruction wants
 * neighbouring dimensions of a key, and neighbouring tokens of a value, side by side: in these orders every lane loads
 * its operands 16 bytes at a time from global memory, with no shared memory between (attend.cu). */
#ifndef PYLLM_CUDA_KV_CUH
#define PYLLM_CUDA_KV_CUH
#include "common.cuh"
extern "C" {
#include "geometry.h"
#include "overflow.h"
}

/* Halves of one block; its values begin half way. */
ANYWHERE int64_t kv_block_halves(int32_t head_dim) { return 2 * PYLLM_PAGE * (int64_t)head_dim; }

/* Dimension i of the key of a block's token `slot`, from where the block begins; and of its value. */
ANYWHERE int64_t kv_key_at(int32_t head_dim, int32_t slot, int32_t i) { return slot * head_dim + i; }
ANYWHERE int64_t kv_value_at(int32_t head_dim, int32_t slot, int32_t i) {
  return PYLLM_PAGE * head_dim + (slot / PYLLM_READ_PAGE * head_dim + i) * PYLLM_READ_PAGE + slot % PYLLM_READ_PAGE;
}

/* Rounds and stores one dimension of a token into its block. */
__device__ inline void store_key_value(uint16_t *block, int32_t head_dim, int32_t slot, int32_t i, float key,
                                       float value) {
  block[kv_key_at(head_dim, slot, i)] = key_half(float_to_half(key));
  block[kv_value_at(head_dim, slot, i)] = float_to_half(value);
}
#endif
