/* attend_local and attend_bulk: the same walk over a work list.
 *
 * Keys are folded span by span: each span of 32 strips gets a fresh softmax state, which is then merged into the row's.
 * Prefill does a panel's spans one after another; decode, with few rows, does them on all threads and merges in the
 * same order, so both give the same bits. */
#include "cpu.h"
#include <math.h>
#include <string.h>

static const softmax_state EMPTY = {-1e30f, 0.0f};

typedef struct attend_job {
  const backend *be;
  attention_batch *b;
  const layer_cache *cache;
  const work_list *list;
  bool with_values; /* false: the softmax state alone, into mass_state */
  const span_unit *units;
  panel *panels;        /* (threads) */
  partial_span partial; /* where spans run in parallel */
} attend_job;

static softmax_state *state_of(const attend_job *job) { return job->with_values ? job->b->state : job->b->mass_state; }

/* Spans of SPAN_STRIPS strips in an item's ranges. */
static int32_t work_item_spans(const work_list *list, const work_item *item) {
  int32_t n = 0;
  for (int32_t i = 0; i < item->n_ranges; i++) {
    const key_range *r = &list->ranges[item->first_range + i];
    n += r->end - r->begin;
  }
  return (n + SPAN_STRIPS - 1) / SPAN_STRIPS;
}

/* Walks an item's strips in order. */
typedef struct strip_cursor {
  const key_range *range, *end;
  int32_t strip;
} strip_cursor;

/* At the item's `index`-th strip. */
static strip_cursor cursor_at(const work_list *list, const work_item *item, int32_t index) {
  const key_range *r = list->ranges + item->first_range, *end = r + item->n_ranges;
  while (r < end && index >= r->end - r->begin) index -= r->end - r->begin, r++;
  return (strip_cursor){r, end, r < end ? r->begin + index : 0};
}

/* Up to 4 strips, at most `most`; returns their number. */
static int32_t next_strips(strip_cursor *c, int32_t most, int32_t out[KV_STRIPS]) {
  int32_t n = 0;
  while (n < most && n < KV_STRIPS && c->range < c->end) {
    out[n++] = c->strip++;
    if (c->strip == c->range->end && ++c->range < c->end) c->strip = c->range->begin;
  }
  return n;
}

static void load_panel(const attend_job *job, const work_item *item, panel *p) {
  const attention_batch *b = job->b;
  p->earliest = INT32_MAX;
  for (int32_t r = 0; r < item->n_rows; r++) {
    int32_t row = job->list->rows[item->first_row + r], position = b->position + row / b->n_heads;
    const float *q = b->q + (int64_t)row * b->head_dim;
    for (int32_t i = 0; i < b->head_dim; i++) p->q[r * b->head_dim + i] = q[i] * b->scale;
    p->position[r] = position;
    if (position < p->earliest) p->earliest = position;
  }
  if (job->cache->kv_type == PYLLM_KV_Q8_0)
    job->be->kernels->round_queries(p->q, item->n_rows, b->head_dim, p->q_words, p->q_scale);
}

static int32_t keys_visible(int32_t n_sink, const int32_t *strip, int32_t n, int32_t position) {
  int32_t visible = 0;
  for (int32_t s = 0; s < n; s++) visible += strip_visible(n_sink, strip[s], position);
  return visible;
}

/* Keys of the strips that each row may see; returns the number of strips that any row sees. */
static int32_t find_visible(const attend_job *job, const work_item *item, const int32_t *strip, int32_t n, panel *p) {
  int32_t n_sink = job->b->n_sink, most = 0, least = keys_visible(n_sink, strip, n, p->earliest);
  bool all = least == n * STRIP; /* what the earliest row sees, later ones do too */
  for (int32_t r = 0; r < item->n_rows; r++) {
    p->n_valid[r] = all ? least : keys_visible(n_sink, strip, n, p->position[r]);
    if (p->n_valid[r] > most) most = p->n_valid[r];
  }
  return (most + STRIP - 1) / STRIP;
}

