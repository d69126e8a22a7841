/* Hooks into the attention kernels of the GPU: a layer's pipeline, and its moments, on the caller's arrays. */
#include "attention.cuh"
extern "C" {
#include "backend.h"
#include "error.h"
#include "hooks_emu.h"
}

namespace {
/* Grid (tokens, key/value heads), one thread per dimension. */
__global__ void store_kernel(device_attention a, uint16_t *kv, const float *k, const float *v) {
  int32_t position = a.place->position + blockIdx.x, block = kv_block_of(a.n_sink, position), d = a.head_dim;
  int64_t at = ((int64_t)blockIdx.x * a.n_kv_heads + blockIdx.y) * d;
  uint16_t *to = kv + ((int64_t)blockIdx.y * a.n_blocks + block) * kv_block_halves(d);
  store_key_value(to, d, position - kv_block_start(a.n_sink, block), threadIdx.x, k[at + threadIdx.x],
                  v[at + threadIdx.x]);
}

struct run {
  backend be;
  device_attention a;
  device_layer layer;
  int32_t chunk;
};

int32_t open_run(run *r, const attention_shape &shape, int32_t page_bits, pyllm_error *err) {
  int32_t status = backend_open("cuda", 1, NULL, &r->be, err);
  if (status) return status;
  r->a = attention_of(shape, 2 + shape.n_ctx / PYLLM_PAGE);
  bool ok = attention_memory_new(&r->be, r->a, shape.n_batch);
  ok &= layer_memory_new(&r->be, r->a, r->layer);
  if (page_bits) ok &= layer_sketch_new(&r->be, r->a, r->layer, page_bits);
  r->a.paged = page_bits != 0;
  return ok ? PYLLM_OK : fail(err, PYLLM_ERR_MEMORY, "memory refused");
}

void store(run *r, int32_t position, int32_t n, const float *k, const float *v) {
  batch_place place = {position, n};
  size_t width = (size_t)r->a.n_kv_heads * (size_t)r->a.head_dim;
  r->be.ops->write(&r->be, r->a.place, &place, sizeof place);
  launch(queue_of(&r->be), store_kernel, dim3((unsigned)n, (unsigned)r->a.n_kv_heads), dim3((unsigned)r->a.head_dim), 0,
         r->a, r->layer.kv, k + (size_t)position * width, v + (size_t)position * width);
}

int32_t close_run(run *r, int32_t status, pyllm_error *err) {
  if (!status) status = r->be.ops->sync(&r->be, err);
  if (!r->be.ops) return status;
  attention_memory_free(&r->be, r->a);
  layer_memory_free(&r->be, r->a, r->layer);
  backend_close(&r->be);
  return status;
}
} // namespace

int32_t hook_cuda_attention(const hook_attention_shape *s, const pyllm_attention *attention, const float *q,
                            const float *k, const float *v, float *out, uint8_t *is_long, float *local_mass,
                            float *bulk_mass, pyllm_layer_stats *stats, pyllm_error *err) {
  run r = {};
  attention_shape shape = {s->chunk, s->n, s->n_heads, s->n_kv_heads, s->head_dim, s->n_sink, s->scale};
  int32_t status = open_run(&r, shape, attention->page_bits, err);
  device_policy policy = {attention->policy,    attention->granularity, attention->thresholds, attention->static_local,
                          attention->page_bits, attention->page_share,  attention->page_drop};
  r.a.n_window = attention->n_window;
  size_t width = (size_t)s->n_heads * (size_t)s->head_dim;
  for (int32_t t = 0; t < s->n && !status; t += s->chunk) {
    int32_t n = s->n - t < s->chunk ? s->n - t : s->chunk;
    queue *to = queue_of(&r.be);
    store(&r, t, n, k, v);
    r.a.q = q + (size_t)t * width;
    cuda_attend_local(to, r.a, r.layer, n);
    cuda_select_long(to, r.a, r.layer, policy, n);
    cuda_attend_bulk(to, r.a, r.layer, n);
    cuda_finish_rows(to, r.a, n, out + (size_t)t * width);
    size_t row = (size_t)t * (size_t)s->n_heads, rows = (size_t)n * (size_t)s->n_heads;
    r.be.ops->read(&r.be, is_long + row, r.a.is_long, rows);
    r.be.ops->read(&r.be, local_mass + row, r.a.local_mass, rows * sizeof(float));
    r.be.ops->read(&r.be, bulk_mass + row, r.a.bulk_mass, rows * sizeof(float));
  }
  if (!status) r.be.ops->read(&r.be, stats, r.layer.stats, sizeof *stats);
  return close_run(&r, status, err);
}

int32_t hook_cuda_moments(const float *k, int32_t n_pages, int32_t head_dim, float *mean, float *cov,
                          pyllm_error *err) {
  run r = {};
  int32_t status = open_run(&r, {PYLLM_PAGE, n_pages * PYLLM_PAGE, 1, 1, head_dim, 0, 1}, 0, err);
  r.a.n_window = 0;
  size_t d = (size_t)head_dim;
  for (int32_t p = 0; p < n_pages && !status; p++) {
    store(&r, p * PYLLM_PAGE, PYLLM_PAGE, k, k);
    /* The page's last token as a batch of its own, of which the page is the bulk. */
    batch_place place = {(p + 1) * PYLLM_PAGE - 1, 1};
    r.be.ops->write(&r.be, r.a.place, &place, sizeof place);
    cuda_fold_moments(queue_of(&r.be), r.a, r.layer);
    r.be.ops->read(&r.be, mean + (size_t)p * d, r.layer.mean, d * sizeof *mean);
    r.be.ops->read(&r.be, cov + (size_t)p * d * d, r.layer.m2, d * d * sizeof *cov);
    for (size_t i = 0; i < d * d; i++) cov[(size_t)p * d * d + i] /= (float)((p + 1) * PYLLM_PAGE);
  }
  return close_run(&r, status, err);
}
