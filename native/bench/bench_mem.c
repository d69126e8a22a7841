/* How fast this machine reads memory: a buffer larger than every cache, by 1 to all threads. */
#include "bench.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef uint64_t wide __attribute__((vector_size(64)));

typedef struct buffer {
  const wide *data;
  size_t n; /* of `data` */
  int threads;
  wide sum[BENCH_MAX_THREADS]; /* so that the reads are not optimized away */
} buffer;

/* Reads this thread's share; units are bytes. */
static double read_share(void *context, int thread) {
  buffer *b = context;
  size_t share = b->n / (size_t)b->threads / 4 * 4;
  const wide *p = b->data + share * (size_t)thread;
  wide s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
  for (size_t i = 0; i < share; i += 4) {
    s0 += p[i];
    s1 += p[i + 1];
    s2 += p[i + 2];
    s3 += p[i + 3];
  }
  b->sum[thread] += s0 + s1 + s2 + s3;
  return (double)(share * sizeof(wide));
}

int main(int argc, char **argv) {
  bench_options o = {.seconds = 0.2, .passes = 7, .mib = 512};
  bench_parse(argc, argv, &o);
  size_t bytes = o.mib << 20;
  buffer *b = bench_alloc(sizeof *b);
  void *data = bench_alloc(bytes);
  *b = (buffer){.data = data, .n = bytes / sizeof(wide)};
  printf(o.json ? "{\"mib\": %zu, \"threads\": [" : "reading %zu MiB\nthreads     best   median  GB/s\n", o.mib);
  for (int n = 1; n <= o.threads; n++) {
    b->threads = n;
    bench_result r = bench_rate(&o, n, read_share, b);
    if (o.json)
      printf("%s{\"threads\": %d, \"best_gb_s\": %.3f, \"median_gb_s\": %.3f}", n > 1 ? ", " : "", n, r.best / 1e9,
             r.median / 1e9);
    else printf("%7d %8.1f %8.1f\n", n, r.best / 1e9, r.median / 1e9);
  }
  if (o.json) printf("]}\n");
  free(data);
  free(b);
  return 0;
}
