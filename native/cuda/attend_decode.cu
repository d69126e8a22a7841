/* attend_local and attend_bulk for one query: see attend.cuh. Its lists have few rows and many spans, and what
 * limits it is how many bytes are under way. So a block takes a span: its warps share the keys among them, then the
 * dimensions of the values, whose loads are issued before the scores that weigh them are known. Spans are merged by
 * a second kernel.
 *
 * Bytes: the list's keys and values once per 8 rows of a group, 4 head_dim per key; per row 8 head_dim per span. */
#include "attend.cuh"

namespace {
enum { SPAN_TILES = 2 * STEP_TILES, SPAN_ROWS = 8 /* of the instruction's 16: hardly a model has more in a group */ };

/* Warps that share a span: so many that a lane's part of its keys, and then of its values, fits its registers. */
__host__ __device__ constexpr int32_t span_warps(int D) { return D > 128 ? 8 : 4; }

template <int D> struct span_shared {
  query_operands<D> queries;
  float2 scores[SPAN_TILES][WARP]; /* as the lanes of one warp would hold them */
};

/* One span of a list, for a panel of 8 rows. */
struct span_item {
  panel_list list;
  int32_t panel, span;
};

/* What another lane has found. */
__device__ panel_list list_of_lane(panel_list l, int32_t lane) {
  l.kv_head = __shfl_sync(ALL_LANES, l.kv_head, lane);
  l.n_rows = __shfl_sync(ALL_LANES, l.n_rows, lane);
  l.n_strips = __shfl_sync(ALL_LANES, l.n_strips, lane);
  l.rows = (const int32_t *)__shfl_sync(ALL_LANES, (unsigned long long)l.rows, lane);
  l.strips = (const int32_t *)__shfl_sync(ALL_LANES, (unsigned long long)l.strips, lane);
  return l;
}

/* The item-th one of all lists; false behind the last. Lanes ask a list each. */
__device__ bool find_item(const device_attention &a, enum attend_pass pass, int32_t n_lists, int32_t item,
                          span_item &found) {
  int32_t lane = threadIdx.x % WARP;
  for (int32_t first = 0; first < n_lists; first += WARP) {
    int32_t mine = first + lane < n_lists ? first + lane : n_lists - 1;
    panel_list l = list_of(a, pass, 0, head_of_row(a, mine, n_lists));
    int32_t n = first + lane < n_lists ? (l.n_rows + SPAN_ROWS - 1) / SPAN_ROWS * spans_of(l) : 0, end = n;
    for (int32_t delta = 1; delta < WARP; delta *= 2) {
      int32_t before = __shfl_up_sync(ALL_LANES, end, delta);
      end += lane < delta ? 0 : before;
    }
    uint32_t behind = __ballot_sync(ALL_LANES, item < end);
    int32_t owner = behind ? __ffs((int)behind) - 1 : WARP - 1;
    item -= __shfl_sync(ALL_LANES, behind ? end - n : end, owner);
    if (!behind) continue;
    found.list = list_of_lane(l, owner);
    /* Panels of one span next to each other: the second finds its keys and values in the cache. */
    int32_t n_panels = (found.list.n_rows + SPAN_ROWS - 1) / SPAN_ROWS;
    found.panel = item % n_panels, found.span = item / n_panels;
    return true;
  }
  return false;
}

/* The row of a panel that a lane has scores of; -1 where there is none. */
__device__ int32_t row_of_lane(const device_attention &a, enum attend_pass pass, const span_item &item) {
  int32_t i = item.panel * SPAN_ROWS + lane_group();
  bool known = i < item.list.n_rows && (pass != AUDIT || a.audited[0]);
  return known ? row_at(a, item.list, i) : -1;
}

/* A warp's part of the values: eights of dimensions, by turns. */
template <int D> constexpr int32_t WARP_EIGHTS = (D / 8 + span_warps(D) - 1) / span_warps(D);
template <int D> __device__ int32_t eight_of_warp(int32_t i) { return i * span_warps(D) + threadIdx.x / WARP; }
template <int D> __device__ bool has_eight(int32_t i) {
  return (i + 1) * span_warps(D) <= D / 8 || eight_of_warp<D>(i) < D / 8; /* what is known to be so costs no test */
}

/* A step of a span, four strips: how many keys may be seen of the lane's of the first two and of the last two, and
 * their values. */
template <int D> struct span_step {
  int32_t visible[2];
  uint4 values[WARP_EIGHTS<D>][2];
};

/* first: its first strip. */
template <int D>
__device__ void load_step(const device_attention &a, const head_blocks &blocks, const panel_list &l, int32_t first,
                          bool with_values, span_step<D> &step) {
#pragma unroll
  for (int32_t half = 0; half < 2; half++) {
    int32_t index = first + 2 * half + strip_of_lane(), strip = strip_within(l, index);
    step.visible[half] = index < l.n_strips ? strip_visible(a.n_sink, strip, a.now->position) : 0;
    const uint16_t *from = values_of<D>(blocks, strip);
#pragma unroll
    for (int32_t i = 0; i < WARP_EIGHTS<D>; i++)
      step.values[i][half] =
          with_values && has_eight<D>(i) ? load_values(from, eight_of_warp<D>(i)) : make_uint4(0, 0, 0, 0);
  }
}

/* What a lane has of a span: of its row, in two columns of the warp's eights. */
template <int D> struct span_part {
  float max, sum; /* sum: of the lane's own keys */
  float out[WARP_EIGHTS<D>][4];
};

/* Into a span one of its two steps, whose scores are shared. */
template <int D> __device__ void weigh_step(const float2 (*shared)[WARP], const span_step<D> &step, span_part<D> &to) {
  float scores[STEP_TILES][4] = {};
  uint32_t weights[4][4];
#pragma unroll
  for (int32_t t = 0; t < STEP_TILES; t++) {
    float2 x = shared[t][threadIdx.x % WARP];
    scores[t][0] = x.x, scores[t][1] = x.y;
  }
  float rescale = soften(scores, step.visible, 0, to.max, to.sum);
  pack_weights(scores, weights);
#pragma unroll
  for (int32_t i = 0; i < WARP_EIGHTS<D>; i++) {
    to.out[i][0] *= rescale, to.out[i][1] *= rescale;
#pragma unroll
    for (int32_t half = 0; half < 2; half++) multiply_values(weights, half, step.values[i][half], to.out[i]);
  }
}

/* Leaves a span for merge_kernel. */
template <int D>
__device__ void leave_span(const device_attention &a, int32_t row, int32_t span, bool with_values,
                           const span_part<D> &part) {
  float sum = sum_of_row(part.sum);
  if (row < 0) return;
  int64_t at = (int64_t)row * a.max_spans + span;
  if (threadIdx.x < WARP && lane_pair() == 0) a.span_state[at] = make_float2(part.max, sum);
#pragma unroll
  for (int32_t i = 0; i < WARP_EIGHTS<D>; i++) {
    float *out = a.span_out + at * D + 8 * eight_of_warp<D>(i) + 2 * lane_pair();
    if (with_values && has_eight<D>(i)) *(float2 *)out = make_float2(part.out[i][0], part.out[i][1]);
  }
}

/* One block. row: the lane's. Behind the list's end loads repeat its last strip rather than be left out: a register
 * that is loaded in some cases only is kept for what it held before. */
template <int D>
__device__ void fold_apart(const device_attention &a, const head_blocks &blocks, const span_item &item, int32_t row,
                           bool with_values, span_shared<D> &s) {
  constexpr int32_t TILES = SPAN_TILES / span_warps(D), PARTS = (D + 31) / 32;
  const panel_list &l = item.list;
  int32_t warp = threadIdx.x / WARP, first = item.span * SPAN, tile = warp * TILES;
  uint4 keys[PARTS][TILES];
  span_step<D> steps[2];
  float scores[TILES][4] = {};
  span_part<D> part = {NO_SCORE};
  const uint16_t *from = keys_of<D>(blocks, strip_within(l, first + tile / 4 * 2 + key_strip_of_lane()));
#pragma unroll
  for (int32_t p = 0; p < PARTS; p++)
#pragma unroll
    for (int32_t t = 0; t < TILES; t++) keys[p][t] = load_keys<D>(from, tile + t, p);
  load_queries<D, span_warps(D)>(a, lane_rows{{row, -1}, {}}, warp, s.queries);
  __syncthreads();
#pragma unroll
  for (int32_t p = 0; p < PARTS; p++) multiply_keys<D>(s.queries, p, keys[p], scores);
  for (int32_t i = 0; i < 2; i++) load_step<D>(a, blocks, l, first + 4 * i, with_values, steps[i]);
#pragma unroll
  for (int32_t t = 0; t < TILES; t++) s.scores[tile + t][threadIdx.x % WARP] = make_float2(scores[t][0], scores[t][1]);
  __syncthreads();
  weigh_step<D>(s.scores, steps[0], part);
  if (first + 4 < l.n_strips) weigh_step<D>(s.scores + STEP_TILES, steps[1], part);
  leave_span<D>(a, row, item.span, with_values, part);
}

/* Grid (x): blocks take the spans of all lists by turns, so that they share the work whichever list has it. */
template <int D>
__global__ void __launch_bounds__(WARP *span_warps(D), D > 128 ? 1 : 3)
    span_kernel(device_attention a, device_layer layer, enum attend_pass pass, int32_t n_lists) {
  span_shared<D> &s = block_shared<span_shared<D>>();
  span_item item;
  for (int32_t i = blockIdx.x; find_item(a, pass, n_lists, i, item); i += gridDim.x) {
    int32_t row = row_of_lane(a, pass, item);
    if (__any_sync(ALL_LANES, row >= 0)) /* or its query is not audited */
      fold_apart(a, head_blocks(a, layer, item.list.kv_head), item, row, !without_values(pass), s);
  }
}

enum { MERGE_THREADS = 256, MERGE_AT_ONCE = 64 };
static_assert((int)MERGE_THREADS >= (int)MAX_HEAD_DIM && MERGE_THREADS % MERGE_AT_ONCE == 0);

struct merge_shared {
  float keep[MERGE_THREADS], take[MERGE_THREADS], sum[MERGE_THREADS]; /* of so many spans */
  float warp_max[MERGE_THREADS / WARP];
};

/* What merging them in order makes of the next n spans, a thread each: their maxima do not depend on the order. before:
 * the maximum so far. */
__device__ void find_factors(const float2 *spans, int32_t n, float &before, merge_shared &s) {
  int32_t i = threadIdx.x, lane = i % WARP, warp = i / WARP;
  float2 span = i < n ? spans[i] : make_float2(NO_SCORE, 0);
  float max = span.y == 0 ? NO_SCORE : span.x, keep, take;
  for (int32_t delta = 1; delta < WARP; delta *= 2) {
    float x = __shfl_up_sync(ALL_LANES, max, delta);
    max = lane < delta ? max : fmaxf(max, x);
  }
  __syncthreads(); /* the factors of the spans before are used up */
  if (lane == WARP - 1) s.warp_max[warp] = max;
  __syncthreads();
  max = __shfl_up_sync(ALL_LANES, max, 1);
  max = lane == 0 ? before : fmaxf(before, max);
  for (int32_t w = 0; w < MERGE_THREADS / WARP; w++) {
    if (w < warp) max = fmaxf(max, s.warp_max[w]);
    before = fmaxf(before, s.warp_max[w]);
  }
  merge_states(make_float2(max, 0), span, keep, take);
  s.keep[i] = keep, s.take[i] = take, s.sum[i] = span.y;
  __syncthreads();
}

/* Merges the spans of a row in order. Grid (rows of a list, lists), one thread per dimension. What depends on the order
 * is one multiply-add per span: outputs come 64 at a time. Spans behind the last are nothing, merged like others. Reads
 * 4 head_dim + 8 bytes per span. */
template <int D>
__global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(device_attention a, enum attend_pass pass) {
  merge_shared &s = block_shared<merge_shared>();
  panel_list l = list_of(a, pass, 0, head_of_row(a, blockIdx.y, gridDim.y));
  int32_t i = threadIdx.x, n_spans = spans_of(l);
  if ((int32_t)blockIdx.x >= l.n_rows) return;
  int64_t row = row_at(a, l, blockIdx.x), at = row * a.max_spans;
  row_results to = results_of(a, pass, row);
  bool begins = pass != BULK, has_out = to.out && i < D;
  float2 state = begins ? make_float2(NO_SCORE, 0) : *to.state;
  float value = begins || !has_out ? 0 : to.out[i];
  for (int32_t first = 0; first < n_spans; first += MERGE_AT_ONCE) {
    const float *out = a.span_out + (at + first) * D + i;
    int32_t n = has_out ? n_spans - first : 0, part = first % MERGE_THREADS;
    float x[MERGE_AT_ONCE];
#pragma unroll
    for (int32_t k = 0; k < MERGE_AT_ONCE; k++) x[k] = k < n ? out[k * D] : 0;
    if (part == 0) find_factors(a.span_state + at + first, n_spans - first, state.x, s);
#pragma unroll
    for (int32_t k = 0; k < MERGE_AT_ONCE; k++) {
      float keep = s.keep[part + k], take = s.take[part + k];
      state.y = merge_values(state.y, s.sum[part + k], keep, take);
      value = merge_values(value, x[k], keep, take);
    }
  }
  if (has_out) to.out[i] = value;
  __syncthreads(); /* all have read the state */
  if (i != 0) return;
  *to.state = state;
  if (to.mass) *to.mass = mass_of(state);
}

/* Blocks that share the spans of all lists: enough to fill a GPU several times, few enough that those with nothing
 * to do cost little. */
enum { SPAN_BLOCKS = 1024 };

struct span_launch {
  queue *to;
  const device_attention &a;
  const device_layer &layer;
  enum attend_pass pass;

  template <int D> void run() const {
    int32_t group = a.n_heads / a.n_kv_heads, lists = (int32_t)most_lists(a, a.paged && pass == BULK, 1);
    int64_t items = (int64_t)lists * a.max_spans * ((group + SPAN_ROWS - 1) / SPAN_ROWS), most = SPAN_BLOCKS;
    launch(to, span_kernel<D>, dim3((unsigned)(items < most ? items : most)), dim3(WARP * span_warps(D)),
           sizeof(span_shared<D>), a, layer, pass, lists);
    launch(to, merge_kernel<D>, dim3((unsigned)group, (unsigned)lists), dim3(MERGE_THREADS), sizeof(merge_shared), a,
           pass);
  }
};
} // namespace

void cuda_attend_apart(queue *to, const device_attention &a, const device_layer &layer, enum attend_pass pass) {
  with_head_dim(a.head_dim, span_launch{to, a, layer, pass});
}
