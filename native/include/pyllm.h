/* pyllm: the native library's one public header.
 *
 * Three opaque things: a `file` (mapped GGUF, metadata and tensor directory), a `model` (weights, read-only,
 * shared by any number of sessions) and a `session` (one mutable timeline of tokens: KV cache, key moments,
 * statistics). cffi parses this same text, so the only preprocessor lines are guards and integer constants.
 *
 * Every function that can fail returns a pyllm_status and, where it is not PYLLM_OK, fills `err` with one sentence
 * naming the file, key or tensor, the offset or shape, and the cause. The library never exits, prints or aborts.
 * Out-parameters are written only on success, but for the caller's arrays: after a failure logits, records, moments and
 * a session's bytes may be part written. Strings are UTF-8. A model holds its file and a session its model: they may be
 * closed in any order, from any thread, once each.
 */
#ifndef PYLLM_H
#define PYLLM_H
#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(default)

#define PYLLM_PAGE 64      /* tokens in a KV block: the unit of storage, moments and bookkeeping */
#define PYLLM_READ_PAGE 16 /* tokens in a strip of a block */

typedef enum pyllm_status {
  PYLLM_OK = 0,
  PYLLM_ERR_ARGUMENT = 1,    /* the caller's mistake: token id out of range, empty prompt, bad threshold */
  PYLLM_ERR_FILE = 2,        /* cannot be opened or mapped */
  PYLLM_ERR_FORMAT = 3,      /* the bytes contradict themselves, the format or the architecture */
  PYLLM_ERR_UNSUPPORTED = 4, /* well-formed, but an architecture, type or version this library does not know */
  PYLLM_ERR_CONTEXT = 5,     /* does not fit the session's context */
  PYLLM_ERR_MEMORY = 6,      /* an allocation was refused */
  PYLLM_ERR_ABORTED = 7,     /* pyllm_session_abort was called */
  PYLLM_ERR_NUMERIC = 8,     /* NaN or infinity in weights or results */
  PYLLM_ERR_DEVICE = 9       /* a GPU, its driver or its library: not there, or failed */
} pyllm_status;

typedef struct pyllm_error {
  int32_t status; /* pyllm_status */
  char message[1020];
} pyllm_error;

typedef struct pyllm_file pyllm_file;
typedef struct pyllm_model pyllm_model;
typedef struct pyllm_session pyllm_session;

/* ---- file: GGUF v2/v3, one part or several (-00001-of-0000N), mapped read-only, fully bounds-checked ---- */

typedef struct pyllm_value {
  const char *key; /* not NUL-terminated, valid while the file is open */
  uint64_t key_size;
  /* 0 u8, 1 i8, 2 u16, 3 i16, 4 u32, 5 i32, 6 f32, 7 bool, 8 string, 9 array, 10 u64, 11 i64, 12 f64 */
  int32_t type;
  int32_t item_type; /* an array's element type; otherwise equal to type */
  uint64_t n;        /* elements; 1 for a scalar */
  const void *data;  /* as in the file: little-endian, unaligned; a string is its u64 length and its bytes */
  uint64_t size;     /* bytes at data */
} pyllm_value;

typedef struct pyllm_tensor {
  const char *name; /* not NUL-terminated, valid while the file is open */
  uint64_t name_size;
  int32_t type; /* ggml type number */
  int32_t n_dims;
  uint64_t shape[4]; /* shape[0] is contiguous; unused dimensions are 1 */
  const void *data;
  uint64_t size;   /* bytes at data */
  uint64_t offset; /* of data in its part's file, for messages */
  int32_t part;    /* which of the paths, 0-based */
} pyllm_tensor;

/* paths: (n_paths) parts of one model in order. */
int32_t pyllm_file_open(const char *const *paths, int32_t n_paths, pyllm_file **out, pyllm_error *err);
void pyllm_file_close(pyllm_file *file);
uint64_t pyllm_file_n_values(const pyllm_file *file);
uint64_t pyllm_file_n_tensors(const pyllm_file *file);
/* i < n; the entries live as long as the file. */
const pyllm_value *pyllm_file_value(const pyllm_file *file, uint64_t i);
const pyllm_tensor *pyllm_file_tensor(const pyllm_file *file, uint64_t i);
/* Tells models apart, other fine-tunes of the same one too: of what the file says of the architecture, and of name,
 * type, shape and some bytes of every tensor. The chat template and the tokenizer do not count. */
