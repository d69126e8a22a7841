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
  attention_shape shape;
  int32_t activation_bits;  /* of matrices that take either: 16 or 8 */
  _Atomic int32_t position; /* tokens evaluated; may be asked for while another thread evaluates */
  int32_t *tokens;          /* (n_ctx) */
  attention_policy policy;
  attention_state *attention;
  batch_buffers buffers;
  struct token_graph {
    void *stages;     /* the backend's, of one token and its logits; NULL until they were written down */
    bool warm;        /* a token was evaluated since the policy was set, so that all its kernels are loaded */
    int32_t failures; /* to write them down */
    uint64_t bytes;   /* that its stages book */
  } graph;
  trace trace;
  _Atomic uint32_t aborts; /* asked for so far */
  uint32_t aborts_before;  /* the running eval, which those that follow are for */
  atomic_flag busy;        /* held while a call changes the session, or copies of it what another one changes */
};

/* forward.c: evaluates 1 <= n <= n_batch tokens at the session's position and advances it; logits (n_logits, n_vocab)
 * of the last n_logits, n_logits <= n. On failure the position and everything before it are as they were. */
int32_t forward(pyllm_session *s, const int32_t *tokens, int32_t n, float *logits, int32_t n_logits,
                const batch_record *record, pyllm_error *err);

/* Forgets the graph of a token, whose stages are about to take other arguments. */
void forward_changed(pyllm_session *s);

/* session.c: moves the position back to `from`; nothing of positions [from, to) can be read afterwards. */
void session_cut(pyllm_session *s, int32_t from, int32_t to);

/* A GPU does one thing after another, so whatever works on its memory takes the model first; on the CPU only evaluating
 * does, for the threads. */
void session_take_device(const pyllm_session *s);
void session_give_device(const pyllm_session *s);

/* One caller at a time works on a session; the second gets an error instead of a corrupted cache. Takes the device. */
int32_t session_enter(pyllm_session *s, pyllm_error *err);
int32_t session_leave(pyllm_session *s, int32_t status);

#endif
