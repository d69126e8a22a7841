/* The formats without Python: conversions of every half, the table's consistency, and blocks at odd places. */
#include "expect.h"
#include "quant.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void every_half_survives_the_round_trip(void) {
  for (uint32_t h = 0; h <= 0xffff; h++) {
    float x = f16_to_f32((uint16_t)h);
    uint16_t back = f32_to_f16(x);
    bool is_nan = (h & 0x7fff) > 0x7c00;
    EXPECT(is_nan == (bool)isnan(x), "half %04x became %g", (unsigned)h, (double)x);
    EXPECT(back == (is_nan ? h | 0x0200 : h), "half %04x came back as %04x", (unsigned)h, (unsigned)back);
  }
}

/* Between any two neighbours the middle goes to the even one, and what is off the middle to the nearer one.
 */
static void rounding_is_to_nearest_even(void) {
  for (uint32_t h = 0; h < 0x7c00; h++) {
    float low = f16_to_f32((uint16_t)h);
    float high = h == 0x7bff ? 65536.0f : f16_to_f32((uint16_t)(h + 1));
    float middle = low + (high - low) / 2;
    uint16_t even = (uint16_t)(h + (h & 1));
    EXPECT(f32_to_f16(middle) == even, "above half %04x: %a", (unsigned)h, (double)middle);
    EXPECT(f32_to_f16(-middle) == (even | 0x8000), "below half %04x: %a", (unsigned)h | 0x8000, (double)-middle);
    EXPECT(f32_to_f16(nextafterf(middle, 0)) == h, "above half %04x", (unsigned)h);
    EXPECT(f32_to_f16(nextafterf(middle, INFINITY)) == h + 1, "above half %04x", (unsigned)h);
  }
}

static void known_conversions(void) {
  EXPECT(f16_to_f32(0x3c00) == 1.0f && f16_to_f32(0xc000) == -2.0f, "normal");
  EXPECT(f16_to_f32(0x0001) == 0x1p-24f && f16_to_f32(0x0400) == 0x1p-14f, "smallest");
  EXPECT(f32_to_f16(1e30f) == 0x7c00 && f32_to_f16(-INFINITY) == 0xfc00, "infinity");
  EXPECT(f32_to_f16(0x1p-149f) == 0 && f32_to_f16(-0.0f) == 0x8000, "zero");
  EXPECT(bf16_to_f32(0x3f80) == 1.0f && isinf(bf16_to_f32(0xff80)) && isnan(bf16_to_f32(0x7fc0)), "bf16");
}

/* A block of every type, allocated to its size so that a sanitizer sees a read past its end, at an odd
 * distance of two bytes from an aligned address. Every q, scale and min is within what the table says. */
static void unpacking_stays_inside(const quant_type *type) {
  for (int fill = 0; fill < 256; fill += 5) {
    unsigned char *memory = malloc((size_t)type->bytes + 2);
    EXPECT(memory, "no memory");
    memset(memory, fill, (size_t)type->bytes + 2);
    quant_block b;
    type->unpack(memory + 2, &b);
    free(memory);
    for (int i = 0; i < type->block; i++) EXPECT(b.q[i] < 1 << type->bits, "%s: q[%d] = %d", type->name, i, b.q[i]);
    for (int g = 0; g < type->block / type->group; g++) {
      EXPECT(b.scale[g] >= -128 && b.scale[g] <= 127, "%s: scale[%d] = %d", type->name, g, b.scale[g]);
      EXPECT(type->scaled || (b.scale[g] == 1 && b.min[g] == 1), "%s: group %d", type->name, g);
    }
    EXPECT(type->has_min || b.m == 0, "%s: m = %04x", type->name, b.m);
  }
}

static void the_table_is_consistent(void) {
  int32_t found = 0;
  for (int32_t id = -1; id < 100; id++) {
    const quant_type *type = quant_find(id);
    if (!type) continue;
    found++;
    EXPECT(type->id == id, "%s", type->name);
    EXPECT(strstr(quant_supported(), type->name), "%s is not among %s", type->name, quant_supported());
    EXPECT(!type->unpack == (type->block == 1) && !type->unpack == (type->bits == 0), "%s", type->name);
    if (!type->unpack) continue;
    EXPECT(type->block <= QUANT_MAX_BLOCK && type->block / type->group <= QUANT_MAX_GROUPS, "%s", type->name);
    unpacking_stays_inside(type);
  }
  int32_t named = 1;
  for (const char *c = quant_supported(); *c; c++) named += *c == ',';
  EXPECT(found == named, "%d types, %d named in %s", found, named, quant_supported());
}

static void known_blocks(void) {
  unsigned char q4_1[20] = {0x00, 0x40, 0x00, 0xbc, 0xf1}; /* d = 2, m = -1; values 1 and 15, else 0 */
  float x[32];
  quant_dequantize(quant_find(TYPE_Q4_1), q4_1, x, 32);
  EXPECT(x[0] == 1 && x[16] == 29 && x[1] == -1 && x[31] == -1, "%g %g %g", (double)x[0], (double)x[16], (double)x[1]);

  unsigned char q8_0[34] = {0x00, 0x38, 0x80, 0x7f}; /* d = 0.5; -128, 127, else 0 */
  quant_dequantize(quant_find(TYPE_Q8_0), q8_0, x, 32);
  EXPECT(x[0] == -64 && x[1] == 63.5f && x[2] == 0, "%g %g %g", (double)x[0], (double)x[1], (double)x[2]);
}

int main(void) {
  every_half_survives_the_round_trip();
  rounding_is_to_nearest_even();
  known_conversions();
  the_table_is_consistent();
  known_blocks();
  return 0;
}
