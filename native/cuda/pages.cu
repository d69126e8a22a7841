/* The page tier: which strips of the bulk the long heads of a list read, judged by a low-bit sketch of the bulk's
 * keys. Terms and rules: cpu/pages.c; the sketch's bytes: src/sketch.h, whose words of 4 channels by token are what
 * dp4a takes. */
#include "blocks.cuh"
#include "pages.cuh"
#include "rest.cuh"
#include <float.h>

namespace {
enum {
  FOLD_THREADS = 256,
  FOLD_WARPS = FOLD_THREADS / WARP,
  SCORE_WARPS = 4, /* a page each */
  FEW_ROWS = 4,    /* scored on one reading of a page's codes: of so many at most, */
  SCORE_ROWS = 8,  /* or of so many */
  WANT_THREADS = 256,
  LIST_THREADS = 256
};

/* Asks for what will be read of a line of the GPU's own memory. */
constexpr int32_t LINE_BYTES = 128;
__device__ void prefetch(const void *line) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#else
  (void)line;
#endif
}

/* A head's channel at a place of its sketch's order; order: (head_dim) or NULL. */
__device__ int32_t channel_at(const uint16_t *order, int32_t at) { return order ? order[at] : at; }

__device__ uint8_t *sketch_page(const device_attention &a, const device_layer &layer, int32_t page_bits, int32_t g,
                                int32_t page) {
  int64_t bytes = (int64_t)sketch_page_bytes(page_bits, a.head_dim);
  return layer.sketch.pages + ((int64_t)g * a.n_blocks + page) * bytes;
}

/* ---- sketching what left the window ---- */

struct fold_shared {
  float low[FOLD_WARPS][WARP], high[FOLD_WARPS][WARP];
  uint8_t codes[PYLLM_PAGE][SKETCH_CHANNELS];
};

/* The grade that has the place `at` of the order; of no bits where none has. */
__device__ sketch_grade grade_with(int32_t page_bits, int32_t d, int32_t at) {
  for (int32_t i = 0; i < SKETCH_GRADES; i++) {
    sketch_grade grade = sketch_grade_at(page_bits, d, i);
    if (at < grade.first + grade.n) return grade;
  }
  return {};
}

/* One page's codes of 32 channels: lane = channel, warp = 8 tokens. channel: the lane's of the keys, -1 where there is
 * none; bits, lo and step are the lane's too. */
__device__ void round_keys(const uint16_t *keys, int32_t d, int32_t channel, int32_t bits, uint16_t *lo, uint16_t *step,
                           fold_shared &s) {
  int32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  constexpr int32_t TOKENS = PYLLM_PAGE / FOLD_WARPS;
  float k[TOKENS], top = (float)((1 << bits) - 1);
  for (int32_t i = 0; i < TOKENS; i++)
    k[i] = channel < 0 ? 0 : half_to_float(keys[kv_key_at(d, warp * TOKENS + i, channel)]);
  float low = k[0], high = k[0];
  for (int32_t i = 1; i < TOKENS; i++) low = fminf(low, k[i]), high = fmaxf(high, k[i]);
  s.low[warp][lane] = low, s.high[warp][lane] = high;
  __syncthreads();
  for (int32_t w = 0; w < FOLD_WARPS; w++) low = fminf(low, s.low[w][lane]), high = fmaxf(high, s.high[w][lane]);
  uint16_t rounded = float_to_half((high - low) / top);
  float width = half_to_float(rounded);
  for (int32_t i = 0; i < TOKENS; i++) {
    float code = width > 0 ? rintf((k[i] - low) / width) : 0;
    s.codes[warp * TOKENS + i][lane] = (uint8_t)(code < top ? code : top);
  }
  if (warp == 0 && channel >= 0) *lo = float_to_half(low), *step = rounded;
  __syncthreads();
}

