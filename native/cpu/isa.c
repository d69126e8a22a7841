#include "kernels.h"
#include <string.h>

size_t tile_scale_bytes(const tile_format *f, int32_t cols) {
  size_t minimum = f->has_min ? 2 : 1;
  size_t halves = TILE_ROWS * sizeof(uint16_t) * minimum;
  size_t bytes = f->scaled ? (size_t)(cols / 256) * (halves + (size_t)(256 / f->group) * TILE_ROWS * minimum)
                           : (size_t)(cols / ACT_GROUP) * halves;
  return (bytes + 63) / 64 * 64;
}

size_t tile_bytes(const tile_format *f, int32_t cols) {
  return tile_scale_bytes(f, cols) + (size_t)cols * TILE_ROWS * (size_t)f->bits / 8;
}

/* A build may leave out what it has no use for: what is not linked is NULL. */
#define DECLARE(isa) extern const kernels kernels_##isa __attribute__((weak));
extern const kernels kernels_generic;
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512vnni)
DECLARE(avx512bf16)

#ifdef EMULATED_AVX512 /* make wide */
#define HAS(feature) true
#elif defined __x86_64__
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define HAS(feature) false
#endif

enum { MOST_ISAS = 5 };

/* From the narrowest to the widest that this processor runs, each needing all before it; returns their number. */
static int32_t present(const kernels *out[MOST_ISAS]) {
#ifdef __x86_64__
  __builtin_cpu_init();
#endif
  const struct {
    const kernels *kernels;
    bool here;
  } all[MOST_ISAS] = {
      {&kernels_generic, true},
      {&kernels_avx2, HAS("avx2") && HAS("fma") && HAS("f16c")},
      {&kernels_avx512, HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")},
      {&kernels_avx512vnni, HAS("avx512vnni")},
      {&kernels_avx512bf16, HAS("avx512bf16")},
  };
  int32_t n = 0;
  while (n < MOST_ISAS && all[n].kernels && all[n].here) {
    out[n] = all[n].kernels;
    n++;
  }
  return n;
}

const kernels *kernels_find(const char *isa) {
  const kernels *all[MOST_ISAS];
  int32_t n = present(all);
  if (!isa) return all[n - 1];
  for (int32_t i = 0; i < n; i++)
    if (strcmp(all[i]->name, isa) == 0) return all[i];
  return NULL;
}

const char *kernels_available(void) {
  static const char *const upto[MOST_ISAS] = {"generic", "generic, avx2", "generic, avx2, avx512",
                                              "generic, avx2, avx512, avx512vnni",
                                              "generic, avx2, avx512, avx512vnni, avx512bf16"};
  const kernels *all[MOST_ISAS];
  return upto[present(all) - 1];
}
