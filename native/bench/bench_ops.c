/* The processor's peak multiply-adds per second, and what the library's matrix kernels reach of it, alone: prefill
 * shapes from the caches, decode shapes from a buffer larger than them. */
#include "bench.h"
#include "kernels.h"
#include "peak.h"
#include "quant.h"
#include "sketch.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  COLS = 1024,     /* of a weight matrix */
  TOKENS = 128,    /* of a prefill piece */
  PANEL = 64,      /* query rows of a prefill piece */
  GROUP = 3,       /* query heads that share a key/value head in decode */
  SCORED = 16,     /* query rows that a tile of a prompt has scored */
  HEAD_DIM = 64,   /* of a head */
  CACHED = 1 << 18 /* bytes of weights or keys that a thread goes over in prefill */
};

/* What one thread works on. */
typedef struct thread_data {
  unsigned char *weights;
  size_t at; /* where the next decode step goes on */
} thread_data;

/* One kernel at one shape. */
typedef struct kernel_run {
  const kernels *kernels;
  tile_format format;
  enum strip_type strip;
  int32_t kv_type, page_bits;
  int32_t rows;                      /* tokens, or query rows */
  double work;                       /* multiply-adds of one call and row */
  size_t piece_bytes, weights_bytes; /* of one call; of everything a thread goes over */
  thread_data threads[BENCH_MAX_THREADS];
  quantized x; /* (TOKENS, COLS), what is multiplied */
  quantized x16, x8;
  float *values;
} kernel_run;

/* The next piece of weights; the buffer is gone over again and again. */
static const unsigned char *next_piece(kernel_run *run, int thread) {
  thread_data *t = &run->threads[thread];
  if (t->at + run->piece_bytes > run->weights_bytes) t->at = 0;
  const unsigned char *piece = t->weights + t->at;
  t->at += run->piece_bytes;
  return piece;
}

enum { CALLS = 64 }; /* between two looks at the clock */

/* Weight rows of one call, as the linear stage has it: two tiles for many tokens, one for decode. */
static int32_t tile_rows(const kernel_run *run) { return run->rows > 1 ? 2 * TILE_ROWS : TILE_ROWS; }

static double run_tile(void *context, int thread) {
  kernel_run *run = context;
  float out[TOKENS * 2 * TILE_ROWS];
  int32_t n_rows = tile_rows(run);
  for (int i = 0; i < CALLS; i++)
    run->kernels->tile_gemm(&run->format, next_piece(run, thread), COLS, &run->x, run->rows, NULL, n_rows, false, out,
                            n_rows);
  return CALLS * run->rows * run->work;
}

static double run_strip(void *context, int thread) {
  kernel_run *run = context;
  float out[TOKENS * STRIP];
  for (int i = 0; i < CALLS; i++) {
    strips b = {run->strip, 1, COLS / 2, {next_piece(run, thread)}, {0}};
    run->kernels->strip_gemm(run->rows, run->values, COLS, &b, NULL, out, STRIP);
  }
  return CALLS * run->rows * run->work;
}

static double run_attend(void *context, int thread) {
  kernel_run *run = context;
  float scores[PANEL * KV_BLOCK], alpha[PANEL], out[PANEL * HEAD_DIM] = {0};
  softmax_state state[PANEL];
  int32_t n_valid[PANEL];
  size_t key_bytes = (size_t)key_strip_bytes(run->kv_type, HEAD_DIM),
         value_bytes = (size_t)value_strip_bytes(run->kv_type, HEAD_DIM);
  int16_t words[PANEL * HEAD_DIM];
  float scale[PANEL];
  run->kernels->round_queries(run->values, run->rows, HEAD_DIM, words, scale);
  for (int r = 0; r < PANEL; r++) {
    state[r] = (softmax_state){-1e30f, 0};
    n_valid[r] = KV_BLOCK;
  }
  for (int i = 0; i < CALLS; i++) {
    const unsigned char *k = next_piece(run, thread), *v = k + KV_STRIPS * key_bytes;
    attend_args args = {.rows = run->rows,
                        .head_dim = HEAD_DIM,
                        .n_strips = KV_STRIPS,
                        .kv_type = run->kv_type,
                        .q = run->values,
                        .q_words = words,
                        .q_scale = scale,
                        .n_valid = n_valid,
                        .scores = scores,
                        .alpha = alpha,
                        .state = state,
                        .out = out};
    for (size_t j = 0; j < KV_STRIPS; j++) {
      args.k[j] = k + j * key_bytes;
      args.v[j] = v + j * value_bytes;
      args.next_k[j] = k + run->piece_bytes + j * key_bytes;
    }
    run->kernels->attend_strips(&args);
  }
  return CALLS * run->rows * run->work;
}

