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

extern const kernels kernels_generic;
#ifdef HAVE_avx2
extern const kernels kernels_avx2;
extern const kernels kernels_avx512;
#endif

static const struct candidate {
  const kernels *kernels;
  const char *available; /* itself and everything before it */
} *candidate(const char *isa) {
  static const struct candidate generic = {&kernels_generic, "generic"};
  const struct candidate *best = &generic;
#ifdef HAVE_avx2
  static const struct candidate avx2 = {&kernels_avx2, "generic, avx2"};
  static const struct candidate avx512 = {&kernels_avx512, "generic, avx2, avx512"};
  const struct candidate *wider[] = {&avx2, &avx512};
  __builtin_cpu_init();
  bool present[2];
  present[0] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  present[1] = present[0] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
  for (int i = 0; i < 2; i++)
    if (present[i] && (!isa || strcmp(best->kernels->name, isa) != 0)) best = wider[i];
#endif
  return best;
}

const kernels *kernels_find(const char *isa) {
  const kernels *found = candidate(isa)->kernels;
  return !isa || strcmp(found->name, isa) == 0 ? found : NULL;
}

const char *kernels_available(void) { return candidate(NULL)->available; }
