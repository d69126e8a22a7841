#include "pack.h"
#include "error.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static size_t strip_value_bytes(const quant_type *type) { return type->id == TYPE_F32 ? 4 : 2; }

static tile_format format_of(const quant_type *type) {
  return (tile_format){type->bits, type->group, type->offset, type->scaled, type->has_min};
}

static size_t bytes_of_16_rows(const quant_type *type, int32_t cols) {
  if (!type->unpack) return strip_value_bytes(type) * STRIP * (size_t)cols;
  tile_format f = format_of(type);
  return tile_bytes(&f, cols);
}

size_t pack_bytes(const quant_type *type, int32_t rows, int32_t cols) {
  return (size_t)tiles_of_rows(rows) * bytes_of_16_rows(type, cols);
}

typedef struct pack_job {
  const unsigned char *source;
  matrix *out;
  _Atomic int32_t bad_row; /* first row seen with a non-finite weight, or -1 */
} pack_job;

static bool finite_f16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

static bool finite_value(const quant_type *type, const unsigned char *p) {
  if (type->id == TYPE_F32) {
    uint32_t bits;
    memcpy(&bits, p, 4);
    return (bits & 0x7f800000) != 0x7f800000;
  }
  uint16_t bits;
  memcpy(&bits, p, 2);
  return type->id == TYPE_BF16 ? (bits & 0x7f80) != 0x7f80 : finite_f16(bits);
}

/* Row `lane` of a strip: value i goes to pair i / 2. */
static bool pack_strip_row(const matrix *m, const unsigned char *row, int lane, unsigned char *tile) {
  size_t bytes = strip_value_bytes(m->type);
  bool finite = true;
  for (int32_t i = 0; i < m->cols; i++) {
    const unsigned char *value = row + (size_t)i * bytes;
    finite &= finite_value(m->type, value);
    memcpy(tile + ((size_t)(i / 2) * 2 * STRIP + 2 * (size_t)lane + (size_t)(i % 2)) * bytes, value, bytes);
  }
  return finite;
}

/* What 32 quants of one row have above 4 bits, `bits` each (kernels.h). planes: at the row's bytes. */
static void put_above(int32_t bits, const uint8_t *x, uint8_t *planes) {
  if (bits == 0) return;
  int32_t per_byte = 8 / bits;
  for (int32_t plane = 0; plane < bits; plane++)
    for (int32_t j = 0; j < 4; j++) {
      uint8_t byte = 0;
      for (int32_t i = 0; i < per_byte; i++) byte |= (uint8_t)(x[4 * (plane * per_byte + i) + j] >> 4 << i * bits);
      planes[plane * 4 * TILE_ROWS + j] = byte;
    }
}

static void put_quants(const tile_format *f, const uint8_t *q, int32_t column, int32_t n, int lane, uint8_t *quants) {
  for (int32_t g = 0; g < n; g += ACT_GROUP) {
    uint8_t *group = quants + (size_t)(column + g) * TILE_ROWS * (size_t)f->bits / 8 + 4 * lane;
    const uint8_t *x = q + g;
    if (f->bits == 8) {
      for (int i = 0; i < 8; i++) memcpy(group + i * 4 * TILE_ROWS, x + 4 * i, 4);
      continue;
    }
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++)
        group[i * 4 * TILE_ROWS + j] = (uint8_t)((x[4 * i + j] & 15) | (x[16 + 4 * i + j] & 15) << 4);
    put_above(f->bits - 4, x, group + 4 * 4 * TILE_ROWS);
  }
}

static void put_scales(const tile_format *f, const quant_block *b, int32_t column, int lane, uint8_t *scales) {
  size_t minimum = f->has_min ? 2 : 1, halves = TILE_ROWS * sizeof(uint16_t);
  if (!f->scaled) {
    uint8_t *at = scales + (size_t)(column / ACT_GROUP) * halves * minimum + 2 * (size_t)lane;
    memcpy(at, &b->d, 2);
    if (f->has_min) memcpy(at + halves, &b->m, 2);
    return;
  }
  size_t n = (size_t)(256 / f->group);
  uint8_t *at = scales + (size_t)(column / 256) * (halves + n * TILE_ROWS) * minimum;
  memcpy(at + 2 * (size_t)lane, &b->d, 2);
  if (f->has_min) memcpy(at + halves + 2 * (size_t)lane, &b->m, 2);
  at += halves * minimum + (size_t)lane;
  for (size_t g = 0; g < n; g++) {
    at[g * TILE_ROWS] = (uint8_t)(int8_t)b->scale[g];
    if (f->has_min) at[(n + g) * TILE_ROWS] = b->min[g];
  }
}

static bool pack_tile_row(const matrix *m, const unsigned char *row, int lane, unsigned char *tile) {
  uint8_t *quants = tile + tile_scale_bytes(&m->format, m->cols);
  bool finite = true;
  quant_block b;
  for (int32_t column = 0; column < m->cols; column += m->type->block) {
    m->type->unpack(row + (size_t)(column / m->type->block) * (size_t)m->type->bytes, &b);
    finite &= finite_f16(b.d) && finite_f16(b.m);
    put_scales(&m->format, &b, column, lane, tile);
    put_quants(&m->format, b.q, column, m->type->block, lane, quants);
  }
  return finite;
}

static void pack_tiles(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  pack_job *job = context;
  const matrix *m = job->out;
  size_t row_bytes = (size_t)(m->cols / m->type->block) * (size_t)m->type->bytes;
  for (int32_t tile = begin; tile < end; tile++)
    for (int lane = 0; lane < TILE_ROWS && tile * TILE_ROWS + lane < m->rows; lane++) {
      int32_t r = tile * TILE_ROWS + lane;
      const unsigned char *row = job->source + (size_t)r * row_bytes;
      unsigned char *to = m->data + (size_t)tile * m->tile_bytes;
      if (!(m->quantized ? pack_tile_row(m, row, lane, to) : pack_strip_row(m, row, lane, to)))
        atomic_store(&job->bad_row, r);
    }
}

int32_t pack(pool *threads, const quant_type *type, const void *source, int32_t rows, int32_t cols, const char *where,
             matrix *out, pyllm_error *err) {
  *out = (matrix){.rows = rows, .cols = cols, .type = type, .quantized = type->unpack != NULL};
  if (out->quantized) out->format = format_of(type);
  else out->strip = type->id == TYPE_F32 ? STRIP_F32 : type->id == TYPE_F16 ? STRIP_F16 : STRIP_BF16;
  out->tile_bytes = bytes_of_16_rows(type, cols);
  size_t bytes = (pack_bytes(type, rows, cols) + 63) / 64 * 64;
  out->data = aligned_alloc(64, bytes);
  if (!out->data) return fail(err, PYLLM_ERR_MEMORY, "%s: %zu bytes refused", where, bytes);
  int32_t tiles = tiles_of_rows(rows);
  if (rows % TILE_ROWS) memset(out->data + (size_t)(tiles - 1) * out->tile_bytes, 0, out->tile_bytes);
  pack_job job = {source, out, -1};
  pool_run(threads, tiles, 8, pack_tiles, &job);
  if (job.bad_row >= 0) {
    pack_free(out);
    return fail(err, PYLLM_ERR_NUMERIC, "%s: row %d holds NaN or infinity", where, (int)job.bad_row);
  }
  return PYLLM_OK;
}

void pack_free(matrix *m) {
  free(m->data);
  m->data = NULL;
}