/* The bits [shift, shift + n_bits) of the codes of every 4th channel from `channel`, side by side in a byte. */
__device__ uint8_t pack_codes(const fold_shared &s, int32_t token, int32_t channel, int32_t shift, int32_t n_bits) {
  int32_t byte = 0, mask = (1 << n_bits) - 1;
  for (int32_t i = 0; i < 8 / n_bits; i++) byte |= (s.codes[token][channel + 4 * i] >> shift & mask) << (n_bits * i);
  return (uint8_t)byte;
}

/* Into a page's planes the 16 channels at `at` of the order, all of one grade; a thread has a byte of each plane, or
 * two. */
__device__ void pack_sixteen(const fold_shared &s, int32_t page_bits, int32_t d, int32_t at, uint8_t *page) {
  static_assert(FOLD_THREADS == STRIPS_PER_PAGE * 64, "a byte of 16 channels each");
  sketch_grade grade = grade_with(page_bits, d, at);
  int32_t strip = threadIdx.x / 64, byte = threadIdx.x % 64, token = PYLLM_READ_PAGE * strip + byte / 4;
  int32_t channel = at % SKETCH_CHANNELS + byte % 4, sixteen = (at - grade.first) / 16;
  uint8_t *low = page + grade.low + strip * sketch_low_bytes(grade.bits, grade.n) / STRIPS_PER_PAGE + byte;
  if (grade.bits == 4) {
    low[2 * sixteen * 64] = pack_codes(s, token, channel, 0, 4);
    low[(2 * sixteen + 1) * 64] = pack_codes(s, token, channel + 8, 0, 4);
  } else {
    low[sixteen * 64] = pack_codes(s, token, channel, 0, 2);
  }
  if (grade.bits == 3 && sixteen % 2 == 0) /* with the next 16, if any; their codes are 0 otherwise */
    page[grade.high + (strip * ((grade.n + 31) / 32) + sixteen / 2) * 64 + byte] = pack_codes(s, token, channel, 2, 1);
}

/* A channel's mean over a page, added up in the order of the tokens, as on the CPU. */
__device__ uint16_t mean_of_keys(const uint16_t *keys, int32_t d, int32_t channel) {
  float sum = 0;
  for (int32_t t = 0; t < PYLLM_PAGE; t++) sum += half_to_float(keys[kv_key_at(d, t, channel)]);
  return float_to_half(sum / PYLLM_PAGE);
}

/* The block's 32 places of the order: all of these have bits, or none has. */
__device__ void fold_channels(const device_attention &a, const device_layer &layer, int32_t page_bits,
                              const uint16_t *channels, int32_t page, int32_t end, fold_shared &s) {
  int32_t d = a.head_dim, g = blockIdx.y, first = blockIdx.x * SKETCH_CHANNELS;
  int32_t warp = threadIdx.x / WARP, at = first + threadIdx.x % WARP;
  int32_t channel = at < d ? channel_at(channels ? channels + (int64_t)g * d : NULL, at) : -1;
  int32_t bits = grade_with(page_bits, d, at < d ? at : first).bits;
  head_blocks blocks(a, layer, g);
  for (int32_t p = page + warp; bits == 0 && p < end; p += FOLD_WARPS)
    if (channel >= 0)
      ((uint16_t *)sketch_page(a, layer, page_bits, g, p))[at] = mean_of_keys(blocks.at(1 + p), d, channel);
  for (; bits > 0 && page < end; page++) {
    uint8_t *to = sketch_page(a, layer, page_bits, g, page);
    uint16_t *lo = (uint16_t *)to + at;
    round_keys(blocks.at(1 + page), d, channel, bits, lo, lo + d, s);
    for (int32_t i = first; i < first + SKETCH_CHANNELS && i < d; i += 16) pack_sixteen(s, page_bits, d, i, to);
    __syncthreads(); /* the codes are used up */
  }
}

/* Warps take a page each. queries: (n_kv_heads, head_dim). */
__device__ void fold_usual_values(const device_attention &a, const device_layer &layer, const float *queries,
                                  int32_t page, int32_t end) {
  int32_t g = blockIdx.y;
  head_blocks blocks(a, layer, g);
  for (int32_t p = page + threadIdx.x / WARP; p < end; p += FOLD_WARPS)
    make_usual_value(a, blocks.at(1 + p), queries + (int64_t)g * a.head_dim, usual_value(a, layer, g, p));
}

