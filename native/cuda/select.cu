/* The head-selection kernel: who is long, and the bulk's work list. */
#include "attention.cuh"

namespace {
enum { SELECT_THREADS = PYLLM_PAGE }; /* one per query of a tile */

struct select_shared {
  int32_t long_heads[PYLLM_PAGE]; /* of the query */
  int32_t asks[PYLLM_PAGE];       /* 1 where its long heads score the sketch */
};

__device__ bool is_long_head(const device_attention &a, const device_policy &p, int64_t row, int32_t head) {
  bool local_label = p.static_local && p.static_local[head];
  return head_is_long(p.policy, local_label, p.thresholds ? p.thresholds[head] : 0, a.local_mass[row],
                      a.bulk_mass[row]);
}

/* is_long of a query's heads of one group; returns how many are. */
__device__ int32_t decide(const device_attention &a, const device_policy &p, int64_t query, int32_t kv_head,
                          bool bulk) {
  int32_t group = group_of(a), n = 0;
  int64_t row = query * a.n_heads + kv_head * group;
  for (int32_t i = 0; i < group; i++) {
    bool is_long = bulk && is_long_head(a, p, row + i, kv_head * group + i);
    a.is_long[row + i] = is_long;
    n += is_long;
  }
  if (p.granularity == PYLLM_HEAD || n == 0) return n;
  for (int32_t i = 0; i < group; i++) a.is_long[row + i] = 1;
  return group;
}

/* Writes a query's long rows behind those of the queries before it that `takes` has. */
__device__ void put_rows(const device_attention &a, const select_shared &s, const int32_t *takes, int64_t query,
                         int32_t kv_head, int32_t *rows) {
  int32_t at = 0, group = group_of(a);
  for (int32_t i = 0; i < (int32_t)threadIdx.x; i++) at += takes[i] ? s.long_heads[i] : 0;
  for (int32_t i = 0; i < group; i++) {
    int64_t row = query * a.n_heads + kv_head * group + i;
    if (a.is_long[row]) rows[at++] = (int32_t)row;
  }
}

/* The scored queries of geometry.h are asked which pages they want; where none of these has a long head, the
 * last query that has one. Returns their number; asks of this thread's query. */
__device__ void find_askers(const query_tile &tile, select_shared &s) {
  int32_t i = threadIdx.x, last = -1, any = 0, stride = attention_scored_stride(&tile);
  for (int32_t j = 0; j < tile.n; j++) {
    if (!s.long_heads[j]) continue;
    last = j;
    any |= (tile.n - 1 - j) % stride == 0;
  }
  s.asks[i] = i < tile.n && s.long_heads[i] && (any ? (tile.n - 1 - i) % stride == 0 : i == last);
}

/* Grid (n_kv_heads, tiles), a thread per query of the tile. Reads 8 bytes per row, writes 1 and the lists. */
__global__ void select_kernel(device_attention a, device_policy policy, pyllm_layer_stats *stats) {
  select_shared &s = block_shared<select_shared>();
  query_tile tile = tile_at(a, blockIdx.y);
  if (tile.n == 0) return;
  int32_t i = threadIdx.x, g = blockIdx.x, group = group_of(a), query = tile.first + i;
  int64_t slot = (int64_t)blockIdx.y * a.n_kv_heads + g;
  s.long_heads[i] = i < tile.n ? decide(a, policy, query, g, tile.n_pages > 0) : 0;
  __syncthreads();
  if (i < tile.n) put_rows(a, s, s.long_heads, query, g, a.rows + slot * PYLLM_PAGE * group);
  if (policy.page_bits) {
    find_askers(tile, s);
    __syncthreads();
    if (s.asks[i]) put_rows(a, s, s.asks, query, g, a.scored_rows + slot * SCORED_MOST * group);
    for (int32_t j = i; j < tile.n_pages * STRIPS_PER_PAGE; j += SELECT_THREADS) a.wanted[slot * a.max_strips + j] = 0;
  }
  if (i != 0) return;
  slot_counts c = {};
  for (int32_t j = 0; j < tile.n; j++) {
    c.n_rows += s.long_heads[j];
    c.n_queries += s.long_heads[j] > 0;
    if (!policy.page_bits || !s.asks[j]) continue;
    c.n_asked++;
    c.n_scored += s.long_heads[j];
  }
  c.n_strips = tile.n_pages * STRIPS_PER_PAGE;
  a.counts[slot] = c;
  if (!policy.page_bits) count_slot(a, tile, c, 0, stats);
}
} // namespace

void cuda_select_long(queue *to, const device_attention &a, const device_layer &layer, const device_policy &policy,
                      int32_t n) {
  if (policy.policy == PYLLM_ADAPTIVE) cuda_estimate_bulk_mass(to, a, layer, policy, n);
  if (policy.policy == PYLLM_ORACLE) cuda_true_bulk_mass(to, a, layer, n, false);
  launch(to, select_kernel, dim3((unsigned)a.n_kv_heads, (unsigned)most_tiles(n)), dim3(SELECT_THREADS),
         sizeof(select_shared), a, policy, layer.stats);
  if (policy.page_bits) cuda_select_pages(to, a, layer, policy, n);
}
