/* Whatever the bytes are, gguf_parse refuses them in one readable sentence, or returns values and tensors
 * that lie inside them. libFuzzer: clang -fsanitize=fuzzer,address,undefined with src/gguf_*.c, src/gguf.c,
 * src/quant.c and src/error.c; without clang, test_gguf.c mutates valid files through the same function. */
#include "expect.h"
#include "gguf_parse.h"
#include "gguf_value.h"
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static bool inside(const gguf_part *part, const void *start, uint64_t size) {
  uint64_t offset = (uint64_t)((const uint8_t *)start - part->bytes);
  return offset <= part->size && size <= part->size - offset;
}

/* Reads every byte: a sanitizer sees what the bounds above would miss. */
static uint64_t sum(const void *bytes, uint64_t size) {
  uint64_t total = 0;
  for (uint64_t i = 0; i < size; i++) total += ((const uint8_t *)bytes)[i];
  return total;
}

static uint64_t strings_size(const pyllm_value *v) {
  const uint8_t *at = v->data;
  for (uint64_t i = 0; i < v->n; i++) {
    uint64_t size;
    memcpy(&size, at, sizeof size);
    at += sizeof size + size;
  }
  return (uint64_t)(at - (const uint8_t *)v->data);
}

static void examine_value(const gguf_part *part, const pyllm_value *v) {
  uint32_t number;
  bool is_string = v->item_type == VALUE_STRING;
  EXPECT(inside(part, v->key, v->key_size) && inside(part, v->data, v->size), "value outside the file");
  EXPECT(v->type == VALUE_ARRAY || (v->n == 1 && v->type == v->item_type), "scalar of %d items", (int)v->n);
  EXPECT(v->size == (is_string ? strings_size(v) : v->n * gguf_value_size(v->item_type)), "size %d", (int)v->size);
  gguf_value_u32("fuzz", v, &number, NULL);
  sum(v->data, v->size);
}

static void examine_tensor(const gguf_part *part, const pyllm_tensor *t) {
  EXPECT(t->size && inside(part, t->data, t->size) && inside(part, t->name, t->name_size), "tensor outside the file");
  EXPECT((const uint8_t *)t->data == part->bytes + t->offset && t->part == part->index, "wrong place");
  sum(t->data, t->size);
}

static void examine_error(int32_t status, const pyllm_error *err) {
  EXPECT(status == err->status && strlen(err->message) > 10, "status %d, '%s'", status, err->message);
  for (const char *c = err->message; *c; c++) EXPECT(*c >= 0x20 && *c < 0x7f, "unprintable byte %d", *c);
}

/* Returns what gguf_parse did. */
static int32_t examine(const uint8_t *data, size_t size) {
  gguf_part part = {.path = "fuzz", .bytes = data, .size = size, .index = 7};
  pyllm_error err = {0};
  int32_t status = gguf_parse(&part, &err);
  if (status) examine_error(status, &err);
  else {
    for (uint64_t i = 0; i < part.n_values; i++) examine_value(&part, &part.values[i]);
    for (uint64_t i = 0; i < part.n_tensors; i++) examine_tensor(&part, &part.tensors[i]);
  }
  gguf_part_free(&part);
  return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  examine(data, size);
  return 0;
}
