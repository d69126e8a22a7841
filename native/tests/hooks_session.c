/* Hooks into a session: faults that cannot be brought about from outside. */
#include "cpu.h"
#include "hooks.h"
#include "session.h"
#include "sketch.h"

void hook_mirror_sketch(pyllm_session *s, int32_t layer) {
  const config *c = &s->model->config;
  layer_cache *l = &s->attention->layers[layer];
  size_t page = sketch_page_bytes(l->sketch_bits, c->head_dim),
         codes = sketch_grade_at(l->sketch_bits, c->head_dim, 0).low;
  for (int32_t g = 0; g < c->n_kv_heads; g++)
    for (int32_t p = 0; p < l->sketches[g].n_pages; p++)
      for (size_t i = codes; i < page; i++) l->sketches[g].pages[(size_t)p * page + i] ^= 0xff;
}
