/* The page tier's last step in decode: from the strips' masses to the list of those that are read, one block per
 * list. In prefill these are two kernels that share the work among more blocks (pages.cu); here what counts is to
 * start few. */
#include "pages.cuh"

namespace {
enum { PICK_THREADS = 1024, PICK_WARPS = PICK_THREADS / WARP, PICK_TURNS = 8, PICKED = PICK_THREADS * PICK_TURNS };
static_assert((int)PICK_WARPS == (int)PICKED_ROWS);

struct pick_shared {
  float top[PICK_WARPS], sum[PICK_WARPS];            /* of a row's part each */
  float row_top[PICK_WARPS], inverse[PICK_WARPS];    /* of a row */
  float wanted_above[PICK_WARPS];                    /* likewise: the mass above which it wants a strip */
  int32_t above[CUT_HALVINGS];                       /* 1: a row leaves out too much after so many halvings */
  int32_t before[PICK_TURNS * PICK_WARPS], n_picked; /* of 32 strips: how many are picked, then how many before them */
};

/* A list's scored rows and their strip masses. */
struct scored_list {
  const float *mass; /* (n_rows, stride) */
  int64_t stride;
  int32_t n_rows, n_strips, parts; /* parts: warps of a row; row r has warps r * parts on */
};

/* f(mass) of the strips of the warp's part of its row. */
template <class F> __device__ void each_mass(const scored_list &l, F f) {
  int32_t row = threadIdx.x / WARP / l.parts, part = threadIdx.x / WARP % l.parts;
  const float *mass = l.mass + row * l.stride;
#pragma unroll 8
  for (int32_t i = part * WARP + threadIdx.x % WARP; i < l.n_strips; i += l.parts * WARP) f(mass[i]);
}

/* row_top and inverse of every row: the masses' shares of all its attention. local_mass: the row's of this warp. */
__device__ void weigh_rows(const scored_list &l, float local_mass, pick_shared &s) {
  int32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = warp / l.parts;
  float top = local_mass, sum = 0;
  if (row < l.n_rows) each_mass(l, [&](float mass) { top = fmaxf(top, mass); });
  top = warp_max(top);
  if (row < l.n_rows) each_mass(l, [&](float mass) { sum += expf(mass - top); });
  sum = warp_sum(sum);
  if (lane == 0) s.top[warp] = top, s.sum[warp] = sum;
  __syncthreads();
  if (row >= l.n_rows || warp % l.parts) return;
  bool has_part = lane < l.parts;
  float of_row = warp_max(has_part ? s.top[warp + lane] : top);
  float all = warp_sum(has_part ? s.sum[warp + lane] * expf(s.top[warp + lane] - of_row) : 0);
  if (lane == 0) s.row_top[row] = of_row, s.inverse[row] = 1.0f / (all + expf(local_mass - of_row));
}

/* wanted_above of every row: the mass of the share above which a strip is read, the policy's, halved until what is left
 * out is at most page_drop. */
__device__ void cut_rows(const scored_list &l, const query_tile &tile, const device_policy &policy, pick_shared &s) {
  int32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = warp / l.parts;
  float cut = attention_cut(&tile, policy.page_share, policy.decode_share);
  for (int32_t i = 0; i < CUT_HALVINGS && policy.page_drop < 1; i++) {
    float dropped = 0;
    if (row < l.n_rows)
      each_mass(l, [&](float mass) {
        float share = share_of(mass, s.row_top[row], s.inverse[row]);
        dropped += share > cut ? 0 : share;
      });
    dropped = warp_sum(dropped);
    if (lane == 0) s.sum[warp] = dropped;
    __syncthreads();
    float of_row = warp_sum(row < l.n_rows && lane < l.parts ? s.sum[row * l.parts + lane] : 0);
    bool above = row < l.n_rows && !(of_row <= policy.page_drop);
    if (above && lane == 0) s.above[i] = 1;
    if (above) cut /= 2;
    __syncthreads();
    if (!s.above[i]) break;
  }
  if (row < l.n_rows && warp % l.parts == 0 && lane == 0)
    s.wanted_above[row] = mass_of_share(cut, s.row_top[row], s.inverse[row]);
}

/* Which of the strips that this thread has in `turns` turns are wanted by a row, bit by bit; first: the block's
 * first one. Not a number counts as wanted: the safe side. */
__device__ uint32_t picks_of(const scored_list &l, int32_t first, int32_t turns, const pick_shared &s) {
  uint32_t picks = 0;
  for (int32_t k = 0; k < turns; k++) {
    int32_t i = first + k * PICK_THREADS + threadIdx.x;
    bool wanted = false;
#pragma unroll 4
    for (int32_t r = 0; r < l.n_rows && i < l.n_strips; r++) wanted |= !(l.mass[r * l.stride + i] <= s.wanted_above[r]);
    picks |= (uint32_t)wanted << k;
  }
  return picks;
}

/* From numbers to how many are before each, and n_picked. One warp. */
__device__ void sum_up(pick_shared &s) {
  constexpr int32_t EACH = PICK_TURNS * PICK_WARPS / WARP;
  int32_t lane = threadIdx.x % WARP, all = 0;
  for (int32_t i = 0; i < EACH; i++) all += s.before[lane * EACH + i];
  int32_t end = all;
  for (int32_t delta = 1; delta < WARP; delta *= 2) {
    int32_t x = __shfl_up_sync(ALL_LANES, end, delta);
    end += lane < delta ? 0 : x;
  }
  if (lane == WARP - 1) s.n_picked = end;
  for (int32_t i = 0, at = end - all; i < EACH; i++) {
    int32_t n = s.before[lane * EACH + i];
    s.before[lane * EACH + i] = at;
    at += n;
  }
}

/* Puts the strips that a row wants in order; returns their number. wanted: (n_strips) 1 for these and 0 for others, or
 * NULL. */
__device__ int32_t pick_strips(const scored_list &l, int32_t *strips, uint8_t *wanted, pick_shared &s) {
  int32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, done = 0;
  for (int32_t first = 0; first < l.n_strips; first += PICKED) {
    int32_t left = (l.n_strips - first + PICK_THREADS - 1) / PICK_THREADS;
    uint32_t picks = picks_of(l, first, left < PICK_TURNS ? left : PICK_TURNS, s), votes[PICK_TURNS];
#pragma unroll
    for (int32_t k = 0; k < PICK_TURNS; k++) {
      votes[k] = __ballot_sync(ALL_LANES, picks >> k & 1);
      if (lane == 0) s.before[k * PICK_WARPS + warp] = __popc(votes[k]);
    }
    __syncthreads();
    if (warp == 0) sum_up(s);
    __syncthreads();
    for (int32_t k = 0, i = first + (int32_t)threadIdx.x; wanted && k < PICK_TURNS; k++, i += PICK_THREADS)
      if (i < l.n_strips) wanted[i] = picks >> k & 1;
#pragma unroll
    for (int32_t k = 0; k < PICK_TURNS; k++)
      if (picks >> k & 1)
        strips[done + s.before[k * PICK_WARPS + warp] + __popc(votes[k] & ((1u << lane) - 1))] =
            STRIPS_PER_PAGE + first + k * PICK_THREADS + (int32_t)threadIdx.x;
    done += s.n_picked;
    __syncthreads(); /* the numbers are used up */
  }
  return done;
}

/* Decode. Grid (n_kv_heads), a list each: what want_kernel and list_kernel do, with nothing in between. Reads the
 * masses of the list's rows, 4 bytes per strip and row, a few times, and writes 4 bytes per strip picked, with a
 * rest one more per strip. */
__global__ void __launch_bounds__(PICK_THREADS)
    pick_kernel(device_attention a, device_layer layer, device_policy policy) {
  pick_shared &s = block_shared<pick_shared>();
  query_tile tile = tile_at(a, 0);
  int32_t head = blockIdx.x * group_of(a);
  if (tile.n_pages == 0) return;
  list_counts read = a.counts[head];
  scored_list l = {strip_mass_at(a, head, 0), a.max_strips, read.n_scored, tile.n_pages * STRIPS_PER_PAGE, 1};
  if (l.n_rows) l.parts = PICK_WARPS / l.n_rows;
  int32_t row = threadIdx.x / WARP / l.parts;
  if (threadIdx.x < CUT_HALVINGS) s.above[threadIdx.x] = 0;
  weigh_rows(l, row < l.n_rows ? a.local_mass[a.scored_rows[head * SCORED_MOST + row]] : 0, s);
  __syncthreads();
  cut_rows(l, tile, policy, s);
  __syncthreads();
  int64_t at = (int64_t)head * a.max_strips;
  int32_t n_strips = pick_strips(l, a.strips + at, a.rest > 0 ? a.wanted + at : NULL, s);
  if (threadIdx.x != 0) return;
  a.counts[head].n_strips = n_strips;
  group_counts c = {(uint64_t)read.n_rows,           read.n_rows > 0,        0, 0,
                    (uint64_t)__popcll(read.scored), (uint64_t)read.n_scored};
  c.strips = c.queries * (uint64_t)n_strips;
  c.head_strips = c.rows * (uint64_t)n_strips;
  count_group(a, tile, c, policy.page_bits, layer.stats);
}

} // namespace

void cuda_pick_strips(queue *to, const device_attention &a, const device_layer &layer, const device_policy &policy) {
  launch(to, pick_kernel, dim3((unsigned)a.n_kv_heads), dim3(PICK_THREADS), sizeof(pick_shared), a, layer, policy);
}
