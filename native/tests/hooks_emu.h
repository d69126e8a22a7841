/* Entry points of the tests into the emulator, which only the emulated library has; cffi parses this after hooks.h. */
#ifndef PYLLM_TESTS_HOOKS_EMU_H
#define PYLLM_TESTS_HOOKS_EMU_H
#include "pyllm.h"

#pragma GCC visibility push(default)

/* Runs a kernel of hooks_emu.cu by name; in, out: (blocks, threads). What the emulator finds wrong is
 * PYLLM_ERR_DEVICE. */
int32_t hook_emu(const char *kernel, int32_t blocks, int32_t threads, const float *in, float *out, pyllm_error *err);
/* The matrix instruction: halves as bits a (16, 16), b (16, 8), d (16, 8). */
int32_t hook_emu_matrix(const uint16_t *a, const uint16_t *b, float *d, pyllm_error *err);

/* The memory of the emulated device. */
void hook_emu_memory(uint64_t bytes);
/* The next `times` calls of a function of CUDA fail with this error. */
void hook_emu_fail(const char *call, int32_t error, int32_t times);

#pragma GCC visibility pop
#endif
