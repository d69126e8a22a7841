/* One layer's KV cache on the CPU, its moments and sketches: memory, and forgetting. */
#include "cpu.h"
#include "sketch.h"
#include <stdlib.h>
#include <string.h>

bool cpu_cache_new(layer_cache *l, const attention_shape *s, int32_t kv_type) {
  size_t g = (size_t)s->n_kv_heads, d = (size_t)s->head_dim;
  l->n_blocks = kv_blocks(s->n_ctx, s->n_sink);
  l->kv_type = kv_type;
  l->kv = calloc(g * (size_t)l->n_blocks, kv_block_bytes(kv_type, s->head_dim)); /* untouched blocks take no memory */
  l->moments = calloc(g, sizeof *l->moments);
  l->sketches = calloc(g, sizeof *l->sketches);
  if (!l->kv || !l->moments || !l->sketches) return false;
  for (size_t i = 0; i < g; i++) {
    float *memory = calloc(moment_floats(d), sizeof *memory);
    if (!memory) return false;
    l->moments[i] = (key_moments){0, memory, memory + d, memory + d + d * d};
  }
  return true;
}

void cpu_cache_free(layer_cache *l, const attention_shape *s) {
  for (int32_t g = 0; l->moments && g < s->n_kv_heads; g++) free(l->moments[g].mean);
  free(l->moments);
  free(l->sketches);
  free(l->kv);
}

void cpu_cache_sketch(layer_cache *l, const attention_shape *s, int32_t page_bits, int32_t layer,
                      const sketch_memory *m) {
  size_t head_bytes = (size_t)l->n_blocks * sketch_page_bytes(page_bits, s->head_dim), d = (size_t)s->head_dim;
  for (int32_t g = 0; g < s->n_kv_heads; g++) {
    size_t head = (size_t)(layer * s->n_kv_heads + g);
    l->sketches[g] = (key_sketch){.pages = m->pages + head * head_bytes};
    if (page_bits != PYLLM_GRADED) continue;
    l->sketches[g].channels = m->recipe.channels + head * d;
    l->sketches[g].query = m->recipe.queries + head * d;
    l->sketches[g].usual = m->usual + head * usual_halves(l->n_blocks, s->head_dim);
  }
  l->sketch_bits = page_bits;
}

const uint16_t *cache_halves(const kernels *k, const layer_cache *cache, int32_t kv_head, int32_t block,
                             int32_t head_dim, half_block made) {
  const void *at = cache_block(cache, kv_head, block, head_dim);
  if (cache->kv_type == PYLLM_KV_F16) return at;
  k->kv_halves(at, head_dim, made);
  return made;
}

/* Zeroes the slots [slot, 64) of one block. */
static void clear_slots(const kernels *k, const layer_cache *l, void *block, int32_t d, int32_t slot) {
  float zeros[LARGEST_HEAD] = {0};
  for (int32_t t = slot; t < PYLLM_PAGE; t++) k->kv_store(l->kv_type, zeros, zeros, d, t, block);
}

static void clear_head(const kernels *k, const layer_cache *l, int32_t kv_head, const attention_shape *s, int32_t from,
                       int32_t to) {
  int32_t first = kv_block_of(s->n_sink, from), last = kv_block_of(s->n_sink, to - 1), d = s->head_dim;
  clear_slots(k, l, cache_block(l, kv_head, first, d), d, from - kv_block_start(s->n_sink, first));
  for (int32_t b = first + 1; b <= last; b++) memset(cache_block(l, kv_head, b, d), 0, kv_block_bytes(l->kv_type, d));
}

/* Of the pages that are no longer whole, nothing stays that a product with zero does not make zero. */
static void cut_sketch(key_sketch *sketch, int32_t head_dim, int32_t whole_pages) {
  for (int32_t page = whole_pages; sketch->usual && page < sketch->n_pages; page++)
    for (int32_t i = 0; i < head_dim; i++) *usual_at(sketch->usual, head_dim, page, i) = 0;
  if (sketch->n_pages > whole_pages) sketch->n_pages = whole_pages;
}

void cpu_cache_cut(const kernels *k, layer_cache *l, const attention_shape *s, int32_t from, int32_t to) {
  int32_t whole_pages = from > s->n_sink ? (from - s->n_sink) / PYLLM_PAGE : 0;
  for (int32_t g = 0; from < to && g < s->n_kv_heads; g++) {
    clear_head(k, l, g, s, from, to);
    if (l->moments[g].n_pages > whole_pages) l->moments[g].n_pages = 0;
    cut_sketch(&l->sketches[g], s->head_dim, whole_pages);
  }
}
