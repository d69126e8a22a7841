/* The record of an eval, cut down to what one layer of one batch fills in. */
#ifndef PYLLM_SRC_RECORD_H
#define PYLLM_SRC_RECORD_H
#include "pyllm.h"

/* A caller's record and where a batch lies in it. */
typedef struct batch_record {
  const pyllm_record *all; /* NULL: nothing is recorded */
  int32_t n, first;        /* tokens of the eval, and which of them the batch begins with */
} batch_record;

/* Arrays (batch, n_heads) of one layer, queries (batch, n_heads, head_dim), audit (batch). */
pyllm_record record_rows(const batch_record *record, int32_t layer, int32_t n_heads, int32_t head_dim);

#endif
