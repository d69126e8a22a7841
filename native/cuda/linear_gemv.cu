/* A few tokens against matrices. Reads every weight once. A block of warps shares one tile of 16 rows and splits its
 * columns, so that also small matrices fill the GPU: a warp takes 256 columns at once, a lane 4 rows of 32 of them,
 * so that it has 64 bytes or more under way and needs their scales once. Lane l has rows 4 (l % 4) to 4 (l % 4) + 3. */
#include "linear.cuh"
#include "weights.cuh"

namespace {
enum { LANE_ROWS = 4, WARP_GROUPS = 8 };

/* Warps of a block. Fewer where there are tiles enough for all processors: less is spent on beginning and adding up. */
enum { WARPS = 8, FEW_WARPS = 4, MANY_TILES = 512 };

template <int TOKENS, int N_WARPS> struct gemv_shared {
  float partial[N_WARPS][TOKENS][TILE_ROWS];
};

/* One lane's results. Every loop over them is unrolled: they live in registers. */
template <int TOKENS> using sums = float[TOKENS][LANE_ROWS];

/* d += a b, by bytes: a unsigned, b signed. */
__device__ inline int dot_bytes(uint32_t a, uint32_t b, int sum) {
#ifdef __CUDACC__
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
#else
  for (int i = 0; i < 32; i += 8) sum += (int)(a >> i & 255) * (int8_t)(b >> i);
#endif
  return sum;
}

__device__ inline uint32_t component(const uint4 &x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

/* The block's warps and lanes have summed their columns: adds them up and writes the rows of tile `tile`. */
template <int TOKENS, int N_WARPS>
__device__ void finish_tile(const matrix &w, const float *bias, bool add, float *out, int32_t tile, int32_t token,
                            int32_t n, const sums<TOKENS> &sum) {
  auto &s = block_shared<gemv_shared<TOKENS, N_WARPS>>();
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int t = 0; t < TOKENS; t++)
#pragma unroll
    for (int r = 0; r < LANE_ROWS; r++) {
      float x = sum[t][r];
      for (int bits = 4; bits < WARP; bits *= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
      if (lane < 4) s.partial[warp][t][4 * lane + r] = x;
    }
  __syncthreads();
  int32_t t = threadIdx.x / TILE_ROWS, row = tile * TILE_ROWS + threadIdx.x % TILE_ROWS;
  if (t >= n || row >= w.rows) return;
  float x = 0;
  for (int i = 0; i < N_WARPS; i++) x += s.partial[i][t][threadIdx.x % TILE_ROWS];
  put(w, bias, add, out, token + t, row, x);
}

/* A lane's weights of a group of 32 columns: 4 neighbouring rows of every word of it. */
template <class Q> struct group_weights {
  static constexpr int LOW = Q::NIBBLES ? 4 : 8, HIGH = Q::HIGH_WORDS;
  uint4 low[LOW], high[HIGH ? HIGH : 1]; /* low: by fours of columns; high: what is above the nibbles */
  packed_scales<Q> scales;

  /* Of group g of a tile whose words begin at `words`. */
  __device__ static group_weights load(const unsigned char *tile, const unsigned char *words, int32_t g, int row) {
    group_weights out;
    const uint4 *at = (const uint4 *)(words + (int64_t)g * Q::GROUP_BYTES) + row / 4;
#pragma unroll
    for (int i = 0; i < LOW; i++) out.low[i] = __ldg(at + i * TILE_ROWS / 4);
#pragma unroll
    for (int i = 0; i < HIGH; i++) out.high[i] = __ldg(at + (LOW + i) * TILE_ROWS / 4);
    out.scales = packed_scales<Q>::load(tile, g, row);
    return out;
  }
};

/* The bytes of the i-th four of columns, i < 8, of row r of the lane's. */
template <class Q> __device__ inline uint32_t four_bytes(const group_weights<Q> &w, int i, int r) {
  if (!Q::NIBBLES) return component(w.low[i], r);
  uint32_t low = component(w.low[i % 4], r) >> i / 4 * 4 & 0x0f0f0f0f;
  if (Q::HIGH_WORDS == 0) return low;
  return low | above_nibble<Q>(component(w.high[i / Q::FOURS_PER_HIGH], r), i);
}

/* A token's activations of a group; 16-bit values as two planes of 8. */
struct group_input {
  uint4 planes[4]; /* of two fours of columns each: their high bytes and their low ones, twice */
  float scale, product[2];
  int32_t sum[2];
};

template <class Q> __device__ inline group_input load_input(const quantized &x, int64_t group) {
  group_input in;
#pragma unroll
  for (int i = 0; i < 4; i++) in.planes[i] = __ldg((const uint4 *)x.planes + group * 4 + i);
  int2 sum = __ldg((const int2 *)x.sum + group);
  float2 product = Q::HAS_MIN ? __ldg((const float2 *)x.product + group) : make_float2(0, 0);
  in.sum[0] = sum.x, in.sum[1] = sum.y, in.product[0] = product.x, in.product[1] = product.y;
  in.scale = __ldg(x.scale + group);
  return in;
}

/* Adds the half `half` of a group of 32 columns, or all of it where its scales are one, to a token's sums. */
template <class Q>
__device__ inline void add_columns(const group_weights<Q> &w, const group_input &in, int offset, int half,
                                   float (&sum)[LANE_ROWS]) {
  constexpr int FOURS = Q::GROUP == 16 ? 4 : 8;
  row_scales s = w.scales.of(half);
  int shift = offset * (FOURS == 8 ? in.sum[0] + in.sum[1] : in.sum[half]);
  float product = FOURS == 8 ? in.product[0] + in.product[1] : in.product[half];
#pragma unroll
  for (int r = 0; r < LANE_ROWS; r++) {
    int high = 0, low = 0;
#pragma unroll
    for (int j = 0; j < FOURS; j++) {
      int i = FOURS * half + j;
      uint32_t bytes = four_bytes<Q>(w, i, r);
      high = dot_bytes(bytes, component(in.planes[i / 2], i % 2 * 2), high);
      low = dot_bytes(bytes, component(in.planes[i / 2], i % 2 * 2 + 1), low);
    }
    sum[r] += in.scale * s.scale[r] * (float)(256 * high + low - shift);
    if (Q::HAS_MIN) sum[r] += s.min[r] * product;
  }
}

/* While a lane multiplies with its weights, the next ones are on their way. */
template <class Q, int TOKENS, int N_WARPS>
__device__ void multiply_tile(const matrix &w, int32_t tile_index, const quantized &x, int32_t n, sums<TOKENS> &sum) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = lane % 4 * LANE_ROWS;
  const unsigned char *tile = w.data + (int64_t)tile_index * w.tile_bytes, *words = tile + scale_bytes<Q>(w.cols);
  int32_t groups = w.cols / ACT_GROUP, offset = w.format.offset, g = warp * WARP_GROUPS + lane / 4;
  if (g >= groups) return;
  group_weights<Q> next = group_weights<Q>::load(tile, words, g, row);
  for (; g < groups; g += N_WARPS * WARP_GROUPS) {
    group_weights<Q> weights = next;
    int32_t ahead = g + N_WARPS * WARP_GROUPS;
    if (ahead < groups) next = group_weights<Q>::load(tile, words, ahead, row);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      if (t >= n) break;
      group_input in = load_input<Q>(x, (int64_t)t * groups + g);
#pragma unroll
      for (int half = 0; half < Q::HALVES; half++) add_columns<Q>(weights, in, offset, half, sum[t]);
    }
  }
}

