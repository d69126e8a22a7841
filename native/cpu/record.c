/* The record stage: what a layer decided, copied out, and the audit: true bulk masses of the queries that ask for them.
 *
 * It comes after attend_bulk and changes nothing that finish reads. The audit scores whole bulks, but only of audited
 * queries, and touches no values. */
#include "cpu.h"
#include <math.h>
#include <string.h>

/* mass (n, n_heads) = NaN for queries without bulk, and for those that `known` (n; NULL: none are) leaves out. */
static void blank_rows(const attention_batch *b, bool all_known, const uint8_t *known, float *mass) {
  for (int32_t t = 0; t < b->n_tiles; t++)
    for (int32_t i = b->tiles[t].first; i < b->tiles[t].first + b->tiles[t].n; i++) {
      if (b->tiles[t].n_pages && (all_known || (known && known[i]))) continue;
      for (int32_t h = 0; h < b->n_heads; h++) mass[(int64_t)i * b->n_heads + h] = NAN;
    }
}

static void copy_rows(const attention_batch *b, bool known, const float *values, float *out) {
  if (!out) return;
  memcpy(out, values, (size_t)b->n * (size_t)b->n_heads * sizeof *out);
  blank_rows(b, known, NULL, out);
}

void cpu_record(const backend *be, attention_batch *b, const layer_cache *cache, const attention_policy *policy,
                const pyllm_record *out) {
  size_t rows = (size_t)b->n * (size_t)b->n_heads;
  if (out->local_mass) memcpy(out->local_mass, b->local_mass, rows * sizeof(float));
  if (out->queries) memcpy(out->queries, b->q, rows * (size_t)b->head_dim * sizeof(float));
  if (out->is_long) memcpy(out->is_long, b->is_long, rows);
  if (out->read_mass) cpu_masses(b, b->state, out->read_mass);
  bool adaptive = policy->policy == PYLLM_ADAPTIVE;
  copy_rows(b, adaptive || policy->policy == PYLLM_ORACLE, b->bulk_mass, out->estimate);
  copy_rows(b, adaptive, b->mean_score, out->mean_score);
  copy_rows(b, adaptive, b->deviation, out->deviation);
  if (out->true_mass) {
    if (out->audit) cpu_true_bulk_mass(be, b, cache, out->audit, out->true_mass);
    blank_rows(b, false, out->audit, out->true_mass);
  }
}