/* Grid (channel_parts, or of a graded sketch sketch_parts, n_kv_heads). Reads a page's keys, of a graded one twice
 * and its values, and writes its sketch once. */
__global__ void fold_kernel(device_attention a, device_layer layer, device_policy policy) {
  fold_shared &s = block_shared<fold_shared>();
  int32_t *folded = layer.sketch.folded + blockIdx.y * sketch_parts(a.head_dim) + blockIdx.x;
  int32_t page = *folded, end = bulk_pages(a.n_sink, a.n_window, a.now->position + a.now->n - 1);
  __syncthreads(); /* all have read the count */
  if ((int32_t)blockIdx.x < channel_parts(a.head_dim))
    fold_channels(a, layer, policy.page_bits, policy.channels, page, end, s);
  else fold_usual_values(a, layer, policy.query_means, page, end);
  if (threadIdx.x == 0 && page < end) *folded = end;
}

/* ---- scoring ---- */

/* Queries against a page's channels, in the order of its sketch: q * step rounded to 8 bits, their unit, and the
 * part that lo gives. */
template <int ROWS> struct alignas(16) page_queries {
  int8_t weight[ROWS][MAX_HEAD_DIM];
  float unit[ROWS], base[ROWS];
};
template <int ROWS> struct score_shared {
  page_queries<ROWS> warps[SCORE_WARPS];
  float q[ROWS][MAX_HEAD_DIM]; /* scaled, in that order */
};

/* The whole block: ROWS queries, those behind the n_rows as zeros. order: (head_dim) or NULL. */
template <int ROWS>
__device__ void order_queries(const device_attention &a, const uint16_t *order, const int32_t *rows, int32_t n_rows,
                              score_shared<ROWS> &s) {
  int32_t d = a.head_dim;
  __syncthreads(); /* those before are used up */
  for (int32_t i = threadIdx.x; i < d; i += WARP * SCORE_WARPS) {
    int32_t channel = channel_at(order, i);
#pragma unroll
    for (int32_t r = 0; r < ROWS; r++) s.q[r][i] = r < n_rows ? a.q[(int64_t)rows[r] * d + channel] * a.scale : 0;
  }
  __syncthreads();
}

/* One warp; n: channels with bits. */
template <int ROWS>
__device__ void weigh(const float (&q)[ROWS][MAX_HEAD_DIM], const uint8_t *page, int32_t d, int32_t n,
                      page_queries<ROWS> &to) {
  const uint16_t *lo = (const uint16_t *)page, *step = lo + d;
  int32_t lane = threadIdx.x % WARP;
  float top[ROWS] = {}, base[ROWS] = {}, inverse[ROWS];
  for (int32_t i = lane; i < d; i += WARP) {
    float low = half_to_float(lo[i]), width = i < n ? half_to_float(step[i]) : 0;
#pragma unroll
    for (int32_t r = 0; r < ROWS; r++) {
      if (i < n) top[r] = fmaxf(top[r], fabsf(q[r][i] * width));
      base[r] += q[r][i] * low;
    }
  }
#pragma unroll
  for (int32_t r = 0; r < ROWS; r++) {
    float unit = warp_max(top[r]) / 127.0f;
    inverse[r] = unit >= FLT_MIN ? 1.0f / unit : 0.0f;
    base[r] = warp_sum(base[r]);
    if (lane == 0) to.unit[r] = unit, to.base[r] = base[r];
  }
  for (int32_t i = lane; i < n; i += WARP) {
    float width = half_to_float(step[i]);
#pragma unroll
    for (int32_t r = 0; r < ROWS; r++) to.weight[r][i] = (int8_t)__float2int_rn(q[r][i] * width * inverse[r]);
  }
  __syncwarp();
}

/* Channels 4 i to 4 i + 3 of the m-th sixteen of the lane's token, in bytes. low, high: the token's words of the
 * planes, 16 words from one row of them to the next. */
