#include "threads.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#define JOB_NUMBER (UINT64_C(1) << 32)
#define JOB_CLOSED (UINT64_C(1) << 31)
#define JOB_INSIDE (JOB_CLOSED - 1)

/* A millisecond or two in all: who evaluates token after token finds the threads awake. */
enum { SPINS_BEFORE_YIELD = 2000, YIELDS_BEFORE_SLEEP = 2000 };

/* A thread's part of a job. It does its pieces in order; when its own part is done, it does others'. */
typedef struct share {
  _Alignas(64) _Atomic int32_t next; /* item; a line of the cache of its own */
  int32_t end;
} share;

struct pool {
  pthread_mutex_t owner; /* held from pool_begin to pool_end */
  pthread_mutex_t mutex; /* guards sleeping */
  pthread_cond_t wake;
  pthread_t *threads; /* (n_threads - 1) */
  share *shares;      /* (n_threads) */
  int32_t n_threads, n_started;

  /* One job at a time, all of it in one word: number of the job, whether it is closed, workers inside. A worker enters
   * only an open job, and only those inside are waited for: one that the system did not schedule delays nobody. */
  _Atomic uint64_t state;
  atomic_bool stop;
  _Atomic int32_t n_sleeping;
  int32_t grain;
  pool_task task;
  void *context;
};

typedef struct worker {
  pool *pool;
  int32_t thread;
} worker;

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static void work_on(pool *p, share *s, int32_t thread) {
  for (;;) {
    int32_t begin = atomic_fetch_add_explicit(&s->next, p->grain, memory_order_relaxed);
    if (begin >= s->end) return;
    p->task(p->context, begin, s->end - begin < p->grain ? s->end : begin + p->grain, thread);
  }
}

static void work(pool *p, int32_t thread) {
  for (int32_t i = 0; i < p->n_threads; i++) work_on(p, &p->shares[(thread + i) % p->n_threads], thread);
}

/* Whole pieces, as many to each. */
static void deal_out(pool *p, int32_t n_items) {
  int64_t pieces = (n_items + (int64_t)p->grain - 1) / p->grain;
  for (int32_t t = 0; t < p->n_threads; t++) {
    int64_t begin = pieces * t / p->n_threads * p->grain, end = pieces * (t + 1) / p->n_threads * p->grain;
    atomic_store_explicit(&p->shares[t].next, (int32_t)begin, memory_order_relaxed);
    p->shares[t].end = end < n_items ? (int32_t)end : n_items;
  }
}

static bool job_is_new(const pool *p, uint64_t seen) {
  uint64_t state = atomic_load(&p->state);
  return state / JOB_NUMBER != seen && !(state & JOB_CLOSED);
}

/* Returns when there is an open job other than `seen`, or the pool stops. */
static void wait_for_job(pool *p, uint64_t seen) {
  for (uint32_t turn = 0; !job_is_new(p, seen) && !atomic_load(&p->stop); turn++) {
    if (turn < SPINS_BEFORE_YIELD) {
      relax();
    } else if (turn < SPINS_BEFORE_YIELD + YIELDS_BEFORE_SLEEP) {
      sched_yield();
    } else {
      pthread_mutex_lock(&p->mutex);
      atomic_fetch_add(&p->n_sleeping, 1);
      while (!job_is_new(p, seen) && !atomic_load(&p->stop)) pthread_cond_wait(&p->wake, &p->mutex);
      atomic_fetch_sub(&p->n_sleeping, 1);
      pthread_mutex_unlock(&p->mutex);
    }
  }
}

/* Counts this worker into the open job and stores its number; false where it closed first. */
static bool enter(pool *p, uint64_t *number) {
  uint64_t state = atomic_load(&p->state);
  do {
    if (state & JOB_CLOSED) return false;
  } while (!atomic_compare_exchange_weak(&p->state, &state, state + 1));
  *number = state / JOB_NUMBER;
  return true;
}

static void *worker_main(void *argument) {
  worker self = *(worker *)argument;
  free(argument);
  pool *p = self.pool;
  for (uint64_t seen = 0; !atomic_load(&p->stop); wait_for_job(p, seen)) {
    if (!enter(p, &seen)) continue;
    work(p, self.thread);
    atomic_fetch_sub(&p->state, 1);
  }
  return NULL;
}

pool *pool_new(int32_t n_threads) {
  pool *p = calloc(1, sizeof *p);
  if (!p) return NULL;
  pthread_mutex_init(&p->owner, NULL);
  pthread_mutex_init(&p->mutex, NULL);
  pthread_cond_init(&p->wake, NULL);
  p->n_threads = n_threads;
  atomic_store(&p->state, JOB_CLOSED);
  p->threads = calloc((size_t)n_threads, sizeof *p->threads);
  p->shares = aligned_alloc(_Alignof(share), (size_t)n_threads * sizeof *p->shares);
  bool ok = p->threads != NULL && p->shares != NULL;
  while (ok && p->n_started < n_threads - 1) {
    worker *w = malloc(sizeof *w);
    ok = w != NULL;
    if (ok) {
      *w = (worker){p, p->n_started + 1};
      ok = pthread_create(&p->threads[p->n_started], NULL, worker_main, w) == 0;
      if (ok) p->n_started++;
      else free(w);
    }
  }
  if (ok) return p;
  pool_free(p);
  return NULL;
}

void pool_free(pool *p) {
  if (!p) return;
  pthread_mutex_lock(&p->mutex);
  atomic_store(&p->stop, true);
  pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->mutex);
  for (int32_t i = 0; i < p->n_started; i++) pthread_join(p->threads[i], NULL);
  pthread_mutex_destroy(&p->owner);
  pthread_mutex_destroy(&p->mutex);
  pthread_cond_destroy(&p->wake);
  free(p->shares);
  free(p->threads);
  free(p);
}

int32_t pool_size(const pool *p) { return p->n_threads; }

void pool_begin(pool *p) { pthread_mutex_lock(&p->owner); }

void pool_end(pool *p) { pthread_mutex_unlock(&p->owner); }

void pool_run(pool *p, int32_t n_items, int32_t grain, pool_task task, void *context) {
  if (n_items <= grain || p->n_threads == 1) {
    if (n_items > 0) task(context, 0, n_items, 0);
    return;
  }
  p->grain = grain;
  p->task = task;
  p->context = context;
  deal_out(p, n_items);
  uint64_t number = atomic_load(&p->state) / JOB_NUMBER + 1;
  atomic_store(&p->state, number * JOB_NUMBER); /* sequentially consistent with n_sleeping: no wake-up is lost */
  if (atomic_load(&p->n_sleeping) > 0) {
    pthread_mutex_lock(&p->mutex);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
  }
  work(p, 0);
  atomic_fetch_or(&p->state, JOB_CLOSED);
  for (uint32_t turn = 0; atomic_load(&p->state) & JOB_INSIDE; turn++) {
    if (turn < SPINS_BEFORE_YIELD) relax();
    else sched_yield();
  }
}
