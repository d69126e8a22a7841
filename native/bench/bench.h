/* What the benchmark programs share: options, and rates measured on several threads at once. */
#ifndef PYLLM_BENCH_BENCH_H
#define PYLLM_BENCH_BENCH_H
#include <stdbool.h>
#include <stddef.h>

enum { BENCH_MAX_THREADS = 256 };

typedef struct bench_options {
  int threads;     /* default: the processors this process may use */
  double seconds;  /* of one measurement */
  int passes;      /* measurements of one thing */
  size_t mib;      /* of the buffer that is larger than every cache */
  const char *isa; /* of the library's kernels; NULL for the best there is */
  bool json;
} bench_options;

/* Reads the command line over the defaults in o; prints the usage and exits where it is wrong. */
void bench_parse(int argc, char **argv, bench_options *o);

/* Does a piece of work as thread `thread`, and returns how many units it was. */
typedef double (*bench_work)(void *context, int thread);

typedef struct bench_result {
  double best, median; /* units per second, all threads together */
} bench_result;

/* Repeats work on n_threads threads for o->seconds, o->passes times. */
bench_result bench_rate(const bench_options *o, int n_threads, bench_work work, void *context);

/* 64-byte aligned memory, every page touched; exits where it is refused. */
void *bench_alloc(size_t bytes);

#endif