template <int BITS> __device__ uint32_t codes_at(const uint32_t *low, const uint32_t *high, int32_t m, int32_t i) {
  if (BITS == 4) return low[(2 * m + i / 2) * 16] >> (i % 2 * 4) & 0x0f0f0f0fu;
  uint32_t codes = low[m * 16] >> (2 * i) & 0x03030303u;
  return BITS == 3 ? codes | (high[m / 2 * 16] >> (m % 2 * 4 + i) & 0x01010101u) << 2 : codes;
}

/* Adds to the sums of code * weight what one grade's channels give, of the lane's token of a strip. */
template <int BITS, int ROWS>
__device__ void multiply_codes(const uint8_t *page, const sketch_grade &grade, int32_t strip,
                               const page_queries<ROWS> &q, int (&sum)[ROWS]) {
  int32_t token = threadIdx.x % PYLLM_READ_PAGE;
  int32_t low_bytes = (int32_t)sketch_low_bytes(BITS, grade.n) / STRIPS_PER_PAGE;
  int32_t high_bytes = (int32_t)sketch_high_bytes(BITS, grade.n) / STRIPS_PER_PAGE;
  const uint32_t *low = (const uint32_t *)(page + grade.low + strip * low_bytes) + token;
  const uint32_t *high = (const uint32_t *)(page + grade.high + strip * high_bytes) + token;
#pragma unroll 4
  for (int32_t m = 0; m < grade.n / 16; m++) {
    int code[4];
#pragma unroll
    for (int32_t i = 0; i < 4; i++) code[i] = (int)codes_at<BITS>(low, high, m, i);
#pragma unroll
    for (int32_t r = 0; r < ROWS; r++) {
      int4 w = *(const int4 *)&q.weight[r][grade.first + 16 * m];
      sum[r] = __dp4a(code[3], w.w, __dp4a(code[2], w.z, __dp4a(code[1], w.y, __dp4a(code[0], w.x, sum[r]))));
    }
  }
}

/* logsumexp over 16 neighbouring lanes; NaN where one is. */
__device__ float strip_mass(float score) {
  float top = score;
  for (int32_t bits = PYLLM_READ_PAGE / 2; bits; bits /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, bits));
  float sum = expf(score - top);
  for (int32_t bits = PYLLM_READ_PAGE / 2; bits; bits /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, bits);
  return top + logf(sum);
}

/* One warp: strip masses of n_rows <= ROWS for one page. mass: (rows, max_strips), at the page's first strip. */
template <int PAGE_BITS, int ROWS>
__device__ void score_page(const device_attention &a, const uint8_t *page, int32_t n_rows,
                           const float (&queries)[ROWS][MAX_HEAD_DIM], page_queries<ROWS> &q, float *mass) {
  int32_t d = a.head_dim, lane = threadIdx.x % WARP;
  for (size_t i = lane * LINE_BYTES; i < sketch_page_bytes(PAGE_BITS, d); i += WARP * LINE_BYTES) prefetch(page + i);
  weigh(queries, page, d, sketch_channels(PAGE_BITS, d), q);
  for (int32_t half = 0; half < 2; half++) {
    int32_t strip = 2 * half + lane / PYLLM_READ_PAGE, sum[ROWS] = {};
    multiply_codes<PAGE_BITS == PYLLM_GRADED ? 4 : PAGE_BITS>(page, sketch_grade_at(PAGE_BITS, d, 0), strip, q, sum);
    if (PAGE_BITS == PYLLM_GRADED) multiply_codes<2>(page, sketch_grade_at(PAGE_BITS, d, 1), strip, q, sum);
#pragma unroll
    for (int32_t r = 0; r < ROWS; r++) {
      float x = strip_mass(q.base[r] + q.unit[r] * (float)sum[r]);
      if (lane % PYLLM_READ_PAGE == 0 && r < n_rows) mass[(int64_t)r * a.max_strips + strip] = x;
    }
  }
  __syncwarp(); /* the weights are used up */
}

