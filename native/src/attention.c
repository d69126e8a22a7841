#include "attention.h"
#include "estimate.h"
#include <stdlib.h>

/* Each tile and head ends with at most one panel that is not full. */
static int64_t most_items(int32_t n, int32_t n_heads) {
  return (int64_t)n * n_heads / PANEL_ROWS + (int64_t)most_tiles(n) * n_heads;
}

/* Ranges of a (tile, head): at most every other strip begins one; the local list has sinks and window. */
static int64_t most_ranges(const attention_shape *s) {
  return (int64_t)most_tiles(s->n_batch) * s->n_heads * (s->n_ctx / STRIP / 2 + 3);
}

static bool list_new(work_list *list, const attention_shape *s) {
  list->items = malloc((size_t)most_items(s->n_batch, s->n_heads) * sizeof *list->items);
  list->ranges = malloc((size_t)most_ranges(s) * sizeof *list->ranges);
  list->rows = malloc((size_t)s->n_batch * (size_t)s->n_heads * sizeof *list->rows);
  return list->items && list->ranges && list->rows;
}

static void list_free(work_list *list) {
  free(list->items);
  free(list->ranges);
  free(list->rows);
}

bool attention_new(attention_batch *b, const attention_shape *s) {
  *b = (attention_batch){.n_heads = s->n_heads,
                         .n_kv_heads = s->n_kv_heads,
                         .head_dim = s->head_dim,
                         .n_sink = s->n_sink,
                         .scale = s->scale,
                         .max_strips = most_strips(s->n_ctx)};
  size_t rows = (size_t)s->n_batch * (size_t)s->n_heads;
  size_t reads = (size_t)most_tiles(s->n_batch) * (size_t)s->n_heads;
  b->tiles = malloc((size_t)most_tiles(s->n_batch) * sizeof *b->tiles);
  b->state = malloc(rows * sizeof *b->state);
  b->mass_state = malloc(rows * sizeof *b->mass_state);
  b->local_mass = malloc(rows * sizeof *b->local_mass);
  b->bulk_mass = malloc(rows * sizeof *b->bulk_mass);
  b->mean_score = malloc(rows * sizeof *b->mean_score);
  b->deviation = malloc(rows * sizeof *b->deviation);
  b->is_long = malloc(rows);
  b->wanted = malloc(reads * (size_t)b->max_strips);
  b->reads = malloc(reads * sizeof *b->reads);
  b->rest.weight = malloc((size_t)s->n_heads * sizeof *b->rest.weight);
  b->rest.out = malloc((size_t)s->n_heads * (size_t)s->head_dim * sizeof *b->rest.out);
  b->out = aligned_alloc(64, rows * (size_t)s->head_dim * sizeof *b->out);
  bool lists = list_new(&b->local, s);
  lists &= list_new(&b->bulk, s);
  return lists && b->tiles && b->state && b->mass_state && b->local_mass && b->bulk_mass && b->mean_score &&
         b->deviation && b->is_long && b->wanted && b->reads && b->rest.weight && b->rest.out && b->out;
}

void attention_free(attention_batch *b) {
  free(b->tiles);
  free(b->state);
  free(b->mass_state);
  free(b->local_mass);
  free(b->bulk_mass);
  free(b->mean_score);
  free(b->deviation);
  free(b->is_long);
  free(b->wanted);
  free(b->reads);
  free(b->rest.weight);
  free(b->rest.out);
  free(b->out);
  list_free(&b->local);
  list_free(&b->bulk);
}

uint64_t attention_bytes(const attention_shape *s) {
  uint64_t rows = (uint64_t)s->n_batch * (uint64_t)s->n_heads;
  uint64_t items = (uint64_t)most_items(s->n_batch, s->n_heads);
  uint64_t reads = (uint64_t)most_tiles(s->n_batch) * (uint64_t)s->n_heads;
  return rows * (2 * sizeof(softmax_state) + 4 * sizeof(float) + 1 + 2 * sizeof(int32_t) + (uint64_t)s->head_dim * 4) +
         reads * ((uint64_t)most_strips(s->n_ctx) + sizeof(tile_read)) +
         (uint64_t)s->n_heads * (1 + (uint64_t)s->head_dim) * sizeof(float) +
         2 * (items * sizeof(work_item) + (uint64_t)most_ranges(s) * sizeof(key_range));
}

/* Appends the newest n_new_rows as panels that read the newest n_ranges; both already stand at the list's ends. */
static void list_panels(work_list *list, int32_t kv_head, int32_t n_new_rows, int32_t n_ranges) {
  for (int32_t done = 0; done < n_new_rows; done += PANEL_ROWS) {
    work_item item = {kv_head, list->n_rows + done, n_new_rows - done, list->n_ranges, n_ranges};
    if (item.n_rows > PANEL_ROWS) item.n_rows = PANEL_ROWS;
    list->items[list->n_items++] = item;
  }
  list->n_rows += n_new_rows;
  list->n_ranges += n_ranges;
}

static void list_clear(work_list *list) { list->n_items = list->n_rows = list->n_ranges = 0; }

static void plan_tiles(attention_batch *b, int32_t n_window) {
  b->n_tiles = 0;
  for (int32_t i = 0; i < b->n; i += b->tiles[b->n_tiles++].n)
    b->tiles[b->n_tiles] = tile_from(b->n_sink, n_window, b->position, i, b->n);
}

/* Which rows a list takes; NULL: all. */
typedef struct row_filter {
  const uint8_t *queries; /* (n) */
  const uint8_t *heads;   /* (n, n_heads) */
} row_filter;

