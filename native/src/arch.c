#include "arch.h"
#include <string.h>

/* llama: Llama 2 and 3, Mistral, SmolLM2, TinyLlama. */
static const arch TABLE[] = {
    {"llama", ROPE_PAIRS, false, false},
    {"qwen2", ROPE_HALVES, true, false},
    {"qwen3", ROPE_HALVES, false, true},
};

const arch *arch_find(const char *name, uint64_t size) {
  for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE; i++)
    if (strlen(TABLE[i].name) == size && memcmp(TABLE[i].name, name, size) == 0) return &TABLE[i];
  return NULL;
}

const char *arch_supported(void) { return "llama, qwen2, qwen3"; }