static double run_sketch(void *context, int thread) {
  kernel_run *run = context;
  float sums[SCORED * KV_STRIPS], local_mass[SCORED] = {0};
  for (int i = 0; i < CALLS; i++)
    run->kernels->sketch_sums(next_piece(run, thread), run->page_bits, HEAD_DIM, run->values, local_mass, run->rows,
                              sums, KV_STRIPS);
  return CALLS * run->rows * run->work;
}

/* The rates that the kernels are compared with, by name. */
typedef struct report {
  const bench_options *o;
  double int8, f32;
  bool first; /* of the kernels */
} report;

static void print_peaks(report *to) {
  printf(to->o->json ? "\"peaks\": {" : "peak, G multiply-adds/s\n");
  for (const peak *p = peaks; p->name; p++) {
    double rate = bench_rate(to->o, to->o->threads, p->work, NULL).best / 1e9;
    if (!strcmp(p->name, "int8")) to->int8 = rate;
    if (!strcmp(p->name, "f32")) to->f32 = rate;
    if (to->o->json) printf("%s\"%s\": %.3f", p == peaks ? "" : ", ", p->name, rate);
    else printf("  %-6s %8.1f  %s\n", p->name, rate, p->instruction);
  }
  printf(to->o->json ? "}, \"kernels\": [" : "\nkernel, G multiply-adds/s\n");
}

static void measure(report *to, kernel_run *run, const char *kernel, const char *format, bool integers, bool prefill,
                    bench_work work) {
  run->weights_bytes = prefill ? CACHED : (to->o->mib << 20) / (size_t)to->o->threads;
  if (run->weights_bytes < run->piece_bytes) run->weights_bytes = run->piece_bytes;
  for (int i = 0; i < to->o->threads; i++) run->threads[i].at = 0;
  double rate = bench_rate(to->o, to->o->threads, work, run).best / 1e9;
  double ceiling = integers ? to->int8 : to->f32;
  double read = rate / (run->rows * run->work) * (double)run->piece_bytes;
  const char *shape = prefill ? "prefill" : "decode";
  if (to->o->json)
    printf("%s{\"kernel\": \"%s\", \"format\": \"%s\", \"shape\": \"%s\", \"rows\": %d, \"gmac_s\": %.3f, "
           "\"peak\": \"%s\", \"percent\": %.2f, \"gb_s\": %.3f}",
           to->first ? "" : ", ", kernel, format, shape, run->rows, rate, integers ? "int8" : "f32",
           100 * rate / ceiling, read);
  else
    printf("  %-13s %-7s %-8s %8.1f  %5.1f %% of %-5s %7.1f GB/s\n", kernel, format, shape, rate, 100 * rate / ceiling,
           integers ? "int8" : "f32", read);
  fflush(stdout);
  to->first = false;
}

/* Scales of 1 and random quants: f16 1.0 is 0x3c00. */
static void fill_tiles(kernel_run *run, size_t bytes, int n_threads) {
  size_t scales = tile_scale_bytes(&run->format, COLS);
  for (int i = 0; i < n_threads; i++)
    for (size_t at = 0; at + run->piece_bytes <= bytes; at += run->piece_bytes) {
      uint16_t one = 0x3c00;
      for (size_t j = 0; j < scales; j += 2) memcpy(run->threads[i].weights + at + j, &one, 2);
    }
}

static void bench_tiles(report *to, kernel_run *run, size_t bytes) {
  static const int32_t types[] = {TYPE_Q4_0, TYPE_Q4_1, TYPE_Q5_1, TYPE_Q8_0, TYPE_Q2_K,
                                  TYPE_Q3_K, TYPE_Q4_K, TYPE_Q5_K, TYPE_Q6_K, TYPE_IQ4_XS};
  for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
    const quant_type *type = quant_find(types[i]);
    run->format = (tile_format){type->bits, type->group, type->offset, type->scaled, type->has_min};
    for (int prefill = 1; prefill >= 0; prefill--) {
      run->rows = prefill ? TOKENS : 1;
      size_t n_tiles = (size_t)tile_rows(run) / TILE_ROWS;
      run->piece_bytes = tile_bytes(&run->format, COLS);
      fill_tiles(run, bytes, to->o->threads);
      run->piece_bytes *= n_tiles;
      run->work = COLS * tile_rows(run);
      run->x = run->x16;
      measure(to, run, "tile_gemm", type->name, true, prefill, run_tile);
      if (!takes_bytes(&run->format)) continue;
      run->x = run->x8;
      measure(to, run, "tile_gemm_8", type->name, true, prefill, run_tile);
    }
  }
}

