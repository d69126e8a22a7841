/* A session's attention on the GPU: its memory, and the stages as ops.h has them. */
#include "attention.cuh"
#include "sketch.h"
#include <cmath>
#include <new>
#include <vector>
extern "C" {
#include "error.h"
}

struct attention_state {
  attention_shape shape;
  attention_policy policy; /* its arrays are the session's */
  device_attention a;
  std::vector<device_layer> layers;
  float *thresholds;      /* the policy's (n_layers, n_heads), the device's; NULL before a policy needs them */
  uint8_t *static_local;  /* likewise */
  int32_t sketch_bits, n; /* of the layers' sketches; queries of the batch */
};

namespace {
struct nothing {
  template <int D> void run() const {}
};

size_t layer_heads(const attention_shape &s) { return (size_t)s.n_layers * (size_t)s.n_heads; }

device_attention shape_of(const attention_shape &s) { return attention_of(s, kv_blocks(s.n_ctx, s.n_sink)); }

void memory_needed(const backend *, const attention_shape *s, pyllm_session_memory *out) {
  uint64_t heads = (uint64_t)s->n_layers * (uint64_t)s->n_kv_heads, d = (uint64_t)s->head_dim;
  out->kv_bytes = heads * (uint64_t)kv_blocks(s->n_ctx, s->n_sink) * kv_block_bytes(s->head_dim);
  out->moment_bytes = heads * d * (d + d / MOMENT_ROWS) * sizeof(float);
  out->scratch_bytes += attention_memory_bytes(shape_of(*s), s->n_batch) + layer_heads(*s) * (sizeof(float) + 1);
}

void destroy(const backend *be, attention_state *s) {
  if (!s) return;
  for (device_layer &layer : s->layers) layer_memory_free(be, s->a, layer);
  attention_memory_free(be, s->a);
  be->ops->release(be, s->thresholds);
  be->ops->release(be, s->static_local);
  delete s;
}

bool take_memory(const backend *be, attention_state *s) {
  bool ok = attention_memory_new(be, s->a, s->shape.n_batch);
  for (device_layer &layer : s->layers) ok = ok && layer_memory_new(be, s->a, layer);
  s->thresholds = (float *)be->ops->alloc(be, layer_heads(s->shape) * sizeof(float));
  s->static_local = (uint8_t *)be->ops->alloc(be, layer_heads(s->shape));
  return ok && s->thresholds && s->static_local;
}

int32_t create(const backend *be, const attention_shape *shape, attention_state **out, pyllm_error *err) {
  if (!with_head_dim(shape->head_dim, nothing{}))
    return fail(err, PYLLM_ERR_UNSUPPORTED,
                "heads of %d dimensions: the GPU has kernels for 32, 64, 80, 96, 128 and 256", shape->head_dim);
  attention_state *s = new (std::nothrow) attention_state{};
  if (s) {
    s->shape = *shape;
    s->a = shape_of(*shape);
    s->a.now = step_of(be);
    s->layers.resize((size_t)shape->n_layers);
  }
  if (!s || !take_memory(be, s)) {
    destroy(be, s);
    return fail(err, PYLLM_ERR_MEMORY, "the GPU's memory for the KV cache of a context of %d tokens was refused",
                shape->n_ctx);
  }
  *out = s;
  return PYLLM_OK;
}

int32_t set_policy(const backend *be, attention_state *s, const attention_policy *policy, pyllm_error *err) {
  if (policy->page_bits && policy->page_bits != s->sketch_bits) {
    s->sketch_bits = 0;
    for (device_layer &layer : s->layers)
      if (!layer_sketch_new(be, s->a, layer, policy->page_bits))
        return fail(err, PYLLM_ERR_MEMORY, "the GPU's memory for a key sketch of %d bits was refused",
                    policy->page_bits);
    s->sketch_bits = policy->page_bits;
  }
  size_t n = layer_heads(s->shape);
  if (policy->thresholds) be->ops->write(be, s->thresholds, policy->thresholds, n * sizeof(float));
  if (policy->static_local) be->ops->write(be, s->static_local, policy->static_local, n);
  s->policy = *policy;
  s->a.n_window = policy->n_window;
  s->a.paged = policy->page_bits != 0;
  return PYLLM_OK;
}

device_policy policy_of(const attention_state *s, int32_t layer) {
  const attention_policy &p = s->policy;
  int64_t row = (int64_t)layer * s->shape.n_heads;
  return {p.policy, p.granularity, s->thresholds + row, s->static_local + row, p.page_bits, p.page_share, p.page_drop};
}

void cut(const backend *be, attention_state *s, int32_t from, int32_t to) {
  for (const device_layer &layer : s->layers) cuda_cut(queue_of(be), s->a, layer, from, to);
}

/* ---- looking in from the host ---- */

uint16_t *head_blocks(attention_state *s, int32_t layer, int32_t kv_head) {
  return s->layers[(size_t)layer].kv + (int64_t)kv_head * s->a.n_blocks * kv_block_halves(s->shape.head_dim);
}

/* Where a block's halves are on the CPU: f(here, there) for each; see cpu/cpu.h. */
template <class F> void each_half(int32_t d, F f) {
  for (int32_t slot = 0; slot < PYLLM_PAGE; slot++)
    for (int32_t i = 0; i < d; i++) {
      f(kv_key_at(d, slot, i), block_key_index(d, slot, i));
      f(kv_value_at(d, slot, i), PYLLM_PAGE * d + block_value_index(d, slot, i));
    }
}

void read_blocks(const backend *be, attention_state *s, int32_t layer, int32_t kv_head, int32_t n, void *blocks) {
  int32_t d = s->shape.head_dim;
  std::vector<uint16_t> here((size_t)(n * kv_block_halves(d)));
  be->ops->read(be, here.data(), head_blocks(s, layer, kv_head), here.size() * sizeof(uint16_t));
  for (int32_t b = 0; b < n; b++) {
    const uint16_t *from = here.data() + b * kv_block_halves(d);
    uint16_t *to = (uint16_t *)blocks + b * kv_block_halves(d);
    each_half(d, [=](int64_t mine, int64_t theirs) { memcpy(to + theirs, from + mine, sizeof *to); });
  }
}

void write_blocks(const backend *be, attention_state *s, int32_t layer, int32_t kv_head, int32_t n,
                  const void *blocks) {
  int32_t d = s->shape.head_dim;
  std::vector<uint16_t> here((size_t)(n * kv_block_halves(d)));
  for (int32_t b = 0; b < n; b++) {
    const uint16_t *from = (const uint16_t *)blocks + b * kv_block_halves(d);
    uint16_t *to = here.data() + b * kv_block_halves(d);
    each_half(d, [=](int64_t mine, int64_t theirs) { memcpy(to + mine, from + theirs, sizeof *to); });
  }
  be->ops->write(be, head_blocks(s, layer, kv_head), here.data(), here.size() * sizeof(uint16_t));
}

void read_moments(const backend *be, attention_state *s, int32_t layer, int32_t kv_head, int32_t n_pages, float *mean,
                  float *cov) {
  /* As the query sees them that has exactly these pages behind a window of its own token. */
  device_attention a = s->a;
  a.n_window = 1;
  cuda_begin(be, a.n_sink + n_pages * PYLLM_PAGE, 1);
  const device_layer &l = s->layers[(size_t)layer];
  size_t d = (size_t)s->shape.head_dim, parts = d / MOMENT_ROWS, head = (size_t)kv_head;
  cuda_fold_moments(queue_of(be), a, l);
  be->ops->read(be, mean, l.mean + head * parts * d, d * sizeof *mean);
  be->ops->read(be, cov, l.m2 + head * d * d, d * d * sizeof *cov);
  for (size_t i = 0; i < d * d; i++) cov[i] /= (float)(n_pages * PYLLM_PAGE);
}

void read_stats(const backend *be, attention_state *s, pyllm_layer_stats *stats) {
  for (size_t i = 0; i < s->layers.size(); i++) be->ops->read(be, stats + i, s->layers[i].stats, sizeof *stats);
}

/* ---- stages ---- */

void begin(const backend *, attention_state *s, int32_t, int32_t n, const float *q) {
  s->a.q = q;
  s->n = n;
}

void rope_store(const backend *be, const rope_job *job, int32_t n, attention_state *s, int32_t layer) {
  cuda_rope_store(queue_of(be), s->a, s->layers[(size_t)layer], *job, n);
}

void attend_local(const backend *be, attention_state *s, int32_t layer) {
  cuda_attend_local(queue_of(be), s->a, s->layers[(size_t)layer], s->n);
}

uint64_t select_heads(const backend *be, attention_state *s, int32_t layer) {
  cuda_select_long(queue_of(be), s->a, s->layers[(size_t)layer], policy_of(s, layer), s->n);
  return 0;
}

void attend_bulk(const backend *be, attention_state *s, int32_t layer) {
  cuda_attend_bulk(queue_of(be), s->a, s->layers[(size_t)layer], s->n);
}

void finish(const backend *be, attention_state *s, bool rounded, activation *out) {
  cuda_finish(queue_of(be), s->a, s->n, rounded, *out);
}

/* mass (n, n_heads) = NaN where known(query) does not hold. */
template <class F> void blank_rows(const attention_state *s, float *mass, F known) {
  for (int32_t i = 0; i < s->n; i++)
    for (int32_t h = 0; h < s->shape.n_heads && !known(i); h++) mass[(int64_t)i * s->shape.n_heads + h] = NAN;
}

void record(const backend *be, attention_state *s, int32_t layer, const pyllm_record *out) {
  const ops *o = be->ops;
  size_t rows = (size_t)s->n * (size_t)s->shape.n_heads, bytes = rows * sizeof(float);
  step now;
  o->read(be, &now, s->a.now, sizeof now);
  auto has_bulk = [&](int32_t query) {
    return bulk_pages(s->shape.n_sink, s->policy.n_window, now.position + query) > 0;
  };
  if (out->local_mass) o->read(be, out->local_mass, s->a.local_mass, bytes);
  if (out->is_long) o->read(be, out->is_long, s->a.is_long, rows);
  if (out->read_mass) {
    std::vector<float2> states(rows);
    o->read(be, states.data(), s->a.state, rows * sizeof(float2));
    for (size_t i = 0; i < rows; i++) out->read_mass[i] = (states[i].x + log2f(states[i].y)) * (float)M_LN2;
  }
  if (out->estimate) {
    bool estimated = s->policy.policy == PYLLM_ADAPTIVE || s->policy.policy == PYLLM_ORACLE;
    o->read(be, out->estimate, s->a.bulk_mass, bytes);
    blank_rows(s, out->estimate, [&](int32_t query) { return estimated && has_bulk(query); });
  }
  if (!out->true_mass) return;
  bool audited = false;
  for (int32_t i = 0; out->audit && i < s->n; i++) audited |= out->audit[i] != 0;
  /* Where one query of a batch is audited, all are computed. */
  if (audited) cuda_true_bulk_mass(queue_of(be), s->a, s->layers[(size_t)layer], s->n);
  if (audited) o->read(be, out->true_mass, s->a.bulk_mass, bytes);
  blank_rows(s, out->true_mass, [&](int32_t query) { return audited && out->audit[query] && has_bulk(query); });
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
