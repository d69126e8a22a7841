#include "record.h"

static float *at(float *array, int64_t row) { return array ? array + row : NULL; }

pyllm_record record_rows(const batch_record *record, int32_t layer, int32_t n_heads, int32_t head_dim) {
  const pyllm_record *r = record->all;
  int64_t row = ((int64_t)layer * record->n + record->first) * n_heads;
  return (pyllm_record){.audit = r->audit ? r->audit + record->first : NULL,
                        .local_mass = at(r->local_mass, row),
                        .estimate = at(r->estimate, row),
                        .true_mass = at(r->true_mass, row),
                        .read_mass = at(r->read_mass, row),
                        .mean_score = at(r->mean_score, row),
                        .deviation = at(r->deviation, row),
                        .is_long = r->is_long ? r->is_long + row : NULL,
                        .queries = at(r->queries, row * head_dim)};
}
