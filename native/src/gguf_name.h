/* Names as a GGUF file stores them, sized and not NUL-terminated: shown in messages, and found fast. */
#ifndef PYLLM_SRC_GGUF_NAME_H
#define PYLLM_SRC_GGUF_NAME_H
#include <stdbool.h>
#include <stdint.h>

typedef struct gguf_shown {
  char text[88];
} gguf_shown;

/* The bytes in quotes, cut after some sixty, with everything but printable ASCII as \xNN. Returns out->text.
 */
const char *gguf_show(const void *bytes, uint64_t size, gguf_shown *out);

typedef struct gguf_name {
  const char *bytes; /* (size) not owned */
  uint64_t size;
  uint64_t entry; /* which value or tensor has this name */
} gguf_name;

/* An index is an array of names, sorted once and then searched by halving. */
void gguf_names_sort(gguf_name *names, uint64_t n);
/* A name of a sorted array that also stands right before it, or NULL when all differ. */
const gguf_name *gguf_names_duplicate(const gguf_name *names, uint64_t n);
/* In a sorted array; false when absent. */
bool gguf_names_find(const gguf_name *names, uint64_t n, const char *name, uint64_t *entry);

#endif
