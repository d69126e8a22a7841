/* The arrays behind device_attention and device_layer: each is named once, with its size. */
#include "rest.cuh"

namespace {
/* f(pointer, how many) for everything that a session's attention owns. */
template <class F> void each_array(device_attention &a, int32_t n_batch, F f) {
  size_t d = (size_t)a.head_dim, heads = (size_t)a.n_heads, kv_heads = (size_t)a.n_kv_heads;
  size_t rows = (size_t)n_batch * heads, tiles = (size_t)a.max_tiles, strips = (size_t)a.max_strips;
  f(a.state, rows);
  f(a.out, rows * d);
  f(a.local_mass, rows);
  f(a.bulk_mass, rows);
  f(a.mean_score, rows);
  f(a.deviation, rows);
  f(a.is_long, rows);
  f(a.audited, (size_t)n_batch);
  f(a.mass_state, rows);
  if (a.n_recent) f(a.staged, kv_heads * (size_t)a.n_blocks * (size_t)kv_block_halves(a.head_dim));
  f(a.counts, tiles * heads);
  f(a.rows, tiles * heads * PYLLM_PAGE);
  f(a.strips, tiles * heads * strips);
  f(a.span_state, heads * (size_t)a.max_spans);
  f(a.span_out, heads * (size_t)a.max_spans * d);
  f(a.tile_mean, tiles * kv_heads * d);
  f(a.tile_m2, tiles * kv_heads * d * d);
  f(a.wanted, tiles * heads * strips);
  f(a.scored_rows, tiles * heads * SCORED_MOST);
  f(a.strip_mass, heads * SCORED_MOST * strips);
  f(a.rest_weight, heads * (size_t)a.max_rest_parts);
  f(a.rest_out, heads * (size_t)a.max_rest_parts * d);
}

/* The same for a layer's cache, and for its sketch of page_bits. */
template <class F> void each_array(const device_attention &a, device_layer &l, F f) {
  size_t d = (size_t)a.head_dim, g = (size_t)a.n_kv_heads, parts = d / MOMENT_ROWS;
  size_t halves = (size_t)kv_block_halves(a.head_dim);
  if (a.n_recent) f(l.recent, g * (1 + (size_t)a.n_recent) * halves);
  else f(l.kv, g * (size_t)a.n_blocks * halves);
  f(l.folded, g * parts);
  f(l.mean, g * parts * d);
  f(l.m2, g * d * d);
  f(l.stats, 1);
}

template <class F> void each_array(const device_attention &a, layer_sketch &sketch, int32_t page_bits, F f) {
  size_t g = (size_t)a.n_kv_heads;
  f(sketch.folded, g * (size_t)sketch_parts(a.head_dim));
  f(sketch.pages, g * (size_t)a.n_blocks * sketch_page_bytes(page_bits, a.head_dim));
  if (page_bits == PYLLM_GRADED) f(sketch.usual, g * (size_t)a.n_blocks * (size_t)a.head_dim);
}

struct sum_bytes {
  uint64_t *bytes;
  template <class T> void operator()(T *&, size_t n) const { *bytes += n * sizeof(T); }
};
struct take_memory {
  const backend *be;
  bool *ok;
  template <class T> void operator()(T *&at, size_t n) const {
    at = (T *)be->ops->alloc(be, n * sizeof(T));
    *ok &= at != NULL;
  }
};
struct give_back {
  const backend *be;
  template <class T> void operator()(T *&at, size_t) const {
    if (at) be->ops->release(be, at);
    at = NULL;
  }
};
} // namespace

/* What a batch and the window before each of its queries touch, and so much that no two of them share a place. */
static int32_t recent_blocks(const attention_shape &s, int32_t n_blocks) {
  if (s.kv_window == 0) return 0;
  int64_t blocks = ((int64_t)s.kv_window + s.n_batch) / PYLLM_PAGE + 3, most = n_blocks > 1 ? n_blocks - 1 : 1;
  return (int32_t)(blocks < most ? blocks : most);
}

device_attention attention_of(const attention_shape &s, int32_t n_blocks) {
  device_attention a = {};
  a.n_heads = s.n_heads, a.n_kv_heads = s.n_kv_heads, a.head_dim = s.head_dim, a.n_sink = s.n_sink, a.scale = s.scale;
  a.n_blocks = n_blocks;
  a.n_recent = recent_blocks(s, n_blocks);
  a.max_strips = most_strips(s.n_ctx);
  a.max_tiles = most_tiles(s.n_batch);
  a.max_rest_parts = rest_parts(a.max_strips / STRIPS_PER_PAGE);
  a.max_spans = (s.n_ctx / PYLLM_READ_PAGE + STRIPS_PER_PAGE + 1 + SPAN - 1) / SPAN;
  return a;
}

static uint64_t head_bytes(const device_attention &a, int32_t n_blocks) {
  return (uint64_t)a.n_kv_heads * (uint64_t)n_blocks * kv_block_bytes(PYLLM_KV_F16, a.head_dim);
}

uint64_t layer_kv_bytes(const device_attention &a) { return head_bytes(a, a.n_recent ? 1 + a.n_recent : a.n_blocks); }

uint64_t layer_host_bytes(const device_attention &a) { return a.n_recent ? head_bytes(a, a.n_blocks) : 0; }

uint64_t attention_memory_bytes(device_attention a, int32_t n_batch) {
  uint64_t bytes = 0;
  each_array(a, n_batch, sum_bytes{&bytes});
  return bytes;
}

bool attention_memory_new(const backend *be, device_attention &a, int32_t n_batch) {
  bool ok = true;
  each_array(a, n_batch, take_memory{be, &ok});
  return ok;
}

void attention_memory_free(const backend *be, device_attention &a) { each_array(a, 1, give_back{be}); }

bool layer_memory_new(const backend *be, const device_attention &a, device_layer &l) {
  bool ok = true;
  each_array(a, l, take_memory{be, &ok});
  if (a.n_recent) ok = (l.kv = (uint16_t *)cuda_alloc_mapped(be, layer_host_bytes(a), &l.host_kv)) != NULL && ok;
  return ok;
}

void layer_memory_free(const backend *be, const device_attention &a, device_layer &l) {
  each_array(a, l, give_back{be});
  cuda_free_mapped(be, l.host_kv);
  l.host_kv = NULL;
  layer_sketch_free(be, l.sketch);
}

uint64_t layer_sketch_bytes(const device_attention &a, int32_t page_bits) {
  uint64_t bytes = 0;
  layer_sketch none = {};
  each_array(a, none, page_bits, sum_bytes{&bytes});
  return bytes;
}

bool layer_sketch_new(const backend *be, const device_attention &a, layer_sketch &sketch, int32_t page_bits) {
  bool ok = true;
  each_array(a, sketch, page_bits, take_memory{be, &ok});
  return ok;
}

void layer_sketch_free(const backend *be, layer_sketch &sketch) {
  give_back{be}(sketch.folded, 0);
  give_back{be}(sketch.pages, 0);
  give_back{be}(sketch.usual, 0);
}