/* Random floats of any of the three types: bytes of 0x3c are numbers near 1 in f16, and near 0.01 in the others. */
static void bench_floats(report *to, kernel_run *run, size_t bytes) {
  static const char *const names[] = {[STRIP_F16] = "F16", [STRIP_BF16] = "BF16", [STRIP_F32] = "F32"};
  for (int i = 0; i < to->o->threads; i++) memset(run->threads[i].weights, 0x3c, bytes);
  for (int type = STRIP_F16; type <= STRIP_F32; type++)
    for (int prefill = 1; prefill >= 0; prefill--) {
      run->strip = (enum strip_type)type;
      run->piece_bytes = (size_t)COLS * STRIP * (type == STRIP_F32 ? 4 : 2);
      run->rows = prefill ? TOKENS : 1;
      run->work = COLS * STRIP;
      measure(to, run, "strip_gemm", names[type], false, prefill, run_strip);
    }
}

static void bench_attention(report *to, kernel_run *run) {
  static const char *const names[] = {[PYLLM_KV_F16] = "F16", [PYLLM_KV_Q8_0] = "Q8_0"};
  for (int type = PYLLM_KV_F16; type <= PYLLM_KV_Q8_0; type++)
    for (int prefill = 1; prefill >= 0; prefill--) {
      run->kv_type = type;
      run->piece_bytes = kv_block_bytes(type, HEAD_DIM);
      run->rows = prefill ? PANEL : GROUP;
      run->work = 2 * KV_BLOCK * HEAD_DIM;
      measure(to, run, "attend_strips", names[type], false, prefill, run_attend);
    }
}

/* Of the buffer that bench_floats has filled: pages of halves near 1 and any codes. */
static void bench_sketches(report *to, kernel_run *run) {
  static const int32_t bits[] = {PYLLM_GRADED, 3};
  for (int i = 0; i < 2; i++)
    for (int prefill = 1; prefill >= 0; prefill--) {
      run->page_bits = bits[i];
      run->piece_bytes = sketch_page_bytes(bits[i], HEAD_DIM);
      run->rows = prefill ? SCORED : GROUP;
      run->work = KV_BLOCK * sketch_channels(bits[i], HEAD_DIM);
      measure(to, run, "sketch_sums", bits[i] == PYLLM_GRADED ? "graded" : "3 bits", true, prefill, run_sketch);
    }
}

static quantized new_quantized(int32_t bits) {
  size_t n = (size_t)TOKENS * COLS;
  return (quantized){bits,
                     bench_alloc(n * (size_t)bits / 8),
                     bench_alloc(n / (size_t)act_group(bits) * sizeof(float)),
                     bench_alloc(n / ACT_HALF * sizeof(int32_t)),
                     bench_alloc(n / ACT_HALF * sizeof(float)),
                     bench_alloc(n / ACT_GROUP * sizeof(float))};
}

static void fill_activations(kernel_run *run) {
  size_t n = (size_t)TOKENS * COLS;
  run->values = bench_alloc(n * sizeof(float));
  run->x16 = new_quantized(16);
  run->x8 = new_quantized(8);
  uint32_t random = 1;
  for (size_t i = 0; i < n; i++) {
    random = random * 1664525u + 1013904223u;
    run->values[i] = (float)(random >> 8) * 0x1p-24f - 0.5f;
  }
  for (int t = 0; t < TOKENS; t++) {
    quantized rows[] = {quantized_after(&run->x16, COLS, t), quantized_after(&run->x8, COLS, t)};
    for (int i = 0; i < 2; i++) run->kernels->quantize(run->values + (size_t)t * COLS, COLS, &rows[i]);
  }
}

int main(int argc, char **argv) {
  bench_options o = {.seconds = 0.05, .passes = 5, .mib = 256};
  bench_parse(argc, argv, &o);
  kernel_run *run = bench_alloc(sizeof *run);
  *run = (kernel_run){.kernels = kernels_find(o.isa)};
  if (!run->kernels) {
    fprintf(stderr, "no '%s' here: there are %s\n", o.isa, kernels_available());
    return 2;
  }
  size_t bytes = (o.mib << 20) / (size_t)o.threads;
  if (bytes < CACHED) bytes = CACHED;
  for (int i = 0; i < o.threads; i++) run->threads[i].weights = bench_alloc(bytes);
  fill_activations(run);
  report to = {&o, 0, 0, true};
  printf(o.json ? "{\"isa\": \"%s\", \"threads\": %d, " : "%s kernels, %d threads\n\n", run->kernels->name, o.threads);
  print_peaks(&to);
  bench_tiles(&to, run, bytes);
  bench_floats(&to, run, bytes);
  bench_attention(&to, run);
  bench_sketches(&to, run);
  if (o.json) printf("]}\n");
  for (int i = 0; i < o.threads; i++) free(run->threads[i].weights);
  free(run->values), free(run->x.planes), free(run->x.scale), free(run->x.sum), free(run->x.product);
  free(run);
  return 0;
}