/* Rows scored for the list of tile t that begins with this head; 0 where none does. */
__device__ int32_t scored_rows_of(const device_attention &a, const query_tile &tile, int32_t t, int32_t head) {
  if (tile.n_pages == 0 || head % sharing_of(a, tile)) return 0;
  return a.counts[(int64_t)t * a.n_heads + head].n_scored;
}

/* Of tile t. Grid (x, its lists at most): warps take pages by turns. Reads each page's sketch once per ROWS rows, in
 * decode mostly once. channels: (n_kv_heads, head_dim) of a graded sketch. */
template <int PAGE_BITS, int ROWS>
__global__ void __launch_bounds__(WARP *SCORE_WARPS)
    score_kernel(device_attention a, device_layer layer, const uint16_t *channels, int32_t t) {
  score_shared<ROWS> &s = block_shared<score_shared<ROWS>>();
  query_tile tile = tile_at(a, t);
  int32_t head = head_of_row(a, blockIdx.y, gridDim.y), g = head / group_of(a), warp = threadIdx.x / WARP;
  int32_t n_rows = scored_rows_of(a, tile, t, head), first = blockIdx.x * SCORE_WARPS;
  const int32_t *rows = a.scored_rows + ((int64_t)t * a.n_heads + head) * SCORED_MOST;
  const uint16_t *order = PAGE_BITS == PYLLM_GRADED ? channels + (int64_t)g * a.head_dim : NULL;
  for (int32_t r = 0; r < n_rows && first < tile.n_pages; r += ROWS) {
    int32_t n = n_rows - r < ROWS ? n_rows - r : ROWS;
    order_queries(a, order, rows + r, n, s);
    for (int32_t page = first + warp; page < tile.n_pages; page += gridDim.x * SCORE_WARPS)
      score_page<PAGE_BITS>(a, sketch_page(a, layer, PAGE_BITS, g, page), n, s.q, s.warps[warp],
                            strip_mass_at(a, head, r) + page * STRIPS_PER_PAGE);
  }
}

/* ---- wanting ---- */

struct want_shared {
  float partial[WARP];
};

/* Shares of all attention that the strips of a row have: e^(mass - top) * inverse. */
struct row_shares {
  const float *mass; /* (n) */
  int32_t n;
  float top, inverse;
};

/* The whole block. */
__device__ row_shares shares_of_row(const float *mass, int32_t n, float local_mass, float *partial) {
  float top = local_mass, sum = 0;
  for (int32_t s = threadIdx.x; s < n; s += WANT_THREADS) top = fmaxf(top, mass[s]);
  top = block_max(top, partial);
  for (int32_t s = threadIdx.x; s < n; s += WANT_THREADS) sum += expf(mass[s] - top);
  return {mass, n, top, 1.0f / (block_sum(sum, partial) + expf(local_mass - top))};
}

/* The share above which a strip is read: `cut`, halved until what is left out is at most page_drop. */
__device__ float cut_share(float cut, float page_drop, const row_shares &row, float *partial) {
  for (int32_t i = 0; i < CUT_HALVINGS && page_drop < 1; i++, cut /= 2) {
    float dropped = 0;
    for (int32_t s = threadIdx.x; s < row.n; s += WANT_THREADS) {
      float share = share_of(row.mass[s], row.top, row.inverse);
      dropped += share > cut ? 0 : share;
    }
    if (block_sum(dropped, partial) <= page_drop) break;
  }
  return cut;
}

/* Marks the strips that a row wants, by their masses. */
__device__ void want_of_row(const device_policy &policy, const query_tile &tile, const float *mass, float local_mass,
                            uint8_t *wanted, float *partial) {
  row_shares row = shares_of_row(mass, tile.n_pages * STRIPS_PER_PAGE, local_mass, partial);
  float cut = cut_share(attention_cut(&tile, policy.page_share, policy.decode_share), policy.page_drop, row, partial);
  float above = mass_of_share(cut, row.top, row.inverse);
  /* Not a number counts as wanted: the safe side. */
  for (int32_t s = threadIdx.x; s < row.n; s += WANT_THREADS)
    if (!(mass[s] <= above)) wanted[s] = 1;
}