/* Where one head's strips are. */
typedef struct strip_places {
  const unsigned char *blocks;
  size_t block_bytes, key_bytes, value_bytes; /* of a block, and of a strip of 16 tokens */
} strip_places;

static strip_places places_of(const layer_cache *cache, int32_t kv_head, int32_t head_dim) {
  return (strip_places){cache_block(cache, kv_head, 0, head_dim), kv_block_bytes(cache->kv_type, head_dim),
                        (size_t)key_strip_bytes(cache->kv_type, head_dim),
                        (size_t)value_strip_bytes(cache->kv_type, head_dim)};
}

static const unsigned char *keys_at(const strip_places *p, int32_t strip) {
  return p->blocks + (size_t)(strip / KV_STRIPS) * p->block_bytes + (size_t)(strip % KV_STRIPS) * p->key_bytes;
}

static const unsigned char *values_at(const strip_places *p, int32_t strip) {
  return p->blocks + (size_t)(strip / KV_STRIPS) * p->block_bytes + KV_STRIPS * p->key_bytes +
         (size_t)(strip % KV_STRIPS) * p->value_bytes;
}

/* Fresh state and output of one span. */
static void fold_span(const attend_job *job, const work_item *item, int32_t span, panel *p, softmax_state *state,
                      float *out) {
  const attention_batch *b = job->b;
  int32_t d = b->head_dim, strip[KV_STRIPS], next[KV_STRIPS];
  strip_places places = places_of(job->cache, item->kv_head, d);
  for (int32_t r = 0; r < item->n_rows; r++) state[r] = EMPTY;
  if (job->with_values) memset(out, 0, (size_t)item->n_rows * (size_t)d * sizeof *out);
  strip_cursor cursor = cursor_at(job->list, item, span * SPAN_STRIPS);
  int32_t left = SPAN_STRIPS, n = next_strips(&cursor, left, next);
  while (n > 0) {
    memcpy(strip, next, sizeof strip);
    left -= n;
    int32_t n_next = next_strips(&cursor, left, next), n_seen = find_visible(job, item, strip, n, p);
    attend_args args = {.rows = item->n_rows,
                        .head_dim = d,
                        .n_strips = n_seen,
                        .kv_type = job->cache->kv_type,
                        .q = p->q,
                        .q_words = p->q_words,
                        .q_scale = p->q_scale,
                        .n_valid = p->n_valid,
                        .scores = p->scores,
                        .alpha = p->alpha,
                        .state = state,
                        .out = job->with_values ? out : NULL};
    for (int32_t s = 0; s < n_seen; s++) {
      args.k[s] = keys_at(&places, strip[s]);
      args.v[s] = values_at(&places, strip[s]);
      args.next_k[s] = s < n_next ? keys_at(&places, next[s]) : NULL;
    }
    if (n_seen > 0) job->be->kernels->attend_strips(&args);
    n = n_next;
  }
}

void cpu_merge_row(const attention_batch *b, softmax_state *into, float *out, softmax_state span,
                   const float *span_out) {
  if (span.sum == 0) return;
  float max = into->max > span.max ? into->max : span.max;
  float keep = expf(into->max - max), take = expf(span.max - max);
  into->sum = into->sum * keep + span.sum * take;
  into->max = max;
  if (!span_out) return;
  for (int32_t i = 0; i < b->head_dim; i++) out[i] = out[i] * keep + span_out[i] * take;
}

static void merge_span(const attend_job *job, const work_item *item, const softmax_state *state, const float *out) {
  const attention_batch *b = job->b;
  for (int32_t r = 0; r < item->n_rows; r++) {
    int64_t row = job->list->rows[item->first_row + r];
    cpu_merge_row(b, state_of(job) + row, b->out + row * b->head_dim, state[r],
                  job->with_values ? out + (int64_t)r * b->head_dim : NULL);
  }
}