uint64_t pyllm_file_fingerprint(const pyllm_file *file);
/* Name of a ggml type number ("Q4_K"), or NULL when this library cannot read it. */
const char *pyllm_type_name(int32_t type);

/* ---- devices ---- */

typedef struct pyllm_device_info {
  char name[128];
  uint64_t free_bytes, total_bytes; /* of its memory */
} pyllm_device_info;

/* device: "cuda" or "cuda:1". PYLLM_ERR_DEVICE, with the reason, where it cannot be used. */
int32_t pyllm_device_get_info(const char *device, pyllm_device_info *out, pyllm_error *err);

/* ---- model ---- */

typedef struct pyllm_model_params {
  int32_t n_threads;  /* 1..256; one pool, shared by the model's sessions */
  const char *isa;    /* "generic", "avx2", "avx512", "avx512vnni", "avx512bf16"; NULL: the best of this processor */
  const char *device; /* "cpu", "cuda", "cuda:1"; NULL for the CPU */
} pyllm_model_params;

typedef struct pyllm_model_info {
  char architecture[32];
  char isa[16];
  int32_t n_layers, n_heads, n_kv_heads, head_dim;
  int32_t dim, n_ff, n_vocab;
  int32_t n_ctx_train;
  int32_t n_threads;
  uint64_t n_params;
  uint64_t weight_bytes;   /* as stored in the file */
  uint64_t resident_bytes; /* held in memory by the model */
} pyllm_model_info;

/* Binds and repacks the weights. */
int32_t pyllm_model_open(const pyllm_file *file, const pyllm_model_params *params, pyllm_model **out, pyllm_error *err);
void pyllm_model_close(pyllm_model *model);
void pyllm_model_get_info(const pyllm_model *model, pyllm_model_info *out);
/* Bytes that opening a model from this file will hold resident: for a check before pyllm_model_open, which refuses a
 * file that this refuses. */
int32_t pyllm_model_memory(const pyllm_file *file, uint64_t *bytes, pyllm_error *err);

/* ---- session ---- */

typedef struct pyllm_session_params {
  int32_t n_ctx;   /* tokens the KV cache can hold; of a model with a sliding window no more than that */
  int32_t n_batch; /* tokens evaluated at once in prefill, 1..4096 */
  int32_t n_sink;  /* 0..PYLLM_PAGE attention sinks; fixed for the session, because pages start behind them */
  int32_t
      kv_window; /* on a GPU: keys and values of so many last tokens, of a batch and of the sinks lie in its memory, all
                        others in the host's, where it reads them; 0: all in its memory */
  int32_t kv_type; /* enum pyllm_kv_type; what a saved session has, too */
  /* What activations are rounded to on their way into quantized weights: 16; or 8, on the CPU alone, for those of
   * attention's output and of the feed-forward network that have at most 6 bits. */
  int32_t activation_bits;
} pyllm_session_params;

/* What the KV cache holds: halves; or bytes, each key's with a scale for every 32 dimensions, as blocks of Q8_0,
 * each value's with one scale. Bytes need heads of a multiple of 32 dimensions, and the CPU. Layers whose keys have
 * biases that would round the rest of a key away (above 32) have halves in either case. */
enum pyllm_kv_type { PYLLM_KV_F16 = 0, PYLLM_KV_Q8_0 = 1 };

enum pyllm_policy { PYLLM_DENSE = 0, PYLLM_WINDOW = 1, PYLLM_STATIC = 2, PYLLM_ORACLE = 3, PYLLM_ADAPTIVE = 4 };
enum pyllm_granularity { PYLLM_HEAD = 0, PYLLM_GROUP = 1 };
/* G(s^2, N), what adaptive adds for the variance s^2 of scores: s^2 / 2 as of infinitely many Gaussian keys, or less
 * as of N of them: frozen at its largest draw, or truncated there. */
enum pyllm_gaussian { PYLLM_LOGNORMAL = 0, PYLLM_FROZEN = 1, PYLLM_TRUNCATED = 2 };
/* The bulk mass is ln N + c q.mu plus G; or plus a regression b0 + b1 s^2 + b2 s per head; or the larger of both. */
enum pyllm_estimate { PYLLM_GAUSSIAN = 0, PYLLM_REGRESSION = 1, PYLLM_MAXIMUM = 2 };

/* A page_bits of its own: see pyllm_attention. */
enum { PYLLM_GRADED = 1 };

