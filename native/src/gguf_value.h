/* GGUF's value types, and one value read as what the caller needs. */
#ifndef PYLLM_SRC_GGUF_VALUE_H
#define PYLLM_SRC_GGUF_VALUE_H
#include "pyllm.h"

enum gguf_value_type {
  VALUE_U8 = 0,
  VALUE_I8 = 1,
  VALUE_U16 = 2,
  VALUE_I16 = 3,
  VALUE_U32 = 4,
  VALUE_I32 = 5,
  VALUE_F32 = 6,
  VALUE_BOOL = 7,
  VALUE_STRING = 8,
  VALUE_ARRAY = 9,
  VALUE_U64 = 10,
  VALUE_I64 = 11,
  VALUE_F64 = 12,
  N_VALUE_TYPES
};

/* "u32", ...; type < N_VALUE_TYPES. */
const char *gguf_value_name(int32_t type);
/* Bytes of one; 0 for strings and arrays. type < N_VALUE_TYPES. */
uint64_t gguf_value_size(int32_t type);

/* Any integer type in range; PYLLM_ERR_FORMAT otherwise. path: names the file in messages. */
int32_t gguf_value_u32(const char *path, const pyllm_value *value, uint32_t *out, pyllm_error *err);

#endif
