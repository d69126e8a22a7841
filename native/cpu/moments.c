/* Running mean and covariance of the bulk keys, folded page by page as pages leave the window. */
#include "cpu.h"
#include <string.h>

/* Keys of a block as (64, head_dim) floats. */
static void load_keys(const uint16_t *block, int32_t d, float *keys) {
  for (int32_t t = 0; t < KV_BLOCK; t++)
    for (int32_t i = 0; i < d; i++) keys[t * d + i] = f16_to_f32(block[block_key_index(d, t, i)]);
}

static void center(float *keys, int32_t d, float *mean) {
  memset(mean, 0, (size_t)d * sizeof *mean);
  for (int32_t t = 0; t < KV_BLOCK; t++)
    for (int32_t i = 0; i < d; i++) mean[i] += keys[t * d + i];
  for (int32_t i = 0; i < d; i++) mean[i] /= KV_BLOCK;
  for (int32_t t = 0; t < KV_BLOCK; t++)
    for (int32_t i = 0; i < d; i++) keys[t * d + i] -= mean[i];
}

/* m2 += keys' keys, keys (64, d) centred. */
static void add_outer(const kernels *k, const float *keys, int32_t d, float *m2) {
  float transposed[STRIP * KV_BLOCK], right[KV_BLOCK * STRIP], one[STRIP];
  for (int32_t i = 0; i < STRIP; i++) one[i] = 1.0f;
  for (int32_t column = 0; column < d; column += STRIP) {
    for (int32_t t = 0; t < KV_BLOCK; t++)
      for (int32_t j = 0; j < STRIP; j++) right[(t / 2) * 2 * STRIP + 2 * j + t % 2] = keys[t * d + column + j];
    strips b = {STRIP_F32, 1, KV_BLOCK / 2, {right}, {0}};
    for (int32_t row = 0; row < d; row += STRIP) {
      for (int32_t t = 0; t < KV_BLOCK; t++)
        for (int32_t i = 0; i < STRIP; i++) transposed[i * KV_BLOCK + t] = keys[t * d + row + i];
      k->strip_gemm(STRIP, transposed, KV_BLOCK, &b, one, m2 + row * d + column, d);
    }
  }
}

/* Chan, Golub, LeVeque (1979): merging a page's mean and centred squares into the running ones. */
static void fold_page(const kernels *k, key_moments *m, const uint16_t *block, int32_t d) {
  float keys[KV_BLOCK * LARGEST_HEAD], mean[LARGEST_HEAD];
  load_keys(block, d, keys);
  center(keys, d, mean);
  add_outer(k, keys, d, m->m2);
  float before = (float)m->n_pages, share = 1.0f / (before + 1.0f);
  float between = KV_BLOCK * before * share;
  for (int32_t i = 0; i < d; i++) mean[i] -= m->mean[i];
  for (int32_t i = 0; i < d; i++)
    for (int32_t j = 0; j < d; j++) m->m2[i * d + j] += between * mean[i] * mean[j];
  for (int32_t i = 0; i < d; i++) m->mean[i] += share * mean[i];
  m->n_pages++;
}

void covariance_strips(const float *cov, int32_t d, float scale, float *out) {
  for (int32_t j = 0; j < d; j++)
    for (int32_t i = 0; i < d; i++)
      out[((j / STRIP) * (d / 2) + i / 2) * 2 * STRIP + j % STRIP * 2 + i % 2] = cov[i * d + j] * scale;
}

void moments_fold(const kernels *k, const layer_cache *cache, int32_t kv_head, int32_t d, int32_t n_pages) {
  key_moments *m = &cache->moments[kv_head];
  half_block made;
  if (m->n_pages == n_pages) return;
  if (m->n_pages > n_pages || m->n_pages == 0) {
    memset(m->mean, 0, (size_t)d * sizeof *m->mean);
    memset(m->m2, 0, (size_t)d * (size_t)d * sizeof *m->m2);
    m->n_pages = 0;
  }
  while (m->n_pages < n_pages) fold_page(k, m, cache_halves(k, cache, kv_head, 1 + m->n_pages, d, made), d);
  covariance_strips(m->m2, d, 1.0f / ((float)n_pages * KV_BLOCK), m->strips);
}
