/* One persistent pool of threads per model. They wait for work by spinning briefly, so that starting a stage costs well
 * under a microsecond, and sleep a millisecond or two after the last. */
#ifndef PYLLM_CPU_THREADS_H
#define PYLLM_CPU_THREADS_H
#include <stdint.h>

typedef struct pool pool;

/* Does items [begin, end) of a stage; `thread` < n_threads names private scratch. */
typedef void (*pool_task)(void *context, int32_t begin, int32_t end, int32_t thread);

/* n_threads counts the calling thread. NULL when memory or a thread is refused. */
pool *pool_new(int32_t n_threads);
void pool_free(pool *p);
int32_t pool_size(const pool *p);

/* Takes the pool for one evaluation; a second caller waits here until pool_end. */
void pool_begin(pool *p);
void pool_end(pool *p);

/* Runs task over n_items in pieces of `grain`, on every thread, and returns when all are done. A thread begins with its
 * part of the items, in order, the same part of every job: so it reads memory in one stream, and finds near what it wrote
 * in the job before. Then it helps with the others' parts, so which thread does which piece varies; results must not
 * depend on it. Only between pool_begin and pool_end, from the thread that began. */
void pool_run(pool *p, int32_t n_items, int32_t grain, pool_task task, void *context);

#endif