/* Matrices on one input, in one launch: they are not large enough to fill the GPU one by one. */
enum { JOBS = 3 };
struct gemv_jobs {
  matrix w[JOBS];
  const float *bias[JOBS];
  float *out[JOBS];
  bool add[JOBS];
  int32_t end[JOBS]; /* of the matrix's tiles among all */
};

/* Grid: (tiles of all matrices). n <= TOKENS. */
template <int TOKENS, int N_WARPS>
__global__ void __launch_bounds__(N_WARPS *WARP) gemv_kernel(gemv_jobs jobs, quantized x, int32_t n) {
  int32_t job = 0, tile = blockIdx.x;
  while (tile >= jobs.end[job]) job++;
  tile -= job ? jobs.end[job - 1] : 0;
  sums<TOKENS> sum = {};
  const matrix &w = jobs.w[job];
  with_format(w.format, [&](auto format) { multiply_tile<decltype(format), TOKENS, N_WARPS>(w, tile, x, n, sum); });
  finish_tile<TOKENS, N_WARPS>(w, jobs.bias[job], jobs.add[job], jobs.out[job], tile, 0, n, sum);
}

/* Grid: (strips of 16 rows, fours of tokens). Columns go in pairs: a warp takes 8 pairs at once. */
template <enum strip_type TYPE>
__global__ void __launch_bounds__(WARPS *WARP)
    floats_kernel(matrix w, const float *x, int32_t n_tokens, const float *bias, bool add, float *out) {
  int32_t token = blockIdx.y * FEW_TOKENS, n = min(n_tokens - token, (int32_t)FEW_TOKENS);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const unsigned char *strip = w.data + (int64_t)blockIdx.x * w.tile_bytes;
  sums<FEW_TOKENS> sum = {};
  for (int32_t pair = warp * 8 + lane / 4; pair < w.cols / 2; pair += WARPS * 8)
#pragma unroll
    for (int t = 0; t < FEW_TOKENS; t++) {
      if (t >= n) break;
      float2 v = __ldg((const float2 *)(x + (int64_t)(token + t) * w.cols) + pair);
#pragma unroll
      for (int r = 0; r < LANE_ROWS; r++) {
        int64_t at = ((int64_t)pair * STRIP + 4 * (lane % 4) + r) * 2;
        sum[t][r] += strip_value<TYPE>(strip, at) * v.x + strip_value<TYPE>(strip, at + 1) * v.y;
      }
    }
  finish_tile<FEW_TOKENS, WARPS>(w, bias, add, out, blockIdx.x, token, n, sum);
}
} // namespace

