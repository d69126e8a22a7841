/* Where an evaluation's time goes: the time between two laps belongs to the stage the second names. */
#ifndef PYLLM_SRC_TRACE_H
#define PYLLM_SRC_TRACE_H
#include "pyllm.h"

enum stage {
  STAGE_EMBED,
  STAGE_NORM,
  STAGE_QKV,
  STAGE_ROPE,
  STAGE_ATTEND_LOCAL,
  STAGE_SELECT,
  STAGE_ATTEND_BULK,
  STAGE_AUDIT,
  STAGE_FINISH,
  STAGE_ATTENTION_OUT,
  STAGE_GATE_UP,
  STAGE_SWIGLU,
  STAGE_DOWN,
  STAGE_LOGITS,
  STAGE_TOKEN, /* all stages of one token, where they are one launch */
  N_STAGES
};

/* Read while another thread counts. */
typedef struct stage_counts {
  _Atomic uint64_t calls, ns, bytes;
} stage_counts;

typedef struct trace {
  stage_counts stages[N_STAGES];
  uint64_t last; /* nanoseconds */
} trace;

void trace_begin(trace *t);
void trace_lap(trace *t, enum stage stage, uint64_t bytes);
pyllm_stage_stats trace_stage(const trace *t, enum stage stage);
/* Of all stages so far. */
uint64_t trace_bytes(const trace *t);

#endif
