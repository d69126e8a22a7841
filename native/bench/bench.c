#include "bench.h"
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void usage(const char *program) {
  fprintf(stderr, "usage: %s [--threads N] [--seconds S] [--passes N] [--mib N] [--isa NAME] [--json]\n", program);
  exit(2);
}

static int available_processors(void) {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

void bench_parse(int argc, char **argv, bench_options *o) {
  if (!o->threads) o->threads = available_processors();
  for (int i = 1; i < argc; i++) {
    const char *name = argv[i];
    if (!strcmp(name, "--json")) {
      o->json = true;
      continue;
    }
    const char *value = ++i < argc ? argv[i] : "";
    if (!strcmp(name, "--threads")) o->threads = atoi(value);
    else if (!strcmp(name, "--seconds")) o->seconds = atof(value);
    else if (!strcmp(name, "--passes")) o->passes = atoi(value);
    else if (!strcmp(name, "--mib")) o->mib = (size_t)atol(value);
    else if (!strcmp(name, "--isa")) o->isa = value;
    else usage(argv[0]);
  }
  bool good = o->threads >= 1 && o->threads <= BENCH_MAX_THREADS && o->seconds > 0 && o->passes >= 1 && o->mib >= 1 &&
              o->mib <= 65536;
  if (!good) usage(argv[0]);
}

void *bench_alloc(size_t bytes) {
  void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) {
    fprintf(stderr, "%zu bytes of memory were refused\n", bytes);
    exit(1);
  }
  memset(memory, 1, bytes);
  return memory;
}

typedef struct measurement {
  double seconds;
  bench_work work;
  void *context;
  pthread_barrier_t *start;
  int thread;
  double rate;
} measurement;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *measure(void *argument) {
  measurement *m = argument;
  double done = m->work(m->context, m->thread), elapsed; /* the first brings code and clock up to speed */
  pthread_barrier_wait(m->start);
  double begin = now();
  done = 0;
  do {
    done += m->work(m->context, m->thread);
    elapsed = now() - begin;
  } while (elapsed < m->seconds);
  m->rate = done / elapsed;
  return NULL;
}

static double one_pass(const bench_options *o, int n_threads, bench_work work, void *context) {
  pthread_barrier_t start;
  pthread_t threads[BENCH_MAX_THREADS];
  measurement m[BENCH_MAX_THREADS];
  double rate = 0;
  pthread_barrier_init(&start, NULL, (unsigned)n_threads);
  for (int i = 0; i < n_threads; i++) {
    m[i] = (measurement){o->seconds, work, context, &start, i, 0};
    if (i && pthread_create(&threads[i], NULL, measure, &m[i])) {
      fprintf(stderr, "thread %d was refused\n", i);
      exit(1);
    }
  }
  measure(&m[0]);
  for (int i = 0; i < n_threads; i++) {
    if (i) pthread_join(threads[i], NULL);
    rate += m[i].rate;
  }
  pthread_barrier_destroy(&start);
  return rate;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

bench_result bench_rate(const bench_options *o, int n_threads, bench_work work, void *context) {
  double *rates = bench_alloc((size_t)o->passes * sizeof *rates);
  for (int i = 0; i < o->passes; i++) rates[i] = one_pass(o, n_threads, work, context);
  qsort(rates, (size_t)o->passes, sizeof *rates, ascending);
  bench_result result = {rates[o->passes - 1], (rates[(o->passes - 1) / 2] + rates[o->passes / 2]) / 2};
  free(rates);
  return result;
}
