/* What stands for the strips that a query, alone in its batch, does not read: one value per page.
 *
 * It is the mean of the page's values as the usual query weighs them, the mean of a head's queries on other text: plain
 * means are worse than nothing, for in every page there are tokens that all queries look at and that say little. It
 * counts as much as the sketch says that the page's unread strips hold, times the policy's page_rest, which takes back
 * what rounding adds to the mean of an exponential. */
#include "cpu.h"
#include "quant.h"
#include <math.h>
#include <string.h>

enum { PAGES_AT_ONCE = STRIP * KV_STRIPS };

/* weights (64): of a page's keys under the usual query, up to a factor; returns their sum. */
static float usual_weights(const kernels *k, const float *query, const uint16_t *keys, int32_t head_dim, float scale,
                           float *weights) {
  float q[LARGEST_HEAD], top = -INFINITY, sum = 0;
  for (int32_t i = 0; i < head_dim; i++) q[i] = query[i] * scale;
  for (int32_t s = 0; s < KV_STRIPS; s++) {
    strips strip = {STRIP_F16, 1, head_dim / 2, {keys + s * STRIP * head_dim}, {0}};
    k->strip_gemm(1, q, head_dim, &strip, NULL, weights + s * STRIP, KV_BLOCK);
  }
  for (int32_t t = 0; t < KV_BLOCK; t++) top = weights[t] > top ? weights[t] : top;
  for (int32_t t = 0; t < KV_BLOCK; t++) sum += weights[t] = expf(weights[t] - top);
  return sum;
}

void cpu_usual_value(const kernels *k, const key_sketch *sketch, const uint16_t *block, int32_t head_dim, float scale,
                     int32_t page) {
  float weights[KV_BLOCK], value[LARGEST_HEAD];
  float inverse = 1.0f / usual_weights(k, sketch->query, block, head_dim, scale, weights);
  const uint16_t *values = block + KV_BLOCK * head_dim;
  for (int32_t j = 0; j < head_dim / STRIP; j++) {
    strips of_page = {STRIP_F16, KV_STRIPS, STRIP / 2, {0}, {0}};
    for (int32_t s = 0; s < KV_STRIPS; s++) of_page.data[s] = values + (s * head_dim + j * STRIP) * STRIP;
    k->strip_gemm(1, weights, KV_BLOCK, &of_page, NULL, value + j * STRIP, head_dim);
  }
  for (int32_t i = 0; i < head_dim; i++) *usual_at(sketch->usual, head_dim, page, i) = f32_to_f16(value[i] * inverse);
}

/* to (64): of pages [first, first + n), what of their strips is not read; zeros behind. share: of the row's strips.
 * Returns the sum. */
static float left_out(const float *share, const uint8_t *wanted, float factor, int32_t first, int32_t n, float *to) {
  float sum = 0;
  memset(to + n, 0, (size_t)(PAGES_AT_ONCE - n) * sizeof *to);
  for (int32_t p = 0; p < n; p++) {
    float page = 0;
    for (int32_t s = (first + p) * KV_STRIPS; s < (first + p + 1) * KV_STRIPS; s++) page += wanted[s] ? 0 : share[s];
    sum += to[p] = page * factor;
  }
  return sum;
}

/* weights (heads of the group, 64) of pages [first, first + n); adds them to b->rest.weight. */
static void weigh_pages(attention_batch *b, const page_scratch *rows, const uint8_t *wanted, float factor,
                        int32_t first, int32_t n, float *weights) {
  int32_t group = b->n_heads / b->n_kv_heads, head = rows->kv_head * group, row = 0;
  for (int32_t h = 0; h < group; h++) {
    float *to = weights + h * PAGES_AT_ONCE;
    memset(to, 0, PAGES_AT_ONCE * sizeof *to);
    if (!b->is_long[head + h]) continue;
    const float *share = rows->shares + (int64_t)row * b->max_strips;
    b->rest.weight[head + h] += left_out(share, wanted, factor * rows->total[row], first, n, to);
    row++;
  }
}

void cpu_rest(const backend *be, attention_batch *b, const key_sketch *sketch, const page_scratch *rows,
              const uint8_t *wanted, float factor) {
  int32_t d = b->head_dim, group = b->n_heads / b->n_kv_heads, head = rows->kv_head * group;
  float weights[SHARED_ROWS * PAGES_AT_ONCE], ones[SHARED_ROWS], *out = b->rest.out + (int64_t)head * d;
  for (int32_t h = 0; h < group; h++) ones[h] = 1.0f, b->rest.weight[head + h] = 0;
  if (rows->n == 0) return;
  for (int32_t first = 0, n; first < b->tiles->n_pages; first += n) {
    n = b->tiles->n_pages - first < PAGES_AT_ONCE ? b->tiles->n_pages - first : PAGES_AT_ONCE;
    weigh_pages(b, rows, wanted, factor, first, n, weights);
    strips of_pages = {STRIP_F16, (n + STRIP - 1) / STRIP, STRIP / 2, {0}, {0}};
    for (int32_t j = 0; j < d / STRIP; j++) {
      for (int32_t s = 0; s < of_pages.n_pieces; s++)
        of_pages.data[s] = usual_at(sketch->usual, d, first + s * STRIP, j * STRIP);
      be->kernels->strip_gemm(group, weights, PAGES_AT_ONCE, &of_pages, first ? ones : NULL, out + j * STRIP, d);
    }
  }
}
