/* Reads front to back with a cursor that cannot leave the bytes: header, values, tensor directory; then
 * checks that every tensor's data lies where the directory says. Integers are little-endian, as the host's
 * (quant.c asserts). */
#include "gguf_parse.h"
#include "error.h"
#include "gguf_value.h"
#include "quant.h"
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  HEADER = 24, /* magic, version, number of tensors, number of values */
  MIN_VALUE = 8 + 1 + 4 + 1,
  MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8,
  MAX_KEY = 65535, /* these two from the GGUF specification */
  MAX_TENSOR_NAME = 64,
  DEFAULT_ALIGNMENT = 32
};

/* ---- the cursor ---- */

typedef struct cursor {
  const gguf_part *part;
  pyllm_error *err;
  uint64_t at; /* <= part->size */
  /* What is being read, for messages: "key 'a.b'", or "key 3 of 10" until its name is known. */
  const char *kind, *name;
  uint64_t number, count, name_size;
} cursor;

static uint64_t left(const cursor *c) { return c->part->size - c->at; }

static void begin_item(cursor *c, const char *kind, uint64_t number, uint64_t count) {
  c->kind = kind;
  c->name = NULL;
  c->number = number;
  c->count = count;
}

static void name_item(cursor *c, const char *kind, const char *name, uint64_t size) {
  c->kind = kind;
  c->name = name;
  c->name_size = size;
}

/* fail() with the file and the item in front. */
__attribute__((format(printf, 3, 4))) static int32_t bad(const cursor *c, pyllm_status status, const char *format,
                                                         ...) {
  char cause[400];
  va_list args;
  va_start(args, format);
  vsnprintf(cause, sizeof cause, format, args);
  va_end(args);
  gguf_shown name;
  if (c->name)
    return fail(c->err, status, "%s: %s %s: %s", c->part->path, c->kind, gguf_show(c->name, c->name_size, &name),
                cause);
  return fail(c->err, status, "%s: %s %" PRIu64 " of %" PRIu64 ": %s", c->part->path, c->kind, c->number + 1, c->count,
              cause);
}

static int32_t truncated(const cursor *c, const char *what, uint64_t n, uint64_t size) {
  uint64_t total;
  if (__builtin_mul_overflow(n, size, &total)) total = UINT64_MAX;
  return bad(c, PYLLM_ERR_FORMAT,
             "truncated or corrupt at byte %" PRIu64 ": %s takes %" PRIu64 " bytes, and %" PRIu64 " are left", c->at,
             what, total, left(c));
}

/* n items of size bytes, or NULL and PYLLM_ERR_FORMAT reported. */
static const uint8_t *take(cursor *c, const char *what, uint64_t n, uint64_t size) {
  if (n > left(c) / size) {
    truncated(c, what, n, size);
    return NULL;
  }
  const uint8_t *start = c->part->bytes + c->at;
  c->at += n * size;
  return start;
}

static int32_t take_u32(cursor *c, const char *what, uint32_t *out) {
  const uint8_t *bytes = take(c, what, 1, sizeof *out);
  if (!bytes) return PYLLM_ERR_FORMAT;
  memcpy(out, bytes, sizeof *out);
  return PYLLM_OK;
}

static int32_t take_u64(cursor *c, const char *what, uint64_t *out) {
  const uint8_t *bytes = take(c, what, 1, sizeof *out);
  if (!bytes) return PYLLM_ERR_FORMAT;
  memcpy(out, bytes, sizeof *out);
  return PYLLM_OK;
}

static int32_t take_string(cursor *c, const char *what, const char **out, uint64_t *size) {
  TRY(take_u64(c, what, size));
  *out = (const char *)take(c, what, *size, 1);
  return *out ? PYLLM_OK : PYLLM_ERR_FORMAT;
}

static int32_t take_name(cursor *c, uint64_t limit, const char **name, uint64_t *size) {
  uint64_t at = c->at;
  TRY(take_string(c, "its name", name, size));
  if (*size < 1 || *size > limit)
    return bad(c, PYLLM_ERR_FORMAT, "its name at byte %" PRIu64 " has %" PRIu64 " bytes, expected 1 to %" PRIu64, at,
               *size, limit);
  name_item(c, c->kind, *name, *size);
  return PYLLM_OK;
}

/* ---- values ---- */

