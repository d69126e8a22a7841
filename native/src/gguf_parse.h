/* One GGUF file in memory, taken apart: its metadata values and its tensor directory, every pointer checked
 * to stay inside the bytes. Nothing here opens a file, so this is what the fuzzer runs. */
#ifndef PYLLM_SRC_GGUF_PARSE_H
#define PYLLM_SRC_GGUF_PARSE_H
#include "gguf_name.h"
#include "pyllm.h"

typedef struct gguf_part {
  const char *path;     /* names the file in messages; not owned */
  const uint8_t *bytes; /* (size) not owned; values and tensors point into it */
  uint64_t size;
  int32_t index; /* which part of the model, 0-based: the tensors' `part` */
  uint64_t n_values, n_tensors;
  pyllm_value *values;   /* (n_values) owned, in file order */
  gguf_name *keys;       /* (n_values) owned, sorted */
  pyllm_tensor *tensors; /* (n_tensors) owned, in file order */
} gguf_part;

/* From path, bytes, size and index, fills the rest, which must be zero. Memory stays proportional to `size`.
 * gguf_part_free is due on failure too. Tensor names are not compared with each other. */
int32_t gguf_parse(gguf_part *part, pyllm_error *err);
void gguf_part_free(gguf_part *part);

/* NULL when absent. */
const pyllm_value *gguf_part_find(const gguf_part *part, const char *key);

#endif
