/* A session's attention on the GPU: its memory, and the stages as ops.h has them. */
#include "attention.cuh"
#include <cmath>
#include <new>
#include <utility>
extern "C" {
#include "error.h"
}

struct attention_state {
  attention_shape shape;
  attention_policy policy; /* as set; its arrays are the session's */
  device_policy on_device; /* the same for all layers: its arrays are (n_layers, ...) */
  device_attention a;
  device_layer *layers; /* (n_layers) */
  int32_t sketch_bits;  /* page_bits of the layers' sketches; 0 while there are none */
  sketch_recipe recipe; /* what they are made with */
  int32_t position, n;  /* of the batch */
  int32_t staged;       /* the layer whose bulk a.staged holds for the batch; -1: none */
};

namespace {
struct nothing {
  template <int D> void run() const {}
};

device_attention shape_of(const attention_shape &s) { return attention_of(s, kv_blocks(s.n_ctx, s.n_sink)); }

int32_t check_shape(const attention_shape *s, pyllm_error *err) {
  if (s->kv_type != PYLLM_KV_F16)
    return fail(err, PYLLM_ERR_UNSUPPORTED, "kv_type q8_0: on the GPU keys and values are f16");
  if (with_head_dim(s->head_dim, nothing{})) return PYLLM_OK;
  return fail(err, PYLLM_ERR_UNSUPPORTED, "heads of %d dimensions: the GPU has kernels for 32, 64, 80, 96, 128 and 256",
              s->head_dim);
}

int32_t memory_needed(const backend *, const attention_shape *s, int32_t page_bits, pyllm_session_memory *out,
                      pyllm_error *err) {
  int32_t status = check_shape(s, err);
  if (status) return status;
  uint64_t heads = (uint64_t)s->n_layers * (uint64_t)s->n_kv_heads, d = (uint64_t)s->head_dim;
  out->kv_bytes = (uint64_t)s->n_layers * layer_kv_bytes(shape_of(*s));
  out->host_bytes = (uint64_t)s->n_layers * layer_host_bytes(shape_of(*s));
  out->moment_bytes = heads * d * (d + d / MOMENT_ROWS) * sizeof(float);
  out->sketch_bytes = page_bits ? (uint64_t)s->n_layers * layer_sketch_bytes(shape_of(*s), page_bits) : 0;
  out->scratch_bytes += attention_memory_bytes(shape_of(*s), s->n_batch);
  return PYLLM_OK;
}

/* ---- the policy on the device ---- */

/* Calls f(array there, array here, elements of all layers) for every array of a policy. */
template <class F> void each_array(const attention_shape &s, const attention_policy &p, device_policy &d, F f) {
  size_t heads = (size_t)s.n_layers * (size_t)s.n_heads, kv_heads = (size_t)s.n_layers * (size_t)s.n_kv_heads;
  size_t dim = (size_t)s.head_dim;
  f(d.thresholds, p.thresholds, heads);
  f(d.static_local, p.static_local, heads);
  f(d.coefficients, p.coefficients, heads * 3);
  f(d.means, p.means, kv_heads * dim);
  f(d.covariances, p.covariances, kv_heads * dim * dim);
  f(d.channels, p.channels, kv_heads * dim);
  f(d.query_means, p.query_means, kv_heads * dim);
}

void release_policy(const backend *be, const attention_shape &s, device_policy &d) {
  each_array(s, attention_policy{}, d, [=](auto &there, auto *, size_t) {
    be->ops->release(be, (void *)there);
    there = NULL;
  });
}

bool upload_policy(const backend *be, const attention_shape &s, const attention_policy &p, device_policy &d) {
  d = {};
  d.policy = p.policy, d.granularity = p.granularity, d.gaussian = p.gaussian, d.estimate = p.estimate;
  d.page_bits = p.page_bits, d.page_share = p.page_share, d.decode_share = p.decode_share, d.page_drop = p.page_drop;
  bool ok = true;
  each_array(s, p, d, [&](auto &there, auto *here, size_t n) {
    if (!here) return;
    void *memory = be->ops->alloc(be, n * sizeof *here);
    if (memory) be->ops->write(be, memory, here, n * sizeof *here);
    there = (decltype(+here))memory;
    ok &= memory != NULL;
  });
  return ok;
}

device_policy policy_of(const attention_state *s, int32_t layer) {
  device_policy p = s->on_device;
  each_array(s->shape, s->policy, p, [=](auto &there, auto *, size_t n) {
    if (there) there += (size_t)layer * (n / (size_t)s->shape.n_layers);
  });
  return p;
}

/* Empty sketches for all layers. */
struct new_sketches {
  layer_sketch *layers; /* (n_layers) or NULL */
  sketch_recipe recipe;
};

void discard_sketches(const backend *be, const attention_state *s, new_sketches &sketches) {
  for (int32_t i = 0; sketches.layers && i < s->shape.n_layers; i++) layer_sketch_free(be, sketches.layers[i]);
  delete[] sketches.layers;
  sketch_recipe_free(&sketches.recipe);
}

/* False when memory is refused; what there is then is still to be discarded. n: channels of all layers. */
bool take_sketches(const backend *be, const attention_state *s, const attention_policy &p, size_t n,
                   new_sketches &sketches) {
  sketches.layers = new (std::nothrow) layer_sketch[(size_t)s->shape.n_layers]{};
  bool ok = sketch_recipe_new(&p, n, &sketches.recipe) && sketches.layers;
  for (int32_t i = 0; ok && i < s->shape.n_layers; i++)
    ok = layer_sketch_new(be, s->a, sketches.layers[i], p.page_bits);
  return ok;
}

void put_sketches(const backend *be, attention_state *s, int32_t page_bits, new_sketches &sketches) {
  for (int32_t i = 0; i < s->shape.n_layers; i++) std::swap(s->layers[i].sketch, sketches.layers[i]);
  std::swap(s->recipe, sketches.recipe);
  s->sketch_bits = page_bits;
  discard_sketches(be, s, sketches); /* the old ones */
}

int32_t set_policy(const backend *be, attention_state *s, const attention_policy *policy, pyllm_error *err) {
  device_policy uploaded;
  if (!upload_policy(be, s->shape, *policy, uploaded)) {
    release_policy(be, s->shape, uploaded);
    return alloc_failure(be, fail(err, PYLLM_ERR_MEMORY, "the GPU's memory for an attention policy was refused"), err);
  }
  size_t n_channels = (size_t)s->shape.n_layers * (size_t)s->shape.n_kv_heads * (size_t)s->shape.head_dim;
  bool renew = policy_needs_sketch(policy, n_channels, s->sketch_bits, &s->recipe);
  new_sketches sketches = {};
  if (renew && !take_sketches(be, s, *policy, n_channels, sketches)) {
    discard_sketches(be, s, sketches);
    release_policy(be, s->shape, uploaded);
    int32_t status = fail(err, PYLLM_ERR_MEMORY, "the GPU's memory for a key sketch was refused");
    return alloc_failure(be, status, err);
  }
  if (renew) put_sketches(be, s, policy->page_bits, sketches);
  release_policy(be, s->shape, s->on_device);
  s->on_device = uploaded;
  s->policy = *policy;
  s->a.n_window = policy->n_window;
  s->a.paged = policy->page_bits != 0;
  s->a.rest = policy->page_rest;
  return be->ops->sync(be, err);
}

/* ---- a session's memory ---- */

void destroy(const backend *be, attention_state *s) {
  if (!s) return;
  for (int32_t i = 0; s->layers && i < s->shape.n_layers; i++) layer_memory_free(be, s->a, s->layers[i]);
  attention_memory_free(be, s->a);
  release_policy(be, s->shape, s->on_device);
  delete[] s->layers;
  sketch_recipe_free(&s->recipe);
  delete s;
}

bool take_memory(const backend *be, attention_state *s) {
  s->layers = new (std::nothrow) device_layer[(size_t)s->shape.n_layers]{};
  bool ok = s->layers && attention_memory_new(be, s->a, s->shape.n_batch);
  for (int32_t i = 0; ok && i < s->shape.n_layers; i++) ok = layer_memory_new(be, s->a, s->layers[i]);
  return ok;
}

int32_t create(const backend *be, const attention_shape *shape, attention_state **out, pyllm_error *err) {
  int32_t status = check_shape(shape, err);
  if (status) return status;
  attention_state *s = new (std::nothrow) attention_state{};
  if (s) {
    s->shape = *shape;
    s->a = shape_of(*shape);
    s->a.now = step_of(be);
  }
  if (!s || !take_memory(be, s)) {
    destroy(be, s);
    status = fail(err, PYLLM_ERR_MEMORY, "the GPU's memory for the KV cache of a context of %d tokens was refused",
                  shape->n_ctx);
    return alloc_failure(be, status, err);
  }
  *out = s;
  return PYLLM_OK;
}

void cut(const backend *be, attention_state *s, int32_t from, int32_t to) {
  queue *q = cuda_enter(be);
  for (int32_t i = 0; i < s->shape.n_layers; i++) cuda_cut(q, s->a, s->layers[i], from, to);
}

/* ---- looking in from the host ---- */

uint16_t *blocks_at(attention_state *s, int32_t layer, int32_t kv_head) {
  return s->layers[layer].kv + (int64_t)kv_head * s->a.n_blocks * kv_block_halves(s->shape.head_dim);
}

struct host_block {
  uint16_t half[2 * PYLLM_PAGE * MAX_HEAD_DIM];
};

/* Where a block's halves are on the CPU: f(here, there) for each; see cpu/cpu.h. */
template <class F> void each_half(int32_t d, F f) {
  for (int32_t slot = 0; slot < PYLLM_PAGE; slot++)
    for (int32_t i = 0; i < d; i++) {
      f(kv_key_at(d, slot, i), block_key_index(d, slot, i));
      f(kv_value_at(d, slot, i), PYLLM_PAGE * d + block_value_index(d, slot, i));
    }
}

/* A copy within the host's memory waits for no kernels: those that work on a split cache are waited for here. */
void settle(const backend *be, const attention_state *s) {
  if (s->a.n_recent) be->ops->sync(be, NULL);
}

void read_blocks(const backend *be, attention_state *s, int32_t layer, int32_t kv_head, int32_t n, void *blocks) {
  int32_t d = s->shape.head_dim;
  size_t bytes = kv_block_bytes(PYLLM_KV_F16, d);
  settle(be, s);
  be->ops->read(be, blocks, blocks_at(s, layer, kv_head), (size_t)n * bytes);
  for (int32_t b = 0; b < n; b++) {
    uint16_t *to = (uint16_t *)blocks + b * kv_block_halves(d);
    host_block from;
    memcpy(from.half, to, bytes);
    each_half(d, [&](int64_t mine, int64_t theirs) { to[theirs] = from.half[mine]; });
  }
}

void write_blocks(const backend *be, attention_state *s, int32_t layer, int32_t kv_head, int32_t n,
                  const void *blocks) {
  int32_t d = s->shape.head_dim;
  size_t bytes = kv_block_bytes(PYLLM_KV_F16, d);
  settle(be, s);
  /* Some blocks at once: every write waits for the one before. */
  enum { AT_ONCE = 4 };
  uint16_t some[AT_ONCE * 2 * PYLLM_PAGE * MAX_HEAD_DIM];
  for (int32_t b = 0; b < n; b += AT_ONCE) {
    int32_t taken = n - b < AT_ONCE ? n - b : AT_ONCE;
    for (int32_t i = 0; i < taken; i++) {
      const unsigned char *from = (const unsigned char *)blocks + (size_t)(b + i) * bytes; /* of any alignment */
      uint16_t *to = some + i * kv_block_halves(d);
      each_half(d, [&](int64_t mine, int64_t theirs) { memcpy(&to[mine], from + 2 * theirs, sizeof *to); });
    }
    be->ops->write(be, blocks_at(s, layer, kv_head) + b * kv_block_halves(d), some, (size_t)taken * bytes);
  }
  bool last = kv_head == s->shape.n_kv_heads - 1; /* of the layer's heads */
  if (last && n > 0) cuda_fill_recent(queue_of(be), s->a, s->layers[layer], kv_block_start(s->shape.n_sink, n - 1) + 1);
}

void read_moments(const backend *be, attention_state *s, int32_t layer, int32_t kv_head, int32_t n_pages, float *mean,
                  float *cov) {
  /* As the query sees them that has exactly these pages behind a window of its own token. */
  device_attention a = s->a;
  a.n_window = 1;
  a.n_recent = 0; /* which blocks are the newest is not this query's to say */
  cuda_begin(be, a.n_sink + n_pages * PYLLM_PAGE, 1);
  const device_layer &l = s->layers[layer];
  size_t d = (size_t)s->shape.head_dim, parts = d / MOMENT_ROWS, head = (size_t)kv_head;
  cuda_fold_moments(queue_of(be), a, l);
  be->ops->read(be, mean, l.mean + head * parts * d, d * sizeof *mean);
  be->ops->read(be, cov, l.m2 + head * d * d, d * d * sizeof *cov);
  for (size_t i = 0; i < d * d; i++) cov[i] /= (float)(n_pages * PYLLM_PAGE);
}

void read_stats(const backend *be, attention_state *s, pyllm_layer_stats *stats) {
  for (int32_t i = 0; i < s->shape.n_layers; i++) be->ops->read(be, stats + i, s->layers[i].stats, sizeof *stats);
}

/* ---- stages ---- */

void begin(const backend *, attention_state *s, int32_t position, int32_t n, const float *q) {
  s->a.q = q;
  s->position = position;
  s->n = n;
  s->staged = -1;
}

/* A layer of a split cache whose bulk many queries read: every panel of them would fetch it over the bus, so it is
 * copied, once. A few queries, of which one panel reads it, take what they need of it from where it is. */
device_layer staged_layer(const backend *be, attention_state *s, int32_t layer) {
  device_layer l = s->layers[layer];
  if (!s->a.n_recent || few_tokens(s->n) || s->policy.policy == PYLLM_WINDOW) return l;
  const uint16_t *from = l.kv;
  l.kv = s->a.staged;
  if (s->staged == layer) return l;
  s->staged = layer;
  queue *q = queue_of(be);
  int64_t halves = kv_block_halves(s->shape.head_dim), head = s->a.n_blocks * halves;
  int64_t pages = bulk_pages(s->shape.n_sink, s->policy.n_window, s->position + s->n - 1);
  for (int32_t g = 0; g < s->shape.n_kv_heads && pages > 0 && !q->error; g++) {
    int64_t first = g * head + halves; /* behind the sinks */
    check(q, cudaMemcpyAsync(l.kv + first, from + first, (size_t)(pages * halves) * sizeof *from, cudaMemcpyDefault,
                             q->stream));
  }
  return l;
}

void rope_store(const backend *be, const rope_job *job, int32_t n, attention_state *s, int32_t layer) {
  cuda_rope_store(queue_of(be), s->a, s->layers[layer], *job, n);
}

void attend_local(const backend *be, attention_state *s, int32_t layer) {
  cuda_attend_local(queue_of(be), s->a, s->layers[layer], s->n);
}

uint64_t select_heads(const backend *be, attention_state *s, int32_t layer) {
  cuda_select_long(queue_of(be), s->a, staged_layer(be, s, layer), policy_of(s, layer), s->n);
  return 0;
}

void attend_bulk(const backend *be, attention_state *s, int32_t layer) {
  cuda_attend_bulk(queue_of(be), s->a, staged_layer(be, s, layer), s->n);
}

void finish(const backend *be, attention_state *s, int32_t first, int32_t bits, activation *out) {
  cuda_finish(queue_of(be), s->a, first, s->n, bits != 0, *out);
}

/* out (n, n_heads) = what the device has, but NaN where known(query) does not hold or the query has no bulk. */
template <class F> void read_rows(const backend *be, const attention_state *s, float *out, const float *from, F known) {
  if (!out) return;
  be->ops->read(be, out, from, (size_t)s->n * (size_t)s->shape.n_heads * sizeof *out);
  for (int32_t i = 0; i < s->n; i++) {
    if (known(i) && bulk_pages(s->shape.n_sink, s->policy.n_window, s->position + i) > 0) continue;
    for (int32_t h = 0; h < s->shape.n_heads; h++) out[(int64_t)i * s->shape.n_heads + h] = NAN;
  }
}

void record(const backend *be, attention_state *s, int32_t layer, const pyllm_record *out) {
  const ops *o = be->ops;
  size_t rows = (size_t)s->n * (size_t)s->shape.n_heads, bytes = rows * sizeof(float);
  if (out->local_mass) o->read(be, out->local_mass, s->a.local_mass, bytes);
  if (out->queries) o->read(be, out->queries, s->a.q, (size_t)s->shape.head_dim * bytes);
  if (out->is_long) o->read(be, out->is_long, s->a.is_long, rows);
  if (out->read_mass) {
    float *mass = (float *)s->a.mass_state; /* free until the audit */
    cuda_read_mass(queue_of(be), s->a, s->n, mass);
    o->read(be, out->read_mass, mass, bytes);
  }
  bool adaptive = s->policy.policy == PYLLM_ADAPTIVE, estimated = adaptive || s->policy.policy == PYLLM_ORACLE;
  read_rows(be, s, out->estimate, s->a.bulk_mass, [=](int32_t) { return estimated; });
  read_rows(be, s, out->mean_score, s->a.mean_score, [=](int32_t) { return adaptive; });
  read_rows(be, s, out->deviation, s->a.deviation, [=](int32_t) { return adaptive; });
  if (!out->true_mass) return;
  bool any = out->audit && memchr(out->audit, 1, (size_t)s->n);
  if (any) {
    o->write(be, s->a.audited, out->audit, (size_t)s->n);
    cuda_true_bulk_mass(queue_of(be), s->a, staged_layer(be, s, layer), s->n, true);
  }
  read_rows(be, s, out->true_mass, s->a.bulk_mass, [=](int32_t query) { return any && out->audit[query]; });
}
} // namespace

const attention_ops cuda_attention_ops = {
    .memory = memory_needed,
    .create = create,
    .destroy = destroy,
    .set_policy = set_policy,
    .cut = cut,
    .read_blocks = read_blocks,
    .write_blocks = write_blocks,
    .read_moments = read_moments,
    .read_stats = read_stats,
    .begin = begin,
    .rope_store = rope_store,
    .attend_local = attend_local,
    .select = select_heads,
    .attend_bulk = attend_bulk,
    .record = record,
    .finish = finish,
};
