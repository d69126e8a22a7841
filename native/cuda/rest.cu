/* Sums the values that stand for what one query's long heads do not read; see rest.cuh. */
#include "pages.cuh"
#include "rest.cuh"

namespace {
constexpr int32_t REST_ROWS = 8;

struct rest_shared {
  float weight[REST_ROWS][REST_PAGES];
};

/* Estimated weight of a page's strips that are not read, beside the local mass's 1, and finite. mass, wanted: of its
 * first strip. */
__device__ float left_out(const float *mass, const uint8_t *wanted, float local_mass) {
  float sum = 0;
  for (int32_t s = 0; s < STRIPS_PER_PAGE; s++) sum += wanted[s] ? 0 : expf(fminf(mass[s] - local_mass, 69.0f));
  return sum;
}

/* Grid (parts of a bulk, n_kv_heads), one thread per dimension and more. Reads 2 head_dim bytes per page and up to 8
 * rows, and 4 per strip and row, one per strip; writes 4 head_dim + 4 bytes per row. */
__global__ void __launch_bounds__(MAX_HEAD_DIM) rest_kernel(device_attention a, device_layer layer) {
  rest_shared &s = block_shared<rest_shared>();
  int32_t n_pages = tile_at(a, 0).n_pages, part = blockIdx.x, g = blockIdx.y, head = g * group_of(a), i = threadIdx.x;
  int32_t first = part * REST_PAGES, n = n_pages - first < REST_PAGES ? n_pages - first : REST_PAGES;
  const int32_t *rows = a.scored_rows + (int64_t)head * SCORED_MOST;
  int32_t n_rows = n > 0 ? a.counts[head].n_scored : 0;
  for (int32_t r = 0; r < n_rows; r += REST_ROWS) {
    for (int32_t j = i; j < REST_ROWS * REST_PAGES; j += MAX_HEAD_DIM) {
      int32_t row = r + j / REST_PAGES, page = j % REST_PAGES, strip = (first + page) * STRIPS_PER_PAGE;
      bool counts = row < n_rows && page < n;
      s.weight[j / REST_PAGES][page] =
          counts ? left_out(strip_mass_at(a, head, row) + strip, a.wanted + (int64_t)head * a.max_strips + strip,
                            a.local_mass[rows[row]])
                 : 0;
    }
    __syncthreads();
    float sum[REST_ROWS] = {}, weight[REST_ROWS] = {};
    for (int32_t page = 0; page < n; page++) {
      float value = i < a.head_dim ? half_to_float(usual_value(a, layer, g, first + page)[i]) : 0;
#pragma unroll
      for (int32_t j = 0; j < REST_ROWS; j++) sum[j] += s.weight[j][page] * value, weight[j] += s.weight[j][page];
    }
#pragma unroll
    for (int32_t j = 0; j < REST_ROWS; j++) {
      if (r + j >= n_rows || i >= a.head_dim) continue;
      int64_t at = (int64_t)rows[r + j] * a.max_rest_parts + part;
      a.rest_out[at * a.head_dim + i] = sum[j];
      if (i == 0) a.rest_weight[at] = weight[j];
    }
    __syncthreads(); /* the weights are used up */
  }
}
} // namespace

void cuda_rest(queue *to, const device_attention &a, const device_layer &layer) {
  launch(to, rest_kernel, dim3((unsigned)a.max_rest_parts, (unsigned)a.n_kv_heads), dim3(MAX_HEAD_DIM),
         sizeof(rest_shared), a, layer);
}