/* Of n_heads heads. Query-major rows, so that a panel's queries are close together and few masked keys are computed. */
static int32_t put_rows(const attention_batch *b, const query_tile *tile, int32_t head, int32_t n_heads,
                        row_filter filter, int32_t *rows) {
  int32_t n = 0;
  for (int32_t i = tile->first; i < tile->first + tile->n; i++) {
    if (filter.queries && !filter.queries[i]) continue;
    for (int32_t h = head; h < head + n_heads; h++)
      if (!filter.heads || filter.heads[i * b->n_heads + h]) rows[n++] = i * b->n_heads + h;
  }
  return n;
}

static key_range blocks_range(int32_t begin, int32_t end) { return (key_range){begin * KV_STRIPS, end * KV_STRIPS}; }

void attention_plan(attention_batch *b, int32_t n_window, int32_t position, int32_t n) {
  b->position = position;
  b->n = n;
  plan_tiles(b, n_window);
  work_list *list = &b->local;
  int32_t group = b->n_heads / b->n_kv_heads;
  list_clear(list);
  for (int32_t t = 0; t < b->n_tiles; t++) {
    const query_tile *tile = &b->tiles[t];
    int32_t last = b->position + tile->first + tile->n - 1, end = kv_block_of(b->n_sink, last) + 1;
    for (int32_t g = 0; g < b->n_kv_heads; g++) {
      int32_t rows = put_rows(b, tile, g * group, group, (row_filter){NULL, NULL}, list->rows + list->n_rows),
              n_ranges = 0;
      key_range *ranges = list->ranges + list->n_ranges;
      if (b->n_sink > 0) ranges[n_ranges++] = blocks_range(0, 1);
      if (end > 1 + tile->n_pages) ranges[n_ranges++] = blocks_range(1 + tile->n_pages, end);
      list_panels(list, g, rows, n_ranges);
    }
  }
}

/* Runs of wanted strips as ranges; returns their number and counts the strips. */
static int32_t put_wanted(const uint8_t *wanted, int32_t n, key_range *ranges, int32_t *n_strips) {
  int32_t n_ranges = 0;
  *n_strips = 0;
  for (int32_t s = 0; s < n; s++) {
    if (!wanted[s]) continue;
    if (s == 0 || !wanted[s - 1]) ranges[n_ranges++].begin = KV_STRIPS + s;
    ranges[n_ranges - 1].end = KV_STRIPS + s + 1;
    ++*n_strips;
  }
  return n_ranges;
}

static void list_bulk(attention_batch *b, row_filter filter, bool paged) {
  work_list *list = &b->bulk;
  list_clear(list);
  int32_t group = b->n_heads / b->n_kv_heads;
  for (int32_t t = 0; t < b->n_tiles; t++) {
    const query_tile *tile = &b->tiles[t];
    int32_t sharing = paged ? attention_sharing(tile, group) : group;
    for (int32_t h = 0; tile->n_pages && h < b->n_heads; h += sharing) {
      int32_t rows = put_rows(b, tile, h, sharing, filter, list->rows + list->n_rows), n_ranges = 1;
      key_range *ranges = list->ranges + list->n_ranges;
      int32_t *n_strips = &attention_read(b, t, h)->n_strips;
      *n_strips = tile->n_pages * KV_STRIPS;
      if (paged) n_ranges = put_wanted(attention_wanted(b, t, h), *n_strips, ranges, n_strips);
      else ranges[0] = blocks_range(1, 1 + tile->n_pages);
      if (n_ranges) list_panels(list, h / group, rows, n_ranges);
    }
  }
}

void attention_list_everything(attention_batch *b, const uint8_t *queries) {
  list_bulk(b, (row_filter){queries, NULL}, false);
}

void attention_list_long(attention_batch *b, bool paged) { list_bulk(b, (row_filter){NULL, b->is_long}, paged); }

static bool is_long_head(const attention_policy *p, size_t layer_head, float local_mass, float bulk_mass) {
  bool local_label = p->static_local && p->static_local[layer_head];
  float threshold = p->thresholds ? p->thresholds[layer_head] : 0;
  return head_is_long(p->policy, local_label, threshold, local_mass, bulk_mass);
}

static void decide_query(attention_batch *b, const attention_policy *p, int32_t layer, int32_t query) {
  int32_t group = b->n_heads / b->n_kv_heads;
  for (int32_t g = 0; g < b->n_kv_heads; g++) {
    uint8_t any = 0, *is_long = b->is_long + query * b->n_heads + g * group;
    for (int32_t i = 0; i < group; i++) {
      size_t row = (size_t)query * (size_t)b->n_heads + (size_t)(g * group + i);
      size_t layer_head = (size_t)layer * (size_t)b->n_heads + (size_t)(g * group + i);
      is_long[i] = is_long_head(p, layer_head, b->local_mass[row], b->bulk_mass[row]);
      any |= is_long[i];
    }
    if (p->granularity == PYLLM_GROUP)
      for (int32_t i = 0; i < group; i++) is_long[i] = any;
  }
}

void attention_decide(attention_batch *b, const attention_policy *policy, int32_t layer) {
  for (int32_t t = 0; t < b->n_tiles; t++) {
    const query_tile *tile = &b->tiles[t];
    for (int32_t i = tile->first; i < tile->first + tile->n; i++) {
      if (tile->n_pages) decide_query(b, policy, layer, i);
      else
        for (int32_t h = 0; h < b->n_heads; h++) b->is_long[i * b->n_heads + h] = 0;
    }
  }
}
