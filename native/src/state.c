/* Looking into a session, and a session as bytes:
 *   header, tokens i32 (position), then per layer and key/value head the blocks that hold tokens, as they are. */
#include "session.h"
#include "error.h"
#include "fingerprint.h"
#include <string.h>

enum { STATE_VERSION = 3 };

typedef struct state_header {
  char magic[8]; /* "pyllmkv\0" */
  uint32_t version;
  int32_t n_sink, position;
  int32_t kv_type;
  uint64_t model;    /* pyllm_file_fingerprint */
  uint64_t checksum; /* of everything behind the header */
} state_header;

/* Blocks of one head that hold the first `position` tokens. */
static int32_t head_blocks(const pyllm_session *s, int32_t position) {
  return position ? kv_block_of(s->shape.n_sink, position - 1) + 1 : 0;
}

/* The same of a layer, in bytes. */
static uint64_t head_bytes(const pyllm_session *s, int32_t layer, int32_t position) {
  return (uint64_t)head_blocks(s, position) *
         kv_block_bytes(attention_kv_type(&s->shape, layer), s->model->config.head_dim);
}

static uint64_t state_bytes(const pyllm_session *s, int32_t position) {
  const config *c = &s->model->config;
  uint64_t bytes = sizeof(state_header) + (uint64_t)position * sizeof(int32_t);
  for (int32_t i = 0; i < c->n_layers; i++) bytes += (uint64_t)c->n_kv_heads * head_bytes(s, i, position);
  return bytes;
}

uint64_t pyllm_session_state_size(const pyllm_session *s) { return state_bytes(s, s->position); }

static int32_t save(const pyllm_session *s, void *buffer, uint64_t size, pyllm_error *err) {
  int32_t position = s->position, blocks = head_blocks(s, position);
  uint64_t needed = state_bytes(s, position);
  if (size < needed)
    return fail(err, PYLLM_ERR_ARGUMENT, "saving the session needs %llu bytes, the buffer has %llu",
                (unsigned long long)needed, (unsigned long long)size);
  unsigned char *at = (unsigned char *)buffer + sizeof(state_header);
  memcpy(at, s->tokens, (size_t)position * sizeof(int32_t));
  at += (size_t)position * sizeof(int32_t);
  const backend *be = &s->model->backend;
  for (int32_t i = 0; i < s->model->config.n_layers; i++)
    for (int32_t g = 0; g < s->model->config.n_kv_heads; g++, at += head_bytes(s, i, position))
      be->ops->attention->read_blocks(be, s->attention, i, g, blocks, at);
  int32_t status = be->ops->sync(be, err);
  if (status) return status;
  state_header h = {
      "pyllmkv", STATE_VERSION, s->shape.n_sink, position, s->shape.kv_type, pyllm_file_fingerprint(s->model->file), 0};
  h.checksum = checksum_bytes((unsigned char *)buffer + sizeof h, needed - sizeof h);
  memcpy(buffer, &h, sizeof h);
  return PYLLM_OK;
}

int32_t pyllm_session_save(pyllm_session *s, void *buffer, uint64_t size, pyllm_error *err) {
  int32_t status = session_enter(s, err);
  return status ? status : session_leave(s, save(s, buffer, size, err));
}

/* bytes: tokens i32 (n). */
static int32_t check_tokens(const pyllm_session *s, const unsigned char *bytes, int32_t n, pyllm_error *err) {
  for (int32_t i = 0; i < n; i++) {
    int32_t token;
    memcpy(&token, bytes + (size_t)i * sizeof token, sizeof token);
    if (token < 0 || token >= s->model->config.n_vocab)
      return fail(err, PYLLM_ERR_FORMAT, "saved session: token %d at position %d is not in the vocabulary of %d", token,
                  i, s->model->config.n_vocab);
  }
  return PYLLM_OK;
}

static const char *kv_type_name(int32_t kv_type) {
  return kv_type == PYLLM_KV_F16 ? "f16" : kv_type == PYLLM_KV_Q8_0 ? "q8_0" : "unknown";
}