/* How attention decides what to read, for tokens evaluated from now on. Arrays are copied. */
typedef struct pyllm_attention {
  int32_t policy;          /* enum pyllm_policy */
  int32_t granularity;     /* enum pyllm_granularity */
  int32_t n_window;        /* tokens of the local window, >= 1 */
  const float *thresholds; /* (n_layers, n_heads): a head is local iff sigmoid(L - M) >= threshold; oracle, adaptive */
  const uint8_t *static_local; /* (n_layers, n_heads): 1 where a head is always local; static */
  int32_t gaussian, estimate;  /* enum pyllm_gaussian, enum pyllm_estimate; adaptive */
  const float *coefficients;   /* (n_layers, n_heads, 3): b0, b1, b2; regression and maximum */
  /* (n_layers, n_kv_heads, head_dim), (n_layers, n_kv_heads, head_dim, head_dim): mean and covariance (ddof 0) of keys
   * after RoPE, from other text; both NULL: those of the bulk itself. */
  const float *means, *covariances;
  /* What a long head reads: with page_bits 0 the whole bulk; with 2, 3 or 4, that many bits of its keys are
   * sketched, or with PYLLM_GRADED 4 bits of a quarter of their channels and 2 of another quarter; and it reads the
   * strips of 16 tokens whose estimated share of attention exceeds a cut: in decode for some long head of its group,
   * in prefill for some query of its tile. The cut is page_share, of a query that is a tile by itself, as in decode,
   * decode_share; it is halved for a query and head until the shares it leaves out sum to at most page_drop (>= 1:
   * no bound), but at most 16 times. Query tiles share what they read, so with page_bits results depend on how a
   * prompt is cut into batches. */
  int32_t page_bits;
  float page_share, decode_share, page_drop;
  /* (n_layers, n_kv_heads, head_dim): each head's channels, first those that move scores most; PYLLM_GRADED. */
  const uint16_t *channels;
  /* Of a token that is a batch by itself, under PYLLM_GRADED, one value per page stands for the page's strips that
   * are not read, and counts page_rest, 0..1, times their estimated weight (0: nothing stands for them, as where
   * more than 64 heads share a key/value head). It is the mean of the page's values as the usual query weighs them,
   * the mean of the queries on other text, after RoPE: query_means (n_layers, n_kv_heads, head_dim), which
   * PYLLM_GRADED needs whatever page_rest. */
  float page_rest;
  const float *query_means;
} pyllm_attention;

/* What was decided and why, for the n tokens of one eval. Arrays of the caller, valid during the call; each may be
 * NULL. Entries are written as layers are evaluated; after a failure those of the unfinished batch mean nothing.
 * Decisions and logits are the same with a record and without. */
typedef struct pyllm_record {
  const uint8_t *audit; /* (n) 1: also compute this token's true bulk masses, from all its bulk keys; NULL: none */
  /* (n_layers, n, n_heads); masses are the logsumexp of the scores over ... */
  float *local_mass; /* sinks and window: L */
  float *estimate;  /* the bulk, as the policy takes it: adaptive's estimate, oracle's truth; NaN where there is none */
  float *true_mass; /* the bulk: M; NaN where the token is not audited or has no bulk */
  float *read_mass; /* all that was read: sinks, window and what a long head read of the bulk, without page_rest */
  float *mean_score; /* mean c q.mu of the bulk's scores, by the moments that adaptive takes; NaN where there is none */
  float *deviation;  /* their standard deviation s, likewise */
  uint8_t *is_long;  /* (n_layers, n, n_heads) 1 where the head is long; 0 without a bulk */
  float *queries;    /* (n_layers, n, n_heads, head_dim) after RoPE, not scaled */
} pyllm_record;

typedef struct pyllm_session_memory {
  uint64_t kv_bytes;   /* keys and values, when the context is full */
  uint64_t host_bytes; /* of the host's memory, where the device is a GPU and kv_window is not 0; the others are its */
  uint64_t moment_bytes;  /* running means and covariances of the bulk keys */
  uint64_t sketch_bytes;  /* the key sketch of the page tier, and values that stand for pages */
  uint64_t scratch_bytes; /* activations of one batch */
} pyllm_session_memory;

typedef struct pyllm_layer_stats {
  uint64_t pairs, pairs_local; /* (query, head) pairs that had a bulk; of these called local */
  uint64_t work, work_done; /* multiply-adds of bulk scores and values: dense attention's; done, the sketch's included:
                                  of scores, and of values that stand for pages */
  uint64_t bytes, bytes_read; /* bulk key and value bytes per (query, key/value head): dense attention's; read, the
                                  sketch's included */
  uint64_t pages, pages_read; /* strips in the bulk of (query, key/value head) pairs with a long head; of these read */
  uint64_t work_sketch;       /* of work_done: the sketch's */
} pyllm_layer_stats;