/* Strings are as long as each says, so they are walked; this is the only time. */
static int32_t take_strings(cursor *c, uint64_t n) {
  if (n > left(c) / sizeof(uint64_t)) return truncated(c, "an array of strings", n, sizeof(uint64_t));
  for (uint64_t i = 0; i < n; i++) {
    const char *bytes;
    uint64_t size;
    TRY(take_string(c, "a string", &bytes, &size));
  }
  return PYLLM_OK;
}

static int32_t check_bools(const cursor *c, const uint8_t *bytes, uint64_t n) {
  for (uint64_t i = 0; i < n; i++)
    if (bytes[i] > 1)
      return bad(c, PYLLM_ERR_FORMAT, "the byte %d at byte %" PRIu64 " is no bool", bytes[i],
                 (uint64_t)(bytes + i - c->part->bytes));
  return PYLLM_OK;
}

/* v->n items of v->item_type. */
static int32_t take_items(cursor *c, pyllm_value *v) {
  uint64_t start = c->at;
  v->data = c->part->bytes + start;
  if (v->item_type == VALUE_STRING) TRY(take_strings(c, v->n));
  else if (!take(c, "its value", v->n, gguf_value_size(v->item_type))) return PYLLM_ERR_FORMAT;
  v->size = c->at - start;
  return v->item_type == VALUE_BOOL ? check_bools(c, v->data, v->n) : PYLLM_OK;
}

static int32_t take_type(cursor *c, const char *what, int32_t *out) {
  uint64_t at = c->at;
  uint32_t type;
  TRY(take_u32(c, what, &type));
  if (type >= N_VALUE_TYPES)
    return bad(c, PYLLM_ERR_FORMAT, "%s at byte %" PRIu64 " is %" PRIu32 ", expected 0 to %d", what, at, type,
               N_VALUE_TYPES - 1);
  *out = (int32_t)type;
  return PYLLM_OK;
}

static int32_t read_value(cursor *c, pyllm_value *v) {
  TRY(take_name(c, MAX_KEY, &v->key, &v->key_size));
  TRY(take_type(c, "its type", &v->type));
  v->item_type = v->type;
  v->n = 1;
  if (v->type == VALUE_ARRAY) {
    TRY(take_type(c, "its item type", &v->item_type));
    if (v->item_type == VALUE_ARRAY) return bad(c, PYLLM_ERR_UNSUPPORTED, "arrays of arrays are not supported");
    TRY(take_u64(c, "its length", &v->n));
  }
  return take_items(c, v);
}

static int32_t index_keys(cursor *c, gguf_part *part) {
  for (uint64_t i = 0; i < part->n_values; i++)
    part->keys[i] = (gguf_name){part->values[i].key, part->values[i].key_size, i};
  gguf_names_sort(part->keys, part->n_values);
  const gguf_name *twice = gguf_names_duplicate(part->keys, part->n_values);
  if (!twice) return PYLLM_OK;
  name_item(c, "key", twice->bytes, twice->size);
  return bad(c, PYLLM_ERR_FORMAT, "appears twice");
}

static int32_t read_values(cursor *c, gguf_part *part) {
  for (uint64_t i = 0; i < part->n_values; i++) {
    begin_item(c, "key", i, part->n_values);
    TRY(read_value(c, &part->values[i]));
  }
  return index_keys(c, part);
}

const pyllm_value *gguf_part_find(const gguf_part *part, const char *key) {
  uint64_t i;
  return gguf_names_find(part->keys, part->n_values, key, &i) ? &part->values[i] : NULL;
}

/* ---- tensors ---- */

/* The format's other types by ggml number, so that a message can name what it refuses. */
static const char *unreadable_name(uint32_t type) {
  static const char *const names[] = {
      [4] = "Q4_2",     [5] = "Q4_3",   [9] = "Q8_1",   [15] = "Q8_K",  [16] = "IQ2_XXS", [17] = "IQ2_XS",
      [18] = "IQ3_XXS", [19] = "IQ1_S", [21] = "IQ3_S", [22] = "IQ2_S", [24] = "I8",      [25] = "I16",
      [26] = "I32",     [27] = "I64",   [28] = "F64",   [29] = "IQ1_M", [34] = "TQ1_0",   [35] = "TQ2_0",
      [39] = "MXFP4",   [40] = "NVFP4", [41] = "Q1_0",
  };
  const char *name = type < sizeof names / sizeof *names ? names[type] : NULL;
  return name ? name : "unknown";
}

