/* The kernels of one instruction set: compiled once for each, with -DISA=generic, avx2 and so on. */
#include "kernel_strip.h"
#include "kernel_tile.h"
#include "kernel_attend.h"
#include "kernel_rows.h"
#include "kernel_kv.h"
#include "kernel_sketch.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

extern const kernels JOIN(kernels_, ISA);
const kernels JOIN(kernels_, ISA) = {
    .name = TEXT(ISA),
    .words = TILE_WORDS,
    .strip_gemm = strip_gemm,
    .tile_gemm = tile_gemm,
    .round_queries = round_queries,
    .attend_strips = attend_strips,
    .sketch_fold = sketch_fold,
    .sketch_sums = sketch_sums,
    .strip_shares = strip_shares,
    .rms_norm = rms_norm,
    .quantize = quantize,
    .swiglu = swiglu,
    .rope = rope,
    .kv_store = kv_store,
    .kv_halves = kv_halves,
    .dot = dot,
};