static int32_t check_state(const pyllm_session *s, const state_header *h, const void *buffer, uint64_t size,
                           pyllm_error *err) {
  if (memcmp(h->magic, "pyllmkv", 8) != 0)
    return fail(err, PYLLM_ERR_FORMAT, "not a saved session: it does not begin with 'pyllmkv'");
  if (h->version != STATE_VERSION)
    return fail(err, PYLLM_ERR_UNSUPPORTED, "saved session of version %u, this library reads %d", h->version,
                STATE_VERSION);
  if (h->model != pyllm_file_fingerprint(s->model->file))
    return fail(err, PYLLM_ERR_FORMAT, "saved session of another model");
  if (h->n_sink != s->shape.n_sink)
    return fail(err, PYLLM_ERR_FORMAT, "saved session with %d sinks, this one has %d", h->n_sink, s->shape.n_sink);
  if (h->kv_type != s->shape.kv_type)
    return fail(err, PYLLM_ERR_FORMAT, "saved session of kv_type %s, this one's is %s", kv_type_name(h->kv_type),
                kv_type_name(s->shape.kv_type));
  if (h->position < 0 || h->position > s->shape.n_ctx)
    return fail(err, PYLLM_ERR_CONTEXT, "saved session of %d tokens does not fit the context of %d", h->position,
                s->shape.n_ctx);
  if (size != state_bytes(s, h->position))
    return fail(err, PYLLM_ERR_FORMAT, "saved session of %d tokens has %llu bytes, expected %llu", h->position,
                (unsigned long long)size, (unsigned long long)state_bytes(s, h->position));
  if (h->checksum != checksum_bytes((const unsigned char *)buffer + sizeof *h, size - sizeof *h))
    return fail(err, PYLLM_ERR_FORMAT, "saved session is damaged: its checksum does not match");
  return check_tokens(s, (const unsigned char *)buffer + sizeof *h, h->position, err);
}

static int32_t load(pyllm_session *s, const void *buffer, uint64_t size, pyllm_error *err) {
  state_header h;
  if (size < sizeof h)
    return fail(err, PYLLM_ERR_FORMAT, "saved session is truncated: %llu bytes", (unsigned long long)size);
  memcpy(&h, buffer, sizeof h);
  int32_t status = check_state(s, &h, buffer, size, err);
  if (status) return status;
  const unsigned char *at = (const unsigned char *)buffer + sizeof h;
  session_cut(s, 0, s->position);
  memcpy(s->tokens, at, (size_t)h.position * sizeof(int32_t));
  at += (size_t)h.position * sizeof(int32_t);
  const backend *be = &s->model->backend;
  for (int32_t i = 0; i < s->model->config.n_layers; i++)
    for (int32_t g = 0; g < s->model->config.n_kv_heads; g++, at += head_bytes(s, i, h.position))
      be->ops->attention->write_blocks(be, s->attention, i, g, head_blocks(s, h.position), at);
  status = be->ops->sync(be, err);
  if (!status) s->position = h.position;
  return status;
}

int32_t pyllm_session_load(pyllm_session *s, const void *buffer, uint64_t size, pyllm_error *err) {
  int32_t status = session_enter(s, err);
  return status ? status : session_leave(s, load(s, buffer, size, err));
}

static int32_t moments(pyllm_session *s, int32_t layer, int32_t kv_head, int32_t n_pages, float *mean, float *cov,
                       pyllm_error *err) {
  const config *c = &s->model->config;
  if (layer < 0 || layer >= c->n_layers || kv_head < 0 || kv_head >= c->n_kv_heads)
    return fail(err, PYLLM_ERR_ARGUMENT, "layer %d, key/value head %d: the model has %d and %d", layer, kv_head,
                c->n_layers, c->n_kv_heads);
  if (n_pages < 1 || s->shape.n_sink + (int64_t)n_pages * PYLLM_PAGE > s->position)
    return fail(err, PYLLM_ERR_ARGUMENT, "%d pages behind %d sinks are not all in a session at position %d", n_pages,
                s->shape.n_sink, s->position);
  const backend *be = &s->model->backend;
  be->ops->attention->read_moments(be, s->attention, layer, kv_head, n_pages, mean, cov);
  return be->ops->sync(be, err);
}

int32_t pyllm_session_moments(pyllm_session *s, int32_t layer, int32_t kv_head, int32_t n_pages, float *mean,
                              float *cov, pyllm_error *err) {
  int32_t status = session_enter(s, err);
  return status ? status : session_leave(s, moments(s, layer, kv_head, n_pages, mean, cov, err));
}
