/* What differs between architectures, as data: forward.c and model.c branch on these fields, never on a name. */
#ifndef PYLLM_SRC_ARCH_H
#define PYLLM_SRC_ARCH_H
#include <stdbool.h>
#include <stdint.h>

enum rope_kind {
  ROPE_PAIRS, /* rotates (x[2i], x[2i+1]); GGUF's llama weights are permuted for it */
  ROPE_HALVES /* rotates (x[i], x[i + n_rot/2]) */
};

typedef struct arch {
  const char *name; /* general.architecture, and the prefix of its keys */
  enum rope_kind rope;
  bool qkv_bias; /* attn_{q,k,v}.bias must be there; elsewhere they are used when they are */
  bool qk_norm;  /* RMS norm of each query and key head before RoPE */
} arch;

/* name is not NUL-terminated; NULL when unknown. */
const arch *arch_find(const char *name, uint64_t size);
/* "llama, qwen2, qwen3": for messages. */
const char *arch_supported(void);

#endif