/* Of tile t. Grid (x, its lists at most): blocks take a list's scored rows by turns, and write the same 1. */
__global__ void __launch_bounds__(WANT_THREADS) want_kernel(device_attention a, device_policy policy, int32_t t) {
  float *partial = block_shared<want_shared>().partial;
  query_tile tile = tile_at(a, t);
  int32_t head = head_of_row(a, blockIdx.y, gridDim.y);
  int64_t list = (int64_t)t * a.n_heads + head;
  for (int32_t r = blockIdx.x; r < scored_rows_of(a, tile, t, head); r += gridDim.x)
    want_of_row(policy, tile, strip_mass_at(a, head, r), a.local_mass[a.scored_rows[list * SCORED_MOST + r]],
                a.wanted + list * a.max_strips, partial);
}

/* ---- listing ---- */

struct list_shared {
  int32_t warp_count[LIST_THREADS / WARP];
  float partial[WARP];
};

/* Puts the wanted ones of n strips in order; returns their number. */
__device__ int32_t put_strips(const uint8_t *wanted, int32_t n, int32_t *strips, int32_t *warp_count) {
  int32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, done = 0;
  for (int32_t first = 0; first < n; first += LIST_THREADS) {
    int32_t s = first + threadIdx.x, before = 0, all = 0;
    bool takes = s < n && wanted[s];
    uint32_t votes = __ballot_sync(ALL_LANES, takes);
    if (lane == 0) warp_count[warp] = __popc(votes);
    __syncthreads();
    for (int32_t w = 0; w < LIST_THREADS / WARP; w++) {
      before += w < warp ? warp_count[w] : 0;
      all += warp_count[w];
    }
    if (takes) strips[done + before + __popc(votes & ((1u << lane) - 1))] = STRIPS_PER_PAGE + s;
    done += all;
    __syncthreads();
  }
  return done;
}

/* Strips that a query of the block's group reads, whose long heads are is_long (group): of any of their lists, of which
 * the first is at `list`. */
__device__ uint64_t strips_of_query(const device_attention &a, const query_tile &tile, int64_t list,
                                    const uint8_t *is_long, float *partial) {
  if (sharing_of(a, tile) == group_of(a)) return (uint64_t)a.counts[list].n_strips;
  float n = 0; /* exact */
  for (int32_t s = threadIdx.x; s < tile.n_pages * STRIPS_PER_PAGE; s += LIST_THREADS) {
    int32_t any = 0;
    for (int32_t h = 0; h < group_of(a); h++) any |= is_long[h] & a.wanted[(list + h) * a.max_strips + s];
    n += (float)any;
  }
  return (uint64_t)block_sum(n, partial);
}

/* What the queries of the block's group read; the group's first list is at `list`. */
__device__ group_counts count_reads(const device_attention &a, const query_tile &tile, int64_t list, float *partial) {
  int32_t group = group_of(a), first = blockIdx.x * group, sharing = sharing_of(a, tile);
  group_counts c = {};
  const uint8_t *before = NULL; /* of the last query that has long heads: most have the same */
  uint64_t n_strips = 0, asked = 0;
  for (int32_t i = tile.first; i < tile.first + tile.n; i++) {
    const uint8_t *is_long = a.is_long + (int64_t)i * a.n_heads + first;
    bool any = false, same = before != NULL;
    for (int32_t h = 0; h < group; h++) any |= is_long[h], same &= before && before[h] == is_long[h];
    if (!any) continue;
    if (!same) n_strips = strips_of_query(a, tile, list, is_long, partial);
    before = is_long;
    c.queries++;
    c.strips += n_strips;
  }
  for (int32_t h = 0; h < group; h += sharing) {
    const list_counts &read = a.counts[list + h];
    c.rows += (uint64_t)read.n_rows;
    c.head_strips += (uint64_t)read.n_rows * (uint64_t)read.n_strips;
    c.scored += (uint64_t)read.n_scored;
    asked |= read.scored;
  }
  c.asked = (uint64_t)__popcll(asked);
  return c;
}

