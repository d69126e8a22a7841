/* The threads of one block as fibers. Every fiber runs until it waits or ends; then whatever is complete is let go: a
 * warp operation when all lanes of its mask are there, the barrier when all threads are. When nothing can go on, the
 * kernel is wrong and the launch fails.
 *
 * Blocks run their threads in ascending and descending order by turns, so that a result that hangs on the order, as with
 * a missing barrier, differs between blocks. Likewise two blocks make their late copies when these are waited for, and two
 * at once. */
#include "emu.h"
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sys/mman.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(save, bottom, size)
#define __sanitizer_finish_switch_fiber(save, bottom, size)
#define ASAN_UNPOISON_MEMORY_REGION(at, size)
#endif

dim3 gridDim, blockDim, blockIdx, threadIdx;

/* ---- switching stacks ---- */

#if defined(__x86_64__)
/* Stores the callee-saved registers and the stack pointer, and takes up those stored at `to`. */
typedef void *context;
extern "C" void emu_switch(context *from, context to);
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

static void context_begin(context *c, void *stack, size_t bytes, void (*entry)()) {
  void **top = (void **)((char *)stack + bytes);
  top[-1] = nullptr; /* where entry would return to; keeps the stack aligned as after a call */
  memcpy(&top[-2], &entry, sizeof entry);
  *c = top - 8; /* six registers below */
}
static void context_switch(context *from, context *to) { emu_switch(from, *to); }
#else
#include <ucontext.h>
typedef ucontext_t context;
static void context_begin(context *c, void *stack, size_t bytes, void (*entry)()) {
  getcontext(c);
  c->uc_stack.ss_sp = stack;
  c->uc_stack.ss_size = bytes;
  makecontext(c, entry, 0);
}
static void context_switch(context *from, context *to) { swapcontext(from, to); }
#endif

/* ---- one block ---- */

namespace {
enum { STACK_BYTES = 256 << 10, GUARD_BYTES = 4096, MAX_THREADS = 1024 };
enum state { READY, IN_WARP, IN_BLOCK, DONE, FAILED };

struct late_copy {
  void *to;
  const void *from; /* NULL: zeros */
  size_t bytes;
  int batch;
};

struct fiber {
  context at;
  char *stack;
  enum state state;
  int line;      /* where it waits */
  unsigned mask; /* of its warp operation */
  size_t bytes;  /* handed in */
  dim3 index;
  std::vector<late_copy> copies; /* not made yet */
  int batches;                   /* ended ones */
  alignas(16) unsigned char given[emu::SLOT_BYTES], taken[emu::SLOT_BYTES];
};

/* What is running. Launches take turns: `busy` is held from the first block to the last. */
struct machine {
  std::mutex busy;
  std::vector<fiber> fibers;
  int n_threads, current;
  bool late; /* copies wait */
  context scheduler;
  const void *main_stack;
  size_t main_bytes;
  const std::function<void()> *thread;
  void *shared;
  char failure[256];
} m;

void make(const late_copy &copy) {
  if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
  else memset(copy.to, 0, copy.bytes);
}

fiber &self() { return m.fibers[(size_t)m.current]; }
fiber *warp_of(int thread) { return &m.fibers[(size_t)(thread / emu::WARP * emu::WARP)]; }

void to_scheduler() {
  void *fake = nullptr;
  (void)fake;
  __sanitizer_start_switch_fiber(self().state >= DONE ? nullptr : &fake, m.main_stack, m.main_bytes);
  context_switch(&self().at, &m.scheduler);
  __sanitizer_finish_switch_fiber(fake, &m.main_stack, &m.main_bytes);
}

void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &m.main_stack, &m.main_bytes);
  (*m.thread)();
  self().state = DONE;
  to_scheduler();
}

void resume(int thread) {
  void *fake = nullptr;
  (void)fake;
  m.current = thread;
  threadIdx = self().index;
  __sanitizer_start_switch_fiber(&fake, self().stack, STACK_BYTES);
  context_switch(&m.scheduler, &self().at);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

void need_fibers(int n) {
  while ((int)m.fibers.size() < n) {
    fiber f = {};
    size_t bytes = STACK_BYTES + GUARD_BYTES;
    char *at = (char *)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) abort(); /* a test tool: no memory for stacks is no case to test */
    mprotect(at, GUARD_BYTES, PROT_NONE);
    f.stack = at + GUARD_BYTES;
    m.fibers.push_back(f);
  }
}

void begin_block(size_t shared_bytes) {
  memset(m.shared, 0xff, shared_bytes); /* NaN, -1 */
  for (int i = 0; i < m.n_threads; i++) {
    fiber &f = m.fibers[(size_t)i];
    unsigned t = (unsigned)i;
    f.state = READY;
    f.copies.clear();
    f.batches = 0;
    f.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    ASAN_UNPOISON_MEMORY_REGION(f.stack, STACK_BYTES);
    context_begin(&f.at, f.stack, STACK_BYTES, entry);
  }
}

/* Whether every lane of the fiber's mask waits with it. Lanes that left, or that do not exist, fail the launch. */
bool complete(const fiber *warp, int lanes, const fiber &f) {
  for (int i = 0; i < emu::WARP; i++) {
    if (!(f.mask >> i & 1)) continue;
    if (i >= lanes || warp[i].state == DONE) {
      snprintf(m.failure, sizeof m.failure, "a warp operation at line %d waits for lane %d, which has ended", f.line,
               i);
      return false;
    }
    if (warp[i].state != IN_WARP || warp[i].mask != f.mask || warp[i].line != f.line) return false;
  }
  return true;
}

