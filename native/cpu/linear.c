#include "cpu.h"

enum {
  TOKEN_BLOCK = 128,        /* tokens that share one read of a weight tile, at most */
  SMALL_BLOCK = 32,         /* and at least, for unpacking the tile to be worth it */
  BLOCK_BYTES = 300 * 1024, /* of their activations, which should stay in a second-level cache of 512 KiB */
  TILES_PER_PIECE = 4,      /* 64 weight rows */
};

typedef struct linear_run {
  const backend *be;
  const activation *x;
  const linear_job *jobs;
  int32_t n_tokens, token_block;
  int32_t n_tiles;
} linear_run;

static int32_t tokens_of_block(const activation *x) {
  int32_t bytes = x->cols * (x->q.bits ? x->q.bits / 8 + 1 : 4); /* of a token, with scales and sums */
  int32_t n = TOKEN_BLOCK;
  while (n > SMALL_BLOCK && n * (int64_t)bytes > BLOCK_BYTES) n /= 2;
  return n;
}

static void strip_tile(const linear_run *run, const linear_job *job, int32_t tile, int32_t t0, int32_t n) {
  static const float ones[TOKEN_BLOCK] = {[0 ... TOKEN_BLOCK - 1] = 1.0f};
  const matrix *w = job->w;
  int32_t row = tile * TILE_ROWS, n_rows = w->rows - row < TILE_ROWS ? w->rows - row : TILE_ROWS;
  float result[TOKEN_BLOCK * STRIP];
  strips s = {w->strip, 1, w->cols / 2, {w->data + (size_t)tile * w->tile_bytes}, {0}};
  const float *x = run->x->values + (int64_t)t0 * run->x->cols;
  float *out = job->out + (int64_t)t0 * w->rows + row;
  bool whole = n_rows == TILE_ROWS && !job->bias;
  if (whole) {
    run->be->kernels->strip_gemm(n, x, run->x->cols, &s, job->add ? ones : NULL, out, w->rows);
    return;
  }
  run->be->kernels->strip_gemm(n, x, run->x->cols, &s, NULL, result, STRIP);
  for (int32_t t = 0; t < n; t++)
    for (int32_t j = 0; j < n_rows; j++) {
      float *o = out + (int64_t)t * w->rows + j;
      *o = (job->add ? *o : 0.0f) + result[t * STRIP + j] + (job->bias ? job->bias[row + j] : 0.0f);
    }
}

/* n_tiles: 1 or 2 neighbours. */
static void quantized_tiles(const linear_run *run, const linear_job *job, int32_t tile, int32_t n_tiles, int32_t t0,
                            int32_t n) {
  const matrix *w = job->w;
  int32_t row = tile * TILE_ROWS, n_rows = n_tiles * TILE_ROWS;
  if (n_rows > w->rows - row) n_rows = w->rows - row;
  quantized x = quantized_after(&run->x->q, run->x->cols, t0);
  run->be->kernels->tile_gemm(&w->format, w->data + (size_t)tile * w->tile_bytes, w->cols, &x, n,
                              job->bias ? job->bias + row : NULL, n_rows, job->add,
                              job->out + (int64_t)t0 * w->rows + row, w->rows);
}

/* Item: one tile of one of the matrices, for one block of tokens; token blocks outermost. In prefill two
 * neighbouring items of one matrix and block are done together; decode reads one stream of memory per thread. */
static void linear_items(void *context, int32_t begin, int32_t end, int32_t thread) {
  (void)thread;
  const linear_run *run = context;
  for (int32_t i = begin, done; i < end; i += done) {
    int32_t t0 = i / run->n_tiles * run->token_block, tile = i % run->n_tiles;
    int32_t n = run->n_tokens - t0 < run->token_block ? run->n_tokens - t0 : run->token_block;
    const linear_job *job = run->jobs;
    while (tile >= tiles_of_rows(job->w->rows)) tile -= tiles_of_rows(job++->w->rows);
    done = n > 1 && job->w->quantized && i + 1 < end && tile + 1 < tiles_of_rows(job->w->rows) ? 2 : 1;
    if (job->w->quantized) quantized_tiles(run, job, tile, done, t0, n);
    else strip_tile(run, job, tile, t0, n);
  }
}

void cpu_linear(const backend *be, const activation *x, int32_t n, const linear_job *jobs, int32_t n_jobs) {
  linear_run run = {be, x, jobs, n, tokens_of_block(x), 0};
  int32_t n_blocks = (n + run.token_block - 1) / run.token_block;
  for (int32_t i = 0; i < n_jobs; i++) run.n_tiles += tiles_of_rows(jobs[i].w->rows);
  pool_run(be->pool, run.n_tiles * n_blocks, TILES_PER_PIECE, linear_items, &run);
}
