/* One layer's KV cache on the CPU, its moments and sketches: memory, and forgetting. */
#include "cpu.h"
#include "sketch.h"
#include <stdlib.h>
#include <string.h>

bool cpu_cache_new(layer_cache *l, const attention_shape *s) {
  size_t g = (size_t)s->n_kv_heads, d = (size_t)s->head_dim;
  l->n_blocks = kv_blocks(s->n_ctx, s->n_sink);
  l->kv = calloc(g * (size_t)l->n_blocks, kv_block_bytes(s->head_dim)); /* untouched blocks take no memory */
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

/* Zeroes the slots [slot, 64) of one block. */
static void clear_slots(uint16_t *block, int32_t d, int32_t slot) {
  uint16_t *values = block + PYLLM_PAGE * d;
  for (int32_t t = slot; t < PYLLM_PAGE; t++)
    for (int32_t i = 0; i < d; i++) block[block_key_index(d, t, i)] = values[block_value_index(d, t, i)] = 0;
}

static void clear_head(uint16_t *blocks, const attention_shape *s, int32_t from, int32_t to) {
  int64_t halves = 2 * PYLLM_PAGE * (int64_t)s->head_dim;
  int32_t first = kv_block_of(s->n_sink, from), last = kv_block_of(s->n_sink, to - 1);
  clear_slots(blocks + first * halves, s->head_dim, from - kv_block_start(s->n_sink, first));
  for (int32_t b = first + 1; b <= last; b++) memset(blocks + b * halves, 0, kv_block_bytes(s->head_dim));
}

/* Of the pages that are no longer whole, nothing stays that a product with zero does not make zero. */
static void cut_sketch(key_sketch *sketch, int32_t head_dim, int32_t whole_pages) {
  for (int32_t page = whole_pages; sketch->usual && page < sketch->n_pages; page++)
    for (int32_t i = 0; i < head_dim; i++) *usual_at(sketch->usual, head_dim, page, i) = 0;
  if (sketch->n_pages > whole_pages) sketch->n_pages = whole_pages;
}

void cpu_cache_cut(layer_cache *l, const attention_shape *s, int32_t from, int32_t to) {
  int32_t whole_pages = from > s->n_sink ? (from - s->n_sink) / PYLLM_PAGE : 0;
  for (int32_t g = 0; from < to && g < s->n_kv_heads; g++) {
    clear_head(cache_blocks(l, g, s->head_dim), s, from, to);
    if (l->moments[g].n_pages > whole_pages) l->moments[g].n_pages = 0;
    cut_sketch(&l->sketches[g], s->head_dim, whole_pages);
  }
}