static int32_t read_shape(cursor *c, pyllm_tensor *t) {
  uint32_t n_dims;
  TRY(take_u32(c, "its number of dimensions", &n_dims));
  if (n_dims < 1 || n_dims > 4) return bad(c, PYLLM_ERR_FORMAT, "has %" PRIu32 " dimensions, expected 1 to 4", n_dims);
  t->n_dims = (int32_t)n_dims;
  for (uint32_t i = 0; i < 4; i++) {
    t->shape[i] = 1;
    if (i < n_dims) TRY(take_u64(c, "its shape", &t->shape[i]));
    if (t->shape[i] == 0) return bad(c, PYLLM_ERR_FORMAT, "dimension %" PRIu32 " is 0", i);
  }
  return PYLLM_OK;
}

/* Bytes of data from shape and type. */
static int32_t compute_size(const cursor *c, const quant_type *type, pyllm_tensor *t) {
  const uint64_t *shape = t->shape;
  uint64_t values = shape[0];
  bool overflow = false;
  for (int i = 1; i < 4; i++) overflow |= __builtin_mul_overflow(values, shape[i], &values);
  if (!overflow && shape[0] % (uint64_t)type->block == 0)
    overflow = __builtin_mul_overflow(values / (uint64_t)type->block, (uint64_t)type->bytes, &t->size);
  if (overflow || values > INT64_MAX)
    return bad(c, PYLLM_ERR_FORMAT,
               "the shape (%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 ") of %s overflows 64 bits", shape[0],
               shape[1], shape[2], shape[3], type->name);
  if (shape[0] % (uint64_t)type->block)
    return bad(c, PYLLM_ERR_FORMAT, "its first dimension %" PRIu64 " is not a multiple of %s's block of %d", shape[0],
               type->name, type->block);
  return PYLLM_OK;
}

/* t->offset is still relative to the data section, whose place is known once the directory has been read. */
static int32_t read_tensor(cursor *c, pyllm_tensor *t) {
  TRY(take_name(c, MAX_TENSOR_NAME, &t->name, &t->name_size));
  TRY(read_shape(c, t));
  uint32_t number;
  TRY(take_u32(c, "its type", &number));
  const quant_type *type = number <= INT32_MAX ? quant_find((int32_t)number) : NULL;
  if (!type)
    return bad(c, PYLLM_ERR_UNSUPPORTED, "type %" PRIu32 " (%s) is not supported; supported: %s", number,
               unreadable_name(number), quant_supported());
  t->type = type->id;
  t->part = c->part->index;
  TRY(compute_size(c, type, t));
  return take_u64(c, "its offset", &t->offset);
}

static int32_t read_alignment(cursor *c, uint64_t *out) {
  static const char key[] = "general.alignment";
  *out = DEFAULT_ALIGNMENT;
  const pyllm_value *v = gguf_part_find(c->part, key);
  if (!v) return PYLLM_OK;
  name_item(c, "key", key, strlen(key));
  if (v->type != VALUE_U32) return bad(c, PYLLM_ERR_FORMAT, "is of type %s, expected u32", gguf_value_name(v->type));
  uint32_t alignment;
  memcpy(&alignment, v->data, sizeof alignment);
  if (alignment < 8 || (alignment & (alignment - 1)))
    return bad(c, PYLLM_ERR_FORMAT, "is %" PRIu32 ", expected a power of two of at least 8", alignment);
  *out = alignment;
  return PYLLM_OK;
}

/* Turns t->offset into an offset in the file and sets t->data. start: of the data section, may be past the
 * end. */
static int32_t place_tensor(const cursor *c, uint64_t start, uint64_t alignment, pyllm_tensor *t) {
  if (t->offset % alignment)
    return bad(c, PYLLM_ERR_FORMAT, "its offset %" PRIu64 " is not a multiple of the alignment %" PRIu64, t->offset,
               alignment);
  uint64_t size = c->part->size, room = size > start ? size - start : 0;
  if (t->offset > room || t->size > room - t->offset)
    return bad(c, PYLLM_ERR_FORMAT,
               "truncated or corrupt: its %" PRIu64 " bytes of data start %" PRIu64 " after byte %" PRIu64
               ", and the file ends at byte %" PRIu64,
               t->size, t->offset, start, size);
  t->offset += start;
  t->data = c->part->bytes + t->offset;
  return PYLLM_OK;
}

