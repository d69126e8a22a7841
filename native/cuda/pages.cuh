/* What the page tier's files share: pages.cu, and pages_decode.cu for its last step in decode. */
#ifndef PYLLM_CUDA_PAGES_CUH
#define PYLLM_CUDA_PAGES_CUH
#include "attention.cuh"

/* (max_strips) of the r-th row scored for the list that begins with this head. */
__device__ inline float *strip_mass_at(const device_attention &a, int32_t head, int32_t r) {
  return a.strip_mass + ((int64_t)head * SCORED_MOST + r) * a.max_strips;
}

/* A strip's share of all attention, by its mass and its row's top and inverse; and the mass of a share. */
__device__ inline float share_of(float mass, float top, float inverse) { return expf(mass - top) * inverse; }
__device__ inline float mass_of_share(float share, float top, float inverse) { return top + logf(share / inverse); }

/* The strips that the scored rows of each list want, in order, and the statistics; where picks_at_once. */
void cuda_pick_strips(queue *to, const device_attention &a, const device_layer &layer, const device_policy &policy);
#endif
