/* A session: one mutable timeline of tokens over a shared model. */
#ifndef PYLLM_SRC_SESSION_H
#define PYLLM_SRC_SESSION_H
#include "model.h"
#include "record.h"
#include "trace.h"
#include <stdatomic.h>

enum { LOGITS_AT_ONCE = 64 };

/* Activations of one batch, in the backend's memory; all owned by the session. */
typedef struct batch_buffers {
  float *x;             /* (n_batch, dim) the residual stream */
  activation normed;    /* (n_batch, dim) */
  float *q, *k, *v;     /* (n_batch, n_heads * head_dim), (n_batch, n_kv_heads * head_dim) twice */
  activation attended;  /* (n_batch, n_heads * head_dim) */
  float *gate, *up;     /* (n_batch, n_ff) */
  activation hidden;    /* (n_batch, n_ff) */
  float *cosine, *sine; /* (n_batch, n_rot / 2) of the batch's positions */
  float *logits;        /* (min(n_batch, LOGITS_AT_ONCE), n_vocab) on their way to the host; NULL where memory is its */
} batch_buffers;

struct pyllm_session {
  const pyllm_model *model;
  int32_t n_ctx, n_batch, n_sink;
  int32_t position;    /* tokens evaluated */
  int32_t *tokens;     /* (n_ctx) */
  layer_cache *layers; /* (n_layers) */
  attention_policy policy;
  attention_batch attention;
  batch_buffers buffers;
  pyllm_layer_stats *stats; /* (n_layers) */
  trace trace;
  atomic_bool abort;
  atomic_flag busy; /* held while a call changes the session */
};

/* forward.c: evaluates 1 <= n <= n_batch tokens at the session's position and advances it; logits (n_logits, n_vocab)
 * of the last n_logits, n_logits <= n. On failure the position and everything before it are as they were. */
int32_t forward(pyllm_session *s, const int32_t *tokens, int32_t n, float *logits, int32_t n_logits,
                const batch_record *record, pyllm_error *err);

/* kv.c: blocks a head needs for n_ctx tokens, bytes of a block, and where a head's blocks begin. */
int32_t session_blocks(int32_t n_ctx, int32_t n_sink);
uint64_t session_block_bytes(const config *c);
uint16_t *session_head_blocks(const pyllm_session *s, int32_t layer, int32_t kv_head);
/* Moves the position back to `from`: zeroes the keys and values of positions [from, to) and drops moments and sketches that count
 * them, so that nothing stale can be read. */
void session_cut(pyllm_session *s, int32_t from, int32_t to);

/* session.c: one caller at a time changes a session; the second gets an error instead of a corrupted cache. */
int32_t session_enter(pyllm_session *s, pyllm_error *err);
int32_t session_leave(pyllm_session *s, int32_t status);

#endif
