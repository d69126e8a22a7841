/* What stands for the strips that a query, alone in its batch, does not read: one value per page. What it is and why:
 * cpu/rest.c. Pages' values are made where their keys are sketched (pages.cu), summed in rest.cu and merged by finish
 * (attend.cu). */
#ifndef PYLLM_CUDA_REST_CUH
#define PYLLM_CUDA_REST_CUH
#include "blocks.cuh"

/* Pages whose values one block sums. */
constexpr int32_t REST_PAGES = 32;
ANYWHERE int32_t rest_parts(int32_t n_pages) { return (n_pages + REST_PAGES - 1) / REST_PAGES; }

/* (head_dim) of a page. */
__device__ inline uint16_t *usual_value(const device_attention &a, const device_layer &layer, int32_t g, int32_t page) {
  return layer.sketch.usual + ((int64_t)g * a.n_blocks + page) * a.head_dim;
}

/* One warp, from a page's KV block. query: (head_dim) the usual one. */
__device__ inline void make_usual_value(const device_attention &a, const uint16_t *block, const float *query,
                                        uint16_t *to) {
  static_assert(PYLLM_PAGE == 2 * WARP, "two tokens a lane");
  int32_t lane = threadIdx.x % WARP, d = a.head_dim;
  float score[2] = {};
  for (int32_t t = 0; t < PYLLM_PAGE; t++) { /* lanes over a key's dimensions, which are neighbours */
    float part = 0;
    for (int32_t i = lane; i < d; i += WARP) part += query[i] * a.scale * half_to_float(block[kv_key_at(d, t, i)]);
    part = warp_sum(part);
    if (lane == t % WARP) score[t / WARP] = part;
  }
  float top = warp_max(fmaxf(score[0], score[1]));
  float weight[2] = {expf(score[0] - top), expf(score[1] - top)}, inverse = 1.0f / warp_sum(weight[0] + weight[1]);
  for (int32_t first = 0; first < d; first += WARP) {
    int32_t i = first + lane;
    float sum = 0;
    for (int32_t t = 0; t < PYLLM_PAGE; t++) {
      float w = __shfl_sync(ALL_LANES, weight[t / WARP], t % WARP);
      if (i < d) sum += w * half_to_float(block[kv_value_at(d, t, i)]);
    }
    if (i < d) to[i] = float_to_half(sum * inverse);
  }
}

/* rest.cu: sums what the scored rows of one query's lists leave out. */
void cuda_rest(queue *to, const device_attention &a, const device_layer &layer);
#endif
