/* The fingerprint of a model file: what saved sessions and profiles are bound to. */
#include "fingerprint.h"
#include "gguf.h"
#include "pyllm.h"
#include <string.h>

/* Bytes of a tensor that are hashed, at its begin and in its middle: a fine-tune changes nearly all of them in
 * nearly all tensors, and reading little keeps opening a large file fast. */
enum { SAMPLE = 256 };

/* The word at byte i of data, padded with zeros past its end. */
static uint64_t word_at(const void *data, uint64_t size, uint64_t i) {
  uint64_t word = 0;
  memcpy(&word, (const unsigned char *)data + i, size - i < 8 ? size - i : 8);
  return word;
}

uint64_t hash_bytes(uint64_t h, const void *data, uint64_t size) {
  for (uint64_t i = 0; i < size; i += 8) h = (h ^ word_at(data, size, i)) * 0x100000001b3u;
  return h;
}

/* A product alone carries the top bit into the top bit only, where the next word's flips it back. */
uint64_t checksum_bytes(const void *data, uint64_t size) {
  uint64_t h = 0;
  for (uint64_t i = 0; i < size; i += 8) {
    h = (h ^ word_at(data, size, i)) * 0x100000001b3u;
    h ^= h >> 32;
  }
  return h;
}

/* With its length, so that neighbours cannot trade bytes. */
static uint64_t hash_sized(uint64_t h, const void *data, uint64_t size) {
  return hash_bytes(hash_bytes(h, &size, sizeof size), data, size);
}

static uint64_t hash_tensor(uint64_t h, const pyllm_tensor *t) {
  h = hash_sized(h, t->name, t->name_size);
  h = hash_bytes(h, &t->type, sizeof t->type);
  h = hash_bytes(h, t->shape, sizeof t->shape);
  uint64_t n = t->size < SAMPLE ? t->size : SAMPLE;
  h = hash_bytes(h, t->data, n);
  return hash_bytes(h, (const unsigned char *)t->data + (t->size - n) / 2, n);
}

/* What the forward pass depends on: "general.architecture" and all that does not begin with "general.",
 * "tokenizer." or "split.". */
static int shapes_results(const pyllm_value *v) {
  static const char *const others[] = {"general.", "tokenizer.", "split."};
  static const char architecture[] = "general.architecture";
  if (v->key_size == sizeof architecture - 1 && memcmp(v->key, architecture, v->key_size) == 0) return 1;
  for (size_t i = 0; i < sizeof others / sizeof *others; i++)
    if (v->key_size >= strlen(others[i]) && memcmp(v->key, others[i], strlen(others[i])) == 0) return 0;
  return 1;
}

uint64_t pyllm_file_fingerprint(const pyllm_file *file) {
  uint64_t h = 0;
  for (uint64_t i = 0; i < pyllm_file_n_values(file); i++) {
    const pyllm_value *v = pyllm_file_value(file, i);
    if (!shapes_results(v)) continue;
    h = hash_sized(h, v->key, v->key_size);
    h = hash_sized(h, v->data, v->size);
  }
  for (uint64_t i = 0; i < pyllm_file_n_tensors(file); i++) {
    h = hash_tensor(h, pyllm_file_tensor(file, i));
    gguf_release_pages(file);
  }
  return h;
}
