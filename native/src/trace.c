#include "trace.h"
#include <string.h>
#include <time.h>

static const char *const NAMES[N_STAGES] = {"embed",   "norm",        "qkv",   "rope_store", "attend_local",
                                            "select",  "attend_bulk", "audit", "finish",     "attention_out",
                                            "gate_up", "swiglu",      "down",  "logits",     "token"};

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void trace_init(trace *t) {
  memset(t, 0, sizeof *t);
  for (int i = 0; i < N_STAGES; i++) t->stages[i].name = NAMES[i];
}

void trace_begin(trace *t) { t->last = now(); }

void trace_lap(trace *t, enum stage stage, uint64_t bytes) {
  uint64_t time = now();
  t->stages[stage].calls++;
  t->stages[stage].ns += time - t->last;
  t->stages[stage].bytes += bytes;
  t->last = time;
}

uint64_t trace_bytes(const trace *t) {
  uint64_t bytes = 0;
  for (int i = 0; i < N_STAGES; i++) bytes += t->stages[i].bytes;
  return bytes;
}
