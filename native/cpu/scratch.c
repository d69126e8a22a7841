/* Memory that the attention stages of one session work in. */
#include "cpu.h"
#include <stdlib.h>

/* Queries, outputs and, in half the room, queries as words; scores and factors. */
static size_t panel_floats(int32_t head_dim) { return (size_t)PANEL_ROWS * (5 * (size_t)head_dim / 2 + KV_BLOCK + 1); }

static int32_t most_partial_rows(const attention_shape *s) {
  return (s->n_ctx / (STRIP * SPAN_STRIPS) + 2) * s->n_heads;
}

static size_t page_floats(const attention_shape *s) {
  return SHARED_ROWS * (2 + (size_t)s->head_dim + (size_t)most_strips(s->n_ctx));
}

static void place_panel(panel *p, float *memory, int32_t head_dim) {
  p->q = memory;
  p->out = p->q + PANEL_ROWS * head_dim;
  p->scores = p->out + PANEL_ROWS * head_dim;
  p->alpha = p->scores + PANEL_ROWS * KV_BLOCK;
  p->q_words = (int16_t *)(void *)(p->alpha + PANEL_ROWS);
}

static void place_pages(page_scratch *p, float *memory, const attention_shape *s) {
  p->local_mass = memory;
  p->total = p->local_mass + SHARED_ROWS;
  p->q = p->total + SHARED_ROWS;
  p->shares = p->q + SHARED_ROWS * s->head_dim;
}

/* A list per thread in prefill, one per key/value head in decode. */
static size_t page_slots(size_t n_threads, const attention_shape *s) {
  return n_threads > (size_t)s->n_kv_heads ? n_threads : (size_t)s->n_kv_heads;
}

uint64_t cpu_scratch_bytes(int32_t n_threads, const attention_shape *s) {
  uint64_t rows = (uint64_t)most_partial_rows(s);
  return (uint64_t)n_threads * (sizeof(panel) + panel_floats(s->head_dim) * sizeof(float)) +
         page_slots((size_t)n_threads, s) * (sizeof(page_scratch) + page_floats(s) * sizeof(float)) +
         rows * (sizeof(span_unit) + sizeof(softmax_state) + (uint64_t)s->head_dim * sizeof(float));
}

static float *floats(size_t n) { return aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64); }

void *cpu_scratch_new(const backend *be, const attention_shape *shape) {
  cpu_scratch *s = calloc(1, sizeof *s);
  if (!s) return NULL;
  size_t threads = (size_t)pool_size(be->pool), rows = (size_t)most_partial_rows(shape);
  s->partial_rows = (int32_t)rows;
  s->panels = calloc(threads, sizeof *s->panels);
  s->pages = calloc(page_slots(threads, shape), sizeof *s->pages);
  s->panel_memory = floats(threads * panel_floats(shape->head_dim));
  s->page_memory = floats(page_slots(threads, shape) * page_floats(shape));
  s->units = malloc(rows * sizeof *s->units);
  s->partial.state = malloc(rows * sizeof *s->partial.state);
  s->partial.out = floats(rows * (size_t)shape->head_dim);
  if (!s->panels || !s->pages || !s->panel_memory || !s->page_memory || !s->units || !s->partial.state ||
      !s->partial.out) {
    cpu_scratch_free(s);
    return NULL;
  }
  for (size_t t = 0; t < threads; t++)
    place_panel(&s->panels[t], s->panel_memory + t * panel_floats(shape->head_dim), shape->head_dim);
  for (size_t i = 0; i < page_slots(threads, shape); i++)
    place_pages(&s->pages[i], s->page_memory + i * page_floats(shape), shape);
  return s;
}

void cpu_scratch_free(void *scratch) {
  cpu_scratch *s = scratch;
  if (!s) return;
  free(s->panels);
  free(s->pages);
  free(s->panel_memory);
  free(s->page_memory);
  free(s->units);
  free(s->partial.state);
  free(s->partial.out);
  free(s);
}