template <int TOKENS, int N_WARPS>
static void launch_gemv(const backend *be, const gemv_jobs &jobs, int32_t tiles, const quantized &x, int32_t n) {
  launch(queue_of(be), gemv_kernel<TOKENS, N_WARPS>, dim3((unsigned)tiles), dim3(N_WARPS * WARP),
         sizeof(gemv_shared<TOKENS, N_WARPS>), jobs, x, n);
}

int32_t gemv_quantized(const backend *be, const activation *x, int32_t n, const linear_job *list, int32_t n_jobs) {
  gemv_jobs jobs = {};
  int32_t taken = 0, tiles = 0;
  for (; taken < n_jobs && taken < JOBS && list[taken].w->quantized; taken++) {
    const linear_job &job = list[taken];
    tiles += tiles_of_rows(job.w->rows);
    jobs.w[taken] = *job.w, jobs.bias[taken] = job.bias, jobs.out[taken] = job.out, jobs.add[taken] = job.add;
    jobs.end[taken] = tiles;
  }
  /* By the matrices alone: how many share a block is part of the result's definition. */
  auto *launcher = tiles < MANY_TILES ? n == 1 ? launch_gemv<1, WARPS> : launch_gemv<FEW_TOKENS, WARPS>
                   : n == 1           ? launch_gemv<1, FEW_WARPS>
                                      : launch_gemv<FEW_TOKENS, FEW_WARPS>;
  launcher(be, jobs, tiles, x->q, n);
  return taken;
}

void gemv_floats(const backend *be, const activation *x, int32_t n, const linear_job *job) {
  auto *kernel = job->w->strip == STRIP_F32   ? floats_kernel<STRIP_F32>
                 : job->w->strip == STRIP_F16 ? floats_kernel<STRIP_F16>
                                              : floats_kernel<STRIP_BF16>;
  dim3 grid((unsigned)tiles_of_rows(job->w->rows), (unsigned)((n + FEW_TOKENS - 1) / FEW_TOKENS));
  launch(queue_of(be), kernel, grid, dim3(WARPS * WARP), sizeof(gemv_shared<FEW_TOKENS, WARPS>), *job->w, x->values, n,
         job->bias, job->add, job->out);
}
