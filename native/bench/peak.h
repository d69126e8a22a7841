/* The most multiply-adds per second that this processor does, from registers. Compiled for the machine it runs on. */
#ifndef PYLLM_BENCH_PEAK_H
#define PYLLM_BENCH_PEAK_H

/* One kind of arithmetic; `work` is a bench_work whose units are multiply-adds. */
typedef struct peak {
  const char *name;        /* "int8", "bf16", "f32" */
  const char *instruction; /* what was measured, for people */
  double (*work)(void *context, int thread);
} peak;

/* Ends with a NULL name. */
extern const peak peaks[];

#endif
