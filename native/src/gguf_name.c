#include "gguf_name.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *gguf_show(const void *bytes, uint64_t size, gguf_shown *out) {
  static const char ellipsis[] = "'...";
  const unsigned char *byte = bytes;
  size_t used = 0;
  out->text[used++] = '\'';
  for (uint64_t i = 0; i < size; i++) {
    if (used + sizeof "\\xNN" + sizeof ellipsis > sizeof out->text) {
      memcpy(out->text + used, ellipsis, sizeof ellipsis);
      return out->text;
    }
    if (byte[i] >= 0x20 && byte[i] < 0x7f) out->text[used++] = (char)byte[i];
    else used += (size_t)snprintf(out->text + used, sizeof "\\xNN", "\\x%02x", byte[i]);
  }
  memcpy(out->text + used, "'", sizeof "'");
  return out->text;
}

static int compare(const void *a, const void *b) {
  const gguf_name *x = a, *y = b;
  int order = memcmp(x->bytes, y->bytes, x->size < y->size ? x->size : y->size);
  return order ? order : (x->size > y->size) - (x->size < y->size);
}

void gguf_names_sort(gguf_name *names, uint64_t n) {
  if (n) qsort(names, n, sizeof *names, compare);
}

const gguf_name *gguf_names_duplicate(const gguf_name *names, uint64_t n) {
  for (uint64_t i = 1; i < n; i++)
    if (compare(&names[i - 1], &names[i]) == 0) return &names[i];
  return NULL;
}

bool gguf_names_find(const gguf_name *names, uint64_t n, const char *name, uint64_t *entry) {
  gguf_name wanted = {name, strlen(name), 0};
  const gguf_name *found = n ? bsearch(&wanted, names, n, sizeof *names, compare) : NULL;
  if (found) *entry = found->entry;
  return found != NULL;
}
