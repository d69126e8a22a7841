/* Bookkeeping of KV blocks; their layout is described in ops.h, their geometry in attention.h. */
#include "session.h"
#include <string.h>

int32_t session_blocks(int32_t n_ctx, int32_t n_sink) {
  return 1 + (n_ctx > n_sink ? (n_ctx - n_sink + PYLLM_PAGE - 1) / PYLLM_PAGE : 0);
}

uint64_t session_block_bytes(const config *c) { return 2 * sizeof(uint16_t) * PYLLM_PAGE * (uint64_t)c->head_dim; }

uint16_t *session_head_blocks(const pyllm_session *s, int32_t layer, int32_t kv_head) {
  const layer_cache *l = &s->layers[layer];
  return l->kv + (uint64_t)kv_head * (uint64_t)l->n_blocks * session_block_bytes(&s->model->config) / sizeof *l->kv;
}

/* Zeroes the slots [slot, 64) of one block. */
static void clear_slots(uint16_t *block, int32_t d, int32_t slot) {
  uint16_t *values = block + PYLLM_PAGE * d;
  for (int32_t t = slot; t < PYLLM_PAGE; t++) {
    int32_t strip = t / STRIP * STRIP * d, in_strip = t % STRIP;
    for (int32_t i = 0; i < d; i++) {
      block[strip + i / 2 * 2 * STRIP + 2 * in_strip + i % 2] = 0;
      values[strip + i / STRIP * STRIP * STRIP + in_strip / 2 * 2 * STRIP + 2 * (i % STRIP) + in_strip % 2] = 0;
    }
  }
}

static void clear_head(pyllm_session *s, int32_t layer, int32_t kv_head, int32_t from, int32_t to) {
  const config *c = &s->model->config;
  uint64_t halves = session_block_bytes(c) / sizeof(uint16_t);
  uint16_t *blocks = session_head_blocks(s, layer, kv_head);
  int32_t first = kv_block_of(s->n_sink, from), last = kv_block_of(s->n_sink, to - 1);
  clear_slots(blocks + (uint64_t)first * halves, c->head_dim, from - kv_block_start(s->n_sink, first));
  for (int32_t b = first + 1; b <= last; b++) memset(blocks + (uint64_t)b * halves, 0, session_block_bytes(c));
}

void session_cut(pyllm_session *s, int32_t from, int32_t to) {
  int32_t whole_pages = from > s->n_sink ? (from - s->n_sink) / PYLLM_PAGE : 0;
  for (int32_t i = 0; i < s->model->config.n_layers && from < to; i++)
    for (int32_t g = 0; g < s->model->config.n_kv_heads; g++) {
      clear_head(s, i, g, from, to);
      if (s->layers[i].moments[g].n_pages > whole_pages) s->layers[i].moments[g].n_pages = 0;
      if (s->layers[i].sketches[g].n_pages > whole_pages) s->layers[i].sketches[g].n_pages = whole_pages;
    }
  s->position = from;
}