/* Lets complete warp operations go; true where one went. */
bool release_warp(int first, int lanes) {
  fiber *warp = warp_of(first);
  bool released = false;
  for (int i = 0; i < lanes; i++) {
    if (warp[i].state != IN_WARP || !complete(warp, lanes, warp[i])) continue;
    unsigned mask = warp[i].mask;
    for (int j = 0; j < lanes; j++) {
      if (!(mask >> j & 1)) continue;
      memcpy(warp[j].taken, warp[j].given, warp[j].bytes);
      warp[j].state = READY;
    }
    released = true;
  }
  return released;
}

/* Runs a warp until each of its threads has ended or waits for the block. */
void run_warp(int first, bool backwards) {
  int lanes = m.n_threads - first < emu::WARP ? m.n_threads - first : emu::WARP;
  do {
    for (int i = 0; i < lanes; i++) {
      int thread = first + (backwards ? lanes - 1 - i : i);
      if (m.fibers[(size_t)thread].state == READY) resume(thread);
      if (m.fibers[(size_t)thread].state == FAILED) return;
    }
  } while (release_warp(first, lanes));
}

/* Lets the barrier go when all threads wait at the same one; true when every thread has ended. */
bool release_block() {
  int ended = 0;
  const fiber &first = m.fibers[0];
  for (int i = 0; i < m.n_threads && !*m.failure; i++) {
    const fiber &f = m.fibers[(size_t)i];
    ended += f.state == DONE;
    if (f.state == IN_WARP)
      snprintf(m.failure, sizeof m.failure, "thread %d waits in a warp operation at line %d that others do not reach",
               i, f.line);
    else if (f.state != first.state || (f.state == IN_BLOCK && f.line != first.line))
      snprintf(m.failure, sizeof m.failure,
               "a barrier not all threads reach: thread 0 %s line %d, thread %d %s line %d",
               first.state == DONE ? "ended after" : "waits at", first.line, i,
               f.state == DONE ? "ended after" : "waits at", f.line);
  }
  if (ended < m.n_threads)
    for (int i = 0; i < m.n_threads; i++) m.fibers[(size_t)i].state = READY;
  return ended == m.n_threads;
}

void run_block(bool backwards) {
  int warps = (m.n_threads + emu::WARP - 1) / emu::WARP;
  do {
    for (int i = 0; i < warps && !*m.failure; i++) run_warp((backwards ? warps - 1 - i : i) * emu::WARP, backwards);
  } while (!*m.failure && !release_block());
}
} // namespace

namespace emu {
bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &thread) {
  std::lock_guard<std::mutex> turn(m.busy);
  *m.failure = 0;
  gridDim = grid;
  blockDim = block;
  m.n_threads = (int)(block.x * block.y * block.z);
  if (m.n_threads < 1 || m.n_threads > MAX_THREADS || !grid.x || !grid.y || !grid.z || grid.y > 65535 ||
      grid.z > 65535) {
    snprintf(m.failure, sizeof m.failure, "a grid of (%u, %u, %u) blocks of %d threads", grid.x, grid.y, grid.z,
             m.n_threads);
    return false;
  }
  need_fibers(m.n_threads);
  m.thread = &thread;
  m.shared = malloc(shared_bytes);
  size_t n = (size_t)grid.x * grid.y * grid.z;
  for (size_t i = 0; i < n && !*m.failure; i++) {
    blockIdx = dim3((unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y));
    m.late = i % 4 < 2;
    begin_block(shared_bytes);
    run_block(i % 2 == 1);
  }
  free(m.shared);
  return !*m.failure;
}

const char *failure() { return m.failure; }
void *shared() { return m.shared; }
unsigned lane() { return (unsigned)m.current % WARP; }

void wait_block(int line) {
  self().state = IN_BLOCK;
  self().line = line;
  to_scheduler();
}

void exchange(unsigned mask, const void *value, size_t bytes, int line) {
  if (!(mask >> lane() & 1)) fail("a warp operation whose mask leaves out the calling lane", line);
  fiber &f = self();
  memcpy(f.given, value, bytes);
  f.bytes = bytes;
  f.mask = mask;
  f.line = line;
  f.state = IN_WARP;
  to_scheduler();
}

const void *received(unsigned lane) { return warp_of(m.current)[lane].taken; }

void copy_later(void *to, const void *from, size_t bytes) {
  late_copy copy = {to, from, bytes, self().batches};
  if (m.late) self().copies.push_back(copy);
  else make(copy);
}

void end_copies() { self().batches++; }

void wait_for_copies(int pending) {
  fiber &f = self();
  std::erase_if(f.copies, [&](const late_copy &copy) {
    if (copy.batch >= f.batches - pending) return false;
    make(copy);
    return true;
  });
}

void fail(const char *what, int line) {
  snprintf(m.failure, sizeof m.failure, "%s: line %d, block (%u, %u, %u), thread %d", what, line, blockIdx.x,
           blockIdx.y, blockIdx.z, m.current);
  self().state = FAILED;
  to_scheduler();
  __builtin_unreachable();
}
} // namespace emu
