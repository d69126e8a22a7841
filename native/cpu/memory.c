/* The CPU backend's memory is the process's. */
#include "cpu.h"
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64 };

/* calloc leaves large memory untouched until it is used, which aligned_alloc and memset would not; so the address is
 * aligned here, and the byte before it says by how much. */
void *cpu_alloc(const backend *be, size_t bytes) {
  (void)be;
  unsigned char *memory = bytes <= SIZE_MAX - ALIGNMENT ? calloc(1, bytes + ALIGNMENT) : NULL;
  if (!memory) return NULL;
  size_t shift = ALIGNMENT - (uintptr_t)memory % ALIGNMENT;
  memory[shift - 1] = (unsigned char)shift;
  return memory + shift;
}

void cpu_release(const backend *be, void *memory) {
  (void)be;
  unsigned char *at = memory;
  if (at) free(at - at[-1]);
}

void cpu_copy(const backend *be, void *to, const void *from, size_t bytes) {
  (void)be;
  memcpy(to, from, bytes);
}

int32_t cpu_sync(const backend *be, pyllm_error *err) {
  (void)be;
  (void)err;
  return PYLLM_OK;
}