/* Grid (n_kv_heads, tiles): the lists' wanted strips in order, and the statistics. Reads a byte and writes up to 4 per
 * strip of the bulk and list, and reads them again for every other set of long heads among its queries. */
__global__ void __launch_bounds__(LIST_THREADS) list_kernel(device_attention a, device_layer layer, int32_t page_bits) {
  list_shared &s = block_shared<list_shared>();
  query_tile tile = tile_at(a, blockIdx.y);
  if (tile.n_pages == 0) return;
  int32_t group = group_of(a), sharing = sharing_of(a, tile), n = tile.n_pages * STRIPS_PER_PAGE;
  int64_t list = (int64_t)blockIdx.y * a.n_heads + blockIdx.x * group;
  for (int32_t h = 0; h < group; h += sharing) {
    int64_t at = (list + h) * a.max_strips;
    int32_t n_strips = put_strips(a.wanted + at, n, a.strips + at, s.warp_count);
    if (threadIdx.x == 0) a.counts[list + h].n_strips = n_strips;
  }
  __syncthreads(); /* all see the counts */
  group_counts c = count_reads(a, tile, list, s.partial);
  if (threadIdx.x == 0) count_group(a, tile, c, page_bits, layer.stats);
}

enum { SCORE_BLOCKS = 256 }; /* per list, at most */

struct score_launch {
  queue *to;
  const device_attention &a;
  const device_layer &layer;
  const uint16_t *channels;
  int32_t tile;
  unsigned lists;

  template <int PAGE_BITS, int ROWS> void run() const {
    int32_t blocks = (a.max_strips / STRIPS_PER_PAGE + SCORE_WARPS - 1) / SCORE_WARPS;
    dim3 grid((unsigned)(blocks < SCORE_BLOCKS ? blocks : SCORE_BLOCKS), lists);
    launch(to, score_kernel<PAGE_BITS, ROWS>, grid, dim3(WARP * SCORE_WARPS), sizeof(score_shared<ROWS>), a, layer,
           channels, tile);
  }
  template <int PAGE_BITS> void of(bool few) const { few ? run<PAGE_BITS, FEW_ROWS>() : run<PAGE_BITS, SCORE_ROWS>(); }
};

void score(const score_launch &job, int32_t page_bits, bool few) {
  switch (page_bits) {
  case PYLLM_GRADED: return job.of<PYLLM_GRADED>(few);
  case 2: return job.of<2>(few);
  case 3: return job.of<3>(few);
  default: return job.of<4>(few);
  }
}
} // namespace

void cuda_select_pages(queue *to, const device_attention &a, const device_layer &layer, const device_policy &policy,
                       int32_t n) {
  int32_t page_bits = policy.page_bits;
  int32_t parts = page_bits == PYLLM_GRADED ? sketch_parts(a.head_dim) : channel_parts(a.head_dim);
  int32_t group = a.n_heads / a.n_kv_heads;
  unsigned heads = (unsigned)a.n_kv_heads, lists = (unsigned)most_lists(a, true, n);
  unsigned rows = (unsigned)(n == 1 ? group : SCORED_MOST); /* taken at once */
  launch(to, fold_kernel, dim3((unsigned)parts, heads), dim3(FOLD_THREADS), sizeof(fold_shared), a, layer, policy);
  bool picks = picks_at_once(a, n);
  for (int32_t t = 0; t < most_tiles(n); t++) { /* one by one: the masses of one tile's rows are kept */
    score({to, a, layer, policy.channels, t, lists}, page_bits, n * group <= FEW_ROWS);
    if (!picks) launch(to, want_kernel, dim3(rows, lists), dim3(WANT_THREADS), sizeof(want_shared), a, policy, t);
  }
  if (picks) cuda_pick_strips(to, a, layer, policy);
  else
    launch(to, list_kernel, dim3(heads, (unsigned)most_tiles(n)), dim3(LIST_THREADS), sizeof(list_shared), a, layer,
           page_bits);
  if (n == 1 && a.rest > 0) cuda_rest(to, a, layer);
}
