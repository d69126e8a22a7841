/* A hook that runs jobs on a pool of threads and checks how their items are dealt out. */
#include "error.h"
#include "hooks.h"
#include "threads.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

enum { MOST_THREADS = 64 };

typedef struct dealt_job {
  int32_t n_items, grain, n_threads;
  _Atomic int32_t *done; /* (n_items) */
  atomic_bool wrong, busy[MOST_THREADS];
} dealt_job;

static void count_items(void *context, int32_t begin, int32_t end, int32_t thread) {
  dealt_job *job = context;
  bool possible = begin >= 0 && begin < end && end <= job->n_items && thread >= 0 && thread < job->n_threads;
  if (!possible || (job->n_items > job->grain && job->n_threads > 1 && end - begin > job->grain) ||
      atomic_exchange(&job->busy[thread], true)) {
    atomic_store(&job->wrong, true);
    return;
  }
  for (int32_t i = begin; i < end; i++) atomic_fetch_add(&job->done[i], 1);
  atomic_store(&job->busy[thread], false);
}

int32_t hook_pool(int32_t n_threads, const int32_t *n_items, const int32_t *grain, int32_t n_jobs, int32_t *done,
                  pyllm_error *err) {
  if (n_threads < 1 || n_threads > MOST_THREADS) return fail(err, PYLLM_ERR_ARGUMENT, "%d threads", (int)n_threads);
  pool *p = pool_new(n_threads);
  if (!p) return fail(err, PYLLM_ERR_MEMORY, "no memory for a pool");
  bool wrong = false;
  pool_begin(p);
  for (int32_t j = 0; j < n_jobs && !wrong; done += n_items[j++]) {
    dealt_job job = {n_items[j], grain[j], n_threads, calloc((size_t)n_items[j] + 1, sizeof *job.done), false, {0}};
    if (job.done) pool_run(p, n_items[j], grain[j], count_items, &job);
    wrong = !job.done || job.wrong;
    for (int32_t i = 0; i < n_items[j] && !wrong; i++) done[i] = job.done[i];
    free(job.done);
  }
  pool_end(p);
  pool_free(p);
  return wrong ? fail(err, PYLLM_ERR_NUMERIC, "a piece too large, out of range, or of a thread that has another") : 0;
}