typedef struct pyllm_stage_stats {
  const char *name;
  uint64_t calls, ns;
  uint64_t bytes; /* of weights, once per batch, and of the KV cache's bulk; 0 where it is not counted */
} pyllm_stage_stats;

/* Bytes a session with these parameters needs under policies of page_bits: for a check before
 * pyllm_session_open, which takes all but the sketch. */
int32_t pyllm_session_memory_needed(const pyllm_model *model, const pyllm_session_params *params, int32_t page_bits,
                                    pyllm_session_memory *out, pyllm_error *err);
int32_t pyllm_session_open(const pyllm_model *model, const pyllm_session_params *params, pyllm_session **out,
                           pyllm_error *err);
void pyllm_session_close(pyllm_session *session);
/* PYLLM_DENSE with the default window until this is called. */
int32_t pyllm_session_set_attention(pyllm_session *session, const pyllm_attention *attention, pyllm_error *err);

/* Evaluates tokens (n >= 1) after those already there. logits: (n_logits, n_vocab) of the last n_logits tokens,
 * 0 <= n_logits <= n. record: filled with what attention decided; NULL for none. On failure the
 * session holds a whole number of batches of the tokens, after PYLLM_ERR_NUMERIC none of them, and stays usable. Every
 * token's results are checked, of those without logits too. */
int32_t pyllm_session_eval(pyllm_session *session, const int32_t *tokens, int32_t n, float *logits, int32_t n_logits,
                           const pyllm_record *record, pyllm_error *err);
/* Drops every token from position n on. */
int32_t pyllm_session_rewind(pyllm_session *session, int32_t n, pyllm_error *err);
/* Rewinds to the longest common prefix with tokens, but not past n - 1, so that evaluating the rest gives logits. */
int32_t pyllm_session_sync(pyllm_session *session, const int32_t *tokens, int32_t n, int32_t *n_kept, pyllm_error *err);
int32_t pyllm_session_position(const pyllm_session *session);
/* The first n tokens of position: out (n). */
int32_t pyllm_session_tokens(pyllm_session *session, int32_t *out, int32_t n, pyllm_error *err);
/* From any thread: a running eval of this session returns PYLLM_ERR_ABORTED before its next layer, one
 * that waits for the device too. */
void pyllm_session_abort(pyllm_session *session);

/* out: (n_layers). Counts since the session was opened, of whole batches where nothing evaluates meanwhile. */
void pyllm_session_layer_stats(const pyllm_session *session, pyllm_layer_stats *out);
/* Writes up to n stages, returns how many there are. From any thread, at any time. */
int32_t pyllm_session_stage_stats(const pyllm_session *session, pyllm_stage_stats *out, int32_t n);
/* Moments of the first n_pages bulk pages of one key/value head, ddof 0.
 * mean: (head_dim), cov: (head_dim, head_dim). */
int32_t pyllm_session_moments(pyllm_session *session, int32_t layer, int32_t kv_head, int32_t n_pages, float *mean,
                              float *cov, pyllm_error *err);

/* Tokens and KV cache as bytes, for the same model and n_sink. load replaces the session's contents. */
uint64_t pyllm_session_state_size(const pyllm_session *session);
int32_t pyllm_session_save(pyllm_session *session, void *buffer, uint64_t size, pyllm_error *err);
int32_t pyllm_session_load(pyllm_session *session, const void *buffer, uint64_t size, pyllm_error *err);

/* ---- sampling ---- */

typedef struct pyllm_sampling {
  float temperature;                         /* <= 0: greedy */
  int32_t top_k;                             /* <= 0: off */
  float top_p;                               /* >= 1: off */
  float min_p;                               /* <= 0: off */
  float repeat_penalty;                      /* 1: off; over the recent tokens */
  float frequency_penalty, presence_penalty; /* 0: off */
} pyllm_sampling;

/* Draws from logits (n_vocab). Order: penalties, top_k, top_p, min_p, temperature.
 * rng: the caller's state, advanced. */
int32_t pyllm_sample(const float *logits, int32_t n_vocab, const pyllm_sampling *params, const int32_t *recent,
                     int32_t n_recent, uint64_t *rng, int32_t *token, pyllm_error *err);

#pragma GCC visibility pop
#endif