static void attend_items(void *context, int32_t begin, int32_t end, int32_t thread) {
  attend_job *job = context;
  panel *p = &job->panels[thread];
  for (int32_t i = begin; i < end; i++) {
    const work_item *item = &job->list->items[i];
    load_panel(job, item, p);
    int32_t spans = work_item_spans(job->list, item);
    for (int32_t s = 0; s < spans; s++) {
      fold_span(job, item, s, p, p->state, p->out);
      merge_span(job, item, p->state, p->out);
    }
  }
}

static void attend_units(void *context, int32_t begin, int32_t end, int32_t thread) {
  attend_job *job = context;
  panel *p = &job->panels[thread];
  for (int32_t i = begin; i < end; i++) {
    const span_unit *unit = &job->units[i];
    const work_item *item = &job->list->items[unit->item];
    load_panel(job, item, p);
    fold_span(job, item, unit->span, p, job->partial.state + unit->row,
              job->partial.out + (int64_t)unit->row * job->b->head_dim);
  }
}

/* Lists every (item, span); false when they are too many for the space kept for them. */
static bool list_units(const attend_job *job, cpu_scratch *scratch, int32_t *n_units) {
  int64_t rows = 0;
  *n_units = 0;
  for (int32_t i = 0; i < job->list->n_items; i++) {
    const work_item *item = &job->list->items[i];
    int32_t spans = work_item_spans(job->list, item);
    if (*n_units + spans > scratch->partial_rows || rows + (int64_t)spans * item->n_rows > scratch->partial_rows)
      return false;
    for (int32_t s = 0; s < spans; s++, rows += item->n_rows)
      scratch->units[(*n_units)++] = (span_unit){i, s, (int32_t)rows};
  }
  return true;
}

static void attend(const backend *be, attention_batch *b, const layer_cache *cache, const work_list *list,
                   bool with_values) {
  cpu_scratch *scratch = b->backend_scratch;
  attend_job job = {be, b, cache, list, with_values, scratch->units, scratch->panels, scratch->partial};
  int32_t n_units;
  if (list->n_items < 4 * pool_size(be->pool) && list_units(&job, scratch, &n_units)) {
    pool_run(be->pool, n_units, 1, attend_units, &job);
    for (int32_t i = 0; i < n_units; i++) {
      const span_unit *unit = &scratch->units[i];
      merge_span(&job, &list->items[unit->item], scratch->partial.state + unit->row,
                 scratch->partial.out + (int64_t)unit->row * b->head_dim);
    }
  } else {
    pool_run(be->pool, list->n_items, 1, attend_items, &job);
  }
}

static void reset_rows(const attention_batch *b, softmax_state *state) {
  for (int64_t row = 0; row < (int64_t)b->n * b->n_heads; row++) state[row] = EMPTY;
}

void cpu_masses(const attention_batch *b, const softmax_state *state, float *mass) {
  for (int64_t row = 0; row < (int64_t)b->n * b->n_heads; row++) mass[row] = state[row].max + logf(state[row].sum);
}

void cpu_attend_local(const backend *be, attention_batch *b, const layer_cache *cache) {
  reset_rows(b, b->state);
  memset(b->out, 0, (size_t)b->n * (size_t)b->n_heads * (size_t)b->head_dim * sizeof *b->out);
  attend(be, b, cache, &b->local, true);
  cpu_masses(b, b->state, b->local_mass);
}

void cpu_attend_bulk(const backend *be, attention_batch *b, const layer_cache *cache) {
  attend(be, b, cache, &b->bulk, true);
}

void cpu_true_bulk_mass(const backend *be, attention_batch *b, const layer_cache *cache, const uint8_t *queries,
                        float *mass) {
  attention_list_everything(b, queries);
  reset_rows(b, b->mass_state);
  attend(be, b, cache, &b->bulk, false);
  cpu_masses(b, b->mass_state, mass);
}
