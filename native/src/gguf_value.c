#include "gguf_value.h"
#include "error.h"
#include "gguf.h"
#include "gguf_name.h"
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

static const struct {
  const char *name;
  uint8_t size;
} types[N_VALUE_TYPES] = {
    [VALUE_U8] = {"u8", 1},         [VALUE_I8] = {"i8", 1},       [VALUE_U16] = {"u16", 2}, [VALUE_I16] = {"i16", 2},
    [VALUE_U32] = {"u32", 4},       [VALUE_I32] = {"i32", 4},     [VALUE_F32] = {"f32", 4}, [VALUE_BOOL] = {"bool", 1},
    [VALUE_STRING] = {"string", 0}, [VALUE_ARRAY] = {"array", 0}, [VALUE_U64] = {"u64", 8}, [VALUE_I64] = {"i64", 8},
    [VALUE_F64] = {"f64", 8},
};

const char *gguf_value_name(int32_t type) { return types[type].name; }

uint64_t gguf_value_size(int32_t type) { return types[type].size; }

static int32_t wrong_type(const char *path, const pyllm_value *v, const char *expected, pyllm_error *err) {
  gguf_shown key;
  return fail(err, PYLLM_ERR_FORMAT, "%s: key %s is of type %s, expected %s", path,
              gguf_show(v->key, v->key_size, &key), gguf_value_name(v->type), expected);
}

/* An unsigned or signed integer of 1, 2, 4 or 8 little-endian bytes; false for other types. */
static bool read_integer(const pyllm_value *v, uint64_t *magnitude, bool *negative) {
  bool is_signed;
  switch (v->type) {
  case VALUE_U8:
  case VALUE_U16:
  case VALUE_U32:
  case VALUE_U64: is_signed = false; break;
  case VALUE_I8:
  case VALUE_I16:
  case VALUE_I32:
  case VALUE_I64: is_signed = true; break;
  default: return false;
  }
  uint64_t bits = 0;
  memcpy(&bits, v->data, v->size);
  *negative = is_signed && bits >> (8 * v->size - 1);
  if (*negative) {
    if (v->size < sizeof bits) bits |= UINT64_MAX << (8 * v->size);
    bits = -bits;
  }
  *magnitude = bits;
  return true;
}

int32_t gguf_value_u32(const char *path, const pyllm_value *v, uint32_t *out, pyllm_error *err) {
  uint64_t magnitude;
  bool negative;
  if (!read_integer(v, &magnitude, &negative)) return wrong_type(path, v, "an integer", err);
  if (negative || magnitude > UINT32_MAX) {
    gguf_shown key;
    return fail(err, PYLLM_ERR_FORMAT, "%s: key %s is %s%" PRIu64 ", expected 0 to %" PRIu32, path,
                gguf_show(v->key, v->key_size, &key), negative ? "-" : "", magnitude, UINT32_MAX);
  }
  *out = (uint32_t)magnitude;
  return PYLLM_OK;
}

/* *value NULL and PYLLM_OK for an absent key that is not required. */
static int32_t find(const pyllm_file *file, const char *key, bool required, const pyllm_value **value,
                    pyllm_error *err) {
  *value = gguf_find(file, key);
  if (!*value && required) return fail(err, PYLLM_ERR_FORMAT, "%s: key '%s' is missing", gguf_path(file), key);
  return PYLLM_OK;
}

int32_t gguf_get_u32(const pyllm_file *file, const char *key, bool required, uint32_t *out, pyllm_error *err) {
  const pyllm_value *v;
  int32_t status = find(file, key, required, &v, err);
  return v ? gguf_value_u32(gguf_path(file), v, out, err) : status;
}

int32_t gguf_get_f32(const pyllm_file *file, const char *key, bool required, float *out, pyllm_error *err) {
  const pyllm_value *v;
  int32_t status = find(file, key, required, &v, err);
  if (!v) return status;
  if (v->type == VALUE_F32) {
    memcpy(out, v->data, sizeof *out);
    return PYLLM_OK;
  }
  if (v->type != VALUE_F64) return wrong_type(gguf_path(file), v, "f32 or f64", err);
  double x;
  memcpy(&x, v->data, sizeof x);
  if (isfinite(x) && fabs(x) > (double)FLT_MAX)
    return fail(err, PYLLM_ERR_FORMAT, "%s: key '%s' is %g, too large for f32", gguf_path(file), key, x);
  *out = (float)x;
  return PYLLM_OK;
}

int32_t gguf_get_string(const pyllm_file *file, const char *key, bool required, const char **out, uint64_t *size,
                        pyllm_error *err) {
  const pyllm_value *v;
  int32_t status = find(file, key, required, &v, err);
  if (!v) return status;
  if (v->type != VALUE_STRING) return wrong_type(gguf_path(file), v, "string", err);
  *out = (const char *)v->data + sizeof(uint64_t);
  *size = v->size - sizeof(uint64_t);
  return PYLLM_OK;
}