static int32_t read_tensors(cursor *c, gguf_part *part) {
  for (uint64_t i = 0; i < part->n_tensors; i++) {
    begin_item(c, "tensor", i, part->n_tensors);
    TRY(read_tensor(c, &part->tensors[i]));
  }
  uint64_t alignment;
  TRY(read_alignment(c, &alignment));
  uint64_t start = (c->at + alignment - 1) / alignment * alignment;
  for (uint64_t i = 0; i < part->n_tensors; i++) {
    pyllm_tensor *t = &part->tensors[i];
    name_item(c, "tensor", t->name, t->name_size);
    TRY(place_tensor(c, start, alignment, t));
  }
  return PYLLM_OK;
}

/* ---- the whole ---- */

static int32_t check_magic(const gguf_part *p, pyllm_error *err) {
  static const char magic[4] = "GGUF";
  if (p->size == 0) return fail(err, PYLLM_ERR_FORMAT, "%s: the file is empty", p->path);
  if (memcmp(p->bytes, magic, p->size < sizeof magic ? p->size : sizeof magic)) {
    gguf_shown start;
    return fail(err, PYLLM_ERR_FORMAT, "%s: not a GGUF file: it begins with %s", p->path,
                gguf_show(p->bytes, p->size < 16 ? p->size : 16, &start));
  }
  if (p->size < HEADER)
    return fail(err, PYLLM_ERR_FORMAT, "%s: truncated: %" PRIu64 " bytes, and a GGUF header has %d", p->path, p->size,
                HEADER);
  return PYLLM_OK;
}

static int32_t check_version(const gguf_part *p, pyllm_error *err) {
  uint32_t version;
  memcpy(&version, p->bytes + 4, sizeof version);
  if (version == 2 || version == 3) return PYLLM_OK;
  if (version && (version & 0xffff) == 0)
    return fail(err, PYLLM_ERR_UNSUPPORTED,
                "%s: big-endian GGUF version %" PRIu32 "; only little-endian files are supported", p->path,
                __builtin_bswap32(version));
  return fail(err, PYLLM_ERR_UNSUPPORTED, "%s: GGUF version %" PRIu32 " is not supported; supported: 2, 3", p->path,
              version);
}

/* Counts that the rest of the file cannot hold are refused before anything is allocated for them. */
static int32_t check_count(const gguf_part *p, const char *what, uint64_t count, uint64_t smallest, pyllm_error *err) {
  uint64_t most = (p->size - HEADER) / smallest;
  if (count <= most) return PYLLM_OK;
  return fail(err, PYLLM_ERR_FORMAT,
              "%s: truncated or corrupt: the header announces %" PRIu64 " %s, and its %" PRIu64
              " bytes can hold %" PRIu64 " at most",
              p->path, count, what, p->size, most);
}

static int32_t read_header(gguf_part *p, pyllm_error *err) {
  uint64_t n_tensors, n_values;
  TRY(check_magic(p, err));
  TRY(check_version(p, err));
  memcpy(&n_tensors, p->bytes + 8, sizeof n_tensors);
  memcpy(&n_values, p->bytes + 16, sizeof n_values);
  TRY(check_count(p, "tensors", n_tensors, MIN_TENSOR, err));
  TRY(check_count(p, "keys", n_values, MIN_VALUE, err));
  /* One more than asked for, because an allocation of nothing may be NULL. */
  p->values = calloc(n_values + 1, sizeof *p->values);
  p->keys = calloc(n_values + 1, sizeof *p->keys);
  p->tensors = calloc(n_tensors + 1, sizeof *p->tensors);
  if (!p->values || !p->keys || !p->tensors)
    return fail(err, PYLLM_ERR_MEMORY, "%s: memory for %" PRIu64 " keys and %" PRIu64 " tensors was refused", p->path,
                n_values, n_tensors);
  p->n_values = n_values;
  p->n_tensors = n_tensors;
  return PYLLM_OK;
}

int32_t gguf_parse(gguf_part *part, pyllm_error *err) {
  TRY(read_header(part, err));
  cursor c = {.part = part, .err = err, .at = HEADER};
  TRY(read_values(&c, part));
  return read_tensors(&c, part);
}

void gguf_part_free(gguf_part *part) {
  free(part->values);
  free(part->keys);
  free(part->tensors);
  part->values = NULL;
  part->keys = NULL;
  part->tensors = NULL;
  part->n_values = part->n_tensors = 0;
}
