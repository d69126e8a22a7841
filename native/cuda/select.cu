/* The head-selection kernel: who is long, and the bulk's work list. */
#include "attention.cuh"

namespace {
enum {
  SELECT_THREADS = PYLLM_PAGE, /* one per query of a tile */
  DECIDED_AT_ONCE = 8
};

struct select_shared {
  int32_t long_heads[PYLLM_PAGE]; /* of the query, among those of the list */
  int32_t asks[PYLLM_PAGE];       /* 1 where these score the sketch */
};

__device__ bool is_long_head(const device_attention &a, const device_policy &p, int64_t row, int32_t head) {
  bool local_label = p.static_local && p.static_local[head];
  return head_is_long(p.policy, local_label, p.thresholds ? p.thresholds[head] : 0, a.local_mass[row],
                      a.bulk_mass[row]);
}

/* Fills is_long of a query's heads of one group, which begins with `first`; returns how many are. */
__device__ int32_t decide(const device_attention &a, const device_policy &p, int64_t query, int32_t first, bool bulk) {
  int32_t group = group_of(a), n = 0;
  int64_t row = query * a.n_heads + first;
  for (int32_t i = 0; i < group; i += DECIDED_AT_ONCE) { /* loads of all, then stores: none waits for another */
    bool is_long[DECIDED_AT_ONCE];
#pragma unroll
    for (int32_t k = 0; k < DECIDED_AT_ONCE; k++)
      is_long[k] = bulk && i + k < group && is_long_head(a, p, row + i + k, first + i + k);
#pragma unroll
    for (int32_t k = 0; k < DECIDED_AT_ONCE; k++) {
      if (i + k < group) a.is_long[row + i + k] = is_long[k];
      n += is_long[k];
    }
  }
  if (p.granularity == PYLLM_HEAD || n == 0) return n;
  for (int32_t i = 0; i < group; i++) a.is_long[row + i] = 1;
  return group;
}

/* Writes a query's long rows of n heads behind those of the queries before it that `takes` has. */
__device__ void put_rows(const device_attention &a, const select_shared &s, const int32_t *takes, int64_t query,
                         int32_t first, int32_t n, int32_t *rows) {
  int32_t at = 0;
  for (int32_t i = 0; i < (int32_t)threadIdx.x; i++) at += takes[i] ? s.long_heads[i] : 0;
  for (int32_t i = 0; i < n; i++) {
    int64_t row = query * a.n_heads + first + i;
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

/* The list of n heads of the tile, after is_long is decided. */
__device__ void put_list(const device_attention &a, const query_tile &tile, int32_t first, int32_t n,
                         select_shared &s) {
  int32_t i = threadIdx.x, query = tile.first + i;
  int64_t list = (int64_t)blockIdx.y * a.n_heads + first;
  s.long_heads[i] = 0;
  for (int32_t h = 0; h < n && i < tile.n; h++) s.long_heads[i] += a.is_long[(int64_t)query * a.n_heads + first + h];
  __syncthreads();
  if (i < tile.n) put_rows(a, s, s.long_heads, query, first, n, a.rows + list * PYLLM_PAGE);
  if (a.paged) {
    find_askers(tile, s);
    __syncthreads();
    if (s.asks[i]) put_rows(a, s, s.asks, query, first, n, a.scored_rows + list * SCORED_MOST);
    if (!picks_at_once(a, a.now->n))
      for (int32_t j = i; j < tile.n_pages * STRIPS_PER_PAGE; j += SELECT_THREADS)
        a.wanted[list * a.max_strips + j] = 0;
  }
  if (i == 0) {
    list_counts c = {};
    c.n_strips = tile.n_pages * STRIPS_PER_PAGE;
    for (int32_t j = 0; j < tile.n; j++) {
      c.n_rows += s.long_heads[j];
      if (!a.paged || !s.asks[j]) continue;
      c.n_scored += s.long_heads[j];
      c.scored |= 1ull << j;
    }
    a.counts[list] = c;
  }
  __syncthreads(); /* the next list writes over what was shared */
}

/* Grid (n_kv_heads, tiles), a thread per query of the tile. Reads 8 bytes per row, writes 1 and the lists. */
__global__ void select_kernel(device_attention a, device_policy policy, pyllm_layer_stats *stats) {
  select_shared &s = block_shared<select_shared>();
  query_tile tile = tile_at(a, blockIdx.y);
  if (tile.n == 0) return;
  int32_t i = threadIdx.x, group = group_of(a), first = blockIdx.x * group, sharing = sharing_of(a, tile);
  if (i < tile.n) decide(a, policy, tile.first + i, first, tile.n_pages > 0);
  for (int32_t h = first; h < first + group; h += sharing) put_list(a, tile, h, sharing, s);
  if (i != 0 || a.paged) return;
  group_counts c = {};
  const list_counts &read = a.counts[(int64_t)blockIdx.y * a.n_heads + first];
  c.rows = (uint64_t)read.n_rows;
  for (int32_t j = 0; j < tile.n; j++) c.queries += s.long_heads[j] > 0;
  c.strips = c.queries * (uint64_t)read.n_strips;
  c.head_strips = c.rows * (uint64_t)read.n_strips;
  count_group(a, tile, c, 0, stats);
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
