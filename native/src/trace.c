#include "trace.h"
#include <stdatomic.h>
#include <time.h>

static const char *const NAMES[N_STAGES] = {"embed",   "norm",        "qkv",   "rope_store", "attend_local",
                                            "select",  "attend_bulk", "audit", "finish",     "attention_out",
                                            "gate_up", "swiglu",      "down",  "logits",     "token"};

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t value(const _Atomic uint64_t *count) { return atomic_load_explicit(count, memory_order_relaxed); }

/* One thread counts at a time: no need to lock the bus for it. */
static void add(_Atomic uint64_t *count, uint64_t n) {
  atomic_store_explicit(count, value(count) + n, memory_order_relaxed);
}

void trace_begin(trace *t) { t->last = now(); }

void trace_lap(trace *t, enum stage stage, uint64_t bytes) {
  uint64_t time = now();
  stage_counts *counts = &t->stages[stage];
  add(&counts->calls, 1);
  add(&counts->ns, time - t->last);
  add(&counts->bytes, bytes);
  t->last = time;
}

pyllm_stage_stats trace_stage(const trace *t, enum stage stage) {
  const stage_counts *counts = &t->stages[stage];
  return (pyllm_stage_stats){NAMES[stage], value(&counts->calls), value(&counts->ns), value(&counts->bytes)};
}

uint64_t trace_bytes(const trace *t) {
  uint64_t bytes = 0;
  for (int i = 0; i < N_STAGES; i++) bytes += value(&t->stages[i].bytes);
  return bytes;
}
