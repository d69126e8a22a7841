/* The CUDA backend's table, its devices and its memory. */
#include "cuda.cuh"
#include <cstdio>
#include <new>
extern "C" {
#include "backend.h"
#include "error.h"
}

queue *cuda_enter(const backend *be) {
  device *d = (device *)be->device;
  check(&d->queue, cudaSetDevice(d->number));
  return &d->queue;
}

enum { EMBEDDINGS = 64 }; /* where they begin in the staging memory */

namespace {
int32_t cuda_fail(pyllm_error *err, cudaError_t error, const char *what) {
  cudaGetLastError(); /* so that it is not reported twice */
  return fail(err, error == cudaErrorMemoryAllocation ? PYLLM_ERR_MEMORY : PYLLM_ERR_DEVICE, "%s: %s", what,
              cudaGetErrorString(error));
}

/* Stands for all kernels of this library, which are built for the same GPUs. */
__global__ void any_kernel() {}

/* Whether the current device, of this number, can run them: told before weights are on their way to it. */
int32_t check_kernels(int32_t number, pyllm_error *err) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
  if (!error) return PYLLM_OK;
  cudaDeviceProp card = {};
  cudaGetDeviceProperties(&card, number);
  cudaGetLastError();
  return fail(err, PYLLM_ERR_DEVICE,
              "CUDA cannot be used: the library has no kernels for %.127s, of compute capability %d.%d (%s)", card.name,
              card.major, card.minor, cudaGetErrorString(error));
}

int32_t use(int32_t number, pyllm_error *err) {
  int n = 0;
  cudaError_t error = cudaGetDeviceCount(&n);
  if (error == cudaErrorInsufficientDriver)
    return fail(err, PYLLM_ERR_DEVICE, "CUDA cannot be used: no NVIDIA driver is installed, or one older than CUDA %d",
                CUDART_VERSION / 1000);
  if (error) return cuda_fail(err, error, "CUDA cannot be used");
  if (number >= n) return fail(err, PYLLM_ERR_DEVICE, "CUDA device %d is not there: this machine has %d", number, n);
  error = cudaSetDevice(number);
  return error ? cuda_fail(err, error, "CUDA cannot be used") : check_kernels(number, err);
}

int32_t info(int32_t number, pyllm_device_info *out, pyllm_error *err) {
  int32_t status = use(number, err);
  if (status) return status;
  cudaDeviceProp properties;
  size_t free_bytes, total_bytes;
  cudaError_t error = cudaGetDeviceProperties(&properties, number);
  if (!error) error = cudaMemGetInfo(&free_bytes, &total_bytes);
  if (error) return cuda_fail(err, error, "CUDA cannot be used");
  *out = {};
  snprintf(out->name, sizeof out->name, "%.127s", properties.name);
  out->free_bytes = free_bytes;
  out->total_bytes = total_bytes;
  return PYLLM_OK;
}

void close(void *opened) {
  device *d = (device *)opened;
  cudaSetDevice(d->number);
  if (d->queue.stream) cudaStreamDestroy(d->queue.stream);
  cudaFree(d->step);
  cudaFreeHost(d->staging);
  delete d;
}

int32_t open(int32_t number, void **opened, pyllm_error *err) {
  int32_t status = use(number, err);
  if (status) return status;
  device *d = new (std::nothrow) device{};
  if (!d) return fail(err, PYLLM_ERR_MEMORY, "memory for device cuda:%d was refused", number);
  d->number = number;
  cudaError_t error = cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount, number);
  if (!error) error = cudaStreamCreateWithFlags(&d->queue.stream, cudaStreamNonBlocking);
  if (!error) error = cudaMalloc((void **)&d->step, sizeof *d->step);
  if (!error) error = cudaHostAlloc((void **)&d->staging, d->staging_bytes = EMBEDDINGS, 0);
  if (error) {
    close(d);
    return cuda_fail(err, error, "CUDA cannot be used");
  }
  *opened = d;
  return PYLLM_OK;
}

void *alloc(const backend *be, size_t bytes) {
  queue *q = cuda_enter(be);
  void *memory;
  if (q->error || cudaMalloc(&memory, bytes ? bytes : 1)) {
    cudaGetLastError();
    return nullptr;
  }
  check(q, cudaMemsetAsync(memory, 0, bytes, q->stream));
  return memory;
}

void release(const backend *be, void *memory) {
  cuda_enter(be);
  cudaFree(memory);
}

/* cudaMemcpyDefault: the GPU's addresses may be of mapped memory of the host. */
void copy(const backend *be, void *to, const void *from, size_t bytes) {
  queue *q = cuda_enter(be);
  if (!q->error) check(q, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, q->stream));
  if (!q->error) check(q, cudaStreamSynchronize(q->stream));
}

void write(const backend *be, void *to, const void *from, size_t bytes) { copy(be, to, from, bytes); }

void read(const backend *be, void *to, const void *from, size_t bytes) {
  copy(be, to, from, bytes);
  if (queue_of(be)->error) memset(to, 0, bytes); /* nothing came */
}

int32_t sync(const backend *be, pyllm_error *err) {
  queue *q = cuda_enter(be);
  if (!q->error) check(q, cudaStreamSynchronize(q->stream));
  if (!q->error) return PYLLM_OK;
  bool lasting = cudaStreamSynchronize(q->stream) != cudaSuccess; /* as after an illegal address, for all models */
  return cuda_fail(err, q->error,
                   lasting ? "the GPU failed; this process must be started again"
                           : "the GPU failed; the model must be opened again");
}
} // namespace

static void graph_begin(const backend *be) {
  queue *q = cuda_enter(be);
  ((device *)be->device)->writing = !q->error;
  if (!q->error) check(q, cudaStreamBeginCapture(q->stream, cudaStreamCaptureModeThreadLocal));
}

/* A failure since graph_begin is forgotten: whatever it was, such as another thread that waits for the whole device,
 * nothing has run. */
static void *graph_end(const backend *be) {
  queue *q = queue_of(be);
  cudaGraph_t written = nullptr;
  cudaGraphExec_t graph = nullptr;
  if (!((device *)be->device)->writing) return nullptr;
  check(q, cudaStreamEndCapture(q->stream, &written));
  if (!q->error) check(q, cudaGraphInstantiate(&graph, written, 0));
  /* Its memory is taken now, where its refusal is no failure of a token. */
  if (!q->error) check(q, cudaGraphUpload(graph, q->stream));
  if (!q->error) check(q, cudaStreamSynchronize(q->stream));
  if (written) cudaGraphDestroy(written);
  if (q->error) {
    cudaGetLastError();
    if (graph) cudaGraphExecDestroy(graph);
    graph = nullptr;
  }
  q->error = cudaSuccess;
  return graph;
}

static bool graph_run(const backend *be, void *graph) {
  queue *q = cuda_enter(be);
  if (q->error) return true; /* what follows the first error does nothing */
  cudaError_t error = cudaGraphLaunch((cudaGraphExec_t)graph, q->stream);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return false;
  }
  check(q, error);
  return true;
}

static void graph_free(const backend *be, void *graph) {
  cuda_enter(be);
  if (graph) cudaGraphExecDestroy((cudaGraphExec_t)graph);
}

void *cuda_alloc_mapped(const backend *be, size_t bytes, void **host) {
  queue *q = cuda_enter(be);
  void *memory = nullptr;
  *host = nullptr;
  if (q->error || cudaHostAlloc(host, bytes, cudaHostAllocMapped)) {
    cudaGetLastError();
    *host = nullptr;
    return nullptr;
  }
  memset(*host, 0, bytes);
  check(q, cudaHostGetDevicePointer(&memory, *host, 0));
  return memory;
}

void cuda_free_mapped(const backend *be, void *host) {
  queue *q = cuda_enter(be);
  if (host && !q->error) check(q, cudaStreamSynchronize(q->stream)); /* kernels may still write there */
  cudaFreeHost(host);
}

/* Makes the staging memory at least this large; false, and it is as it was, where that is refused. */
static bool need_staging(device *d, size_t bytes) {
  unsigned char *larger;
  if (bytes <= d->staging_bytes) return true;
  if (cudaHostAlloc((void **)&larger, bytes, 0)) {
    cudaGetLastError();
    return false;
  }
  check(&d->queue, cudaStreamSynchronize(d->queue.stream)); /* the step has been read from the one there was */
  cudaFreeHost(d->staging);
  d->staging = larger;
  d->staging_bytes = bytes;
  return true;
}

static void from_staging(device *d, void *to, size_t offset, size_t bytes) {
  queue *q = &d->queue;
  if (!q->error) check(q, cudaMemcpyAsync(to, d->staging + offset, bytes, cudaMemcpyHostToDevice, q->stream));
}

void cuda_begin(const backend *be, int32_t position, int32_t n) {
  device *d = (device *)be->device;
  queue *q = cuda_enter(be);
  if (!q->error) check(q, cudaStreamSynchronize(q->stream)); /* the last batch has been read from the staging memory */
  step now = {position, n, 0};
  memcpy(d->staging, &now, sizeof now);
  from_staging(d, d->step, 0, sizeof now);
}

/* The table stays in the file's mapping: what a batch needs of it is less than it is large. */
int32_t cuda_embed(const backend *be, const quant_type *type, const void *table, int32_t cols, const int32_t *tokens,
                   int32_t n, float *x, pyllm_error *err) {
  device *d = (device *)be->device;
  size_t bytes = (size_t)n * (size_t)cols * sizeof *x;
  if (!need_staging(d, EMBEDDINGS + bytes))
    return alloc_failure(be, fail(err, PYLLM_ERR_MEMORY, "memory for a batch of %d tokens was refused", n), err);
  int32_t status = be->cpu->embed(be, type, table, cols, tokens, n, (float *)(d->staging + EMBEDDINGS), err);
  if (!status) from_staging(d, x, EMBEDDINGS, bytes);
  return status;
}

static const ops cuda_ops = {
    .name = "cuda",
    .on_host = false,
    .most_rows = MOST_ROWS,
    .alloc = alloc,
    .release = release,
    .write = write,
    .read = read,
    .sync = sync,
    .graph_begin = graph_begin,
    .graph_end = graph_end,
    .graph_run = graph_run,
    .graph_free = graph_free,
    .begin = cuda_begin,
    .embed = cuda_embed,
    .norm = cuda_norm,
    .linear = cuda_linear,
    .angles = cuda_angles,
    .finite = cuda_finite,
    .attention = &cuda_attention_ops,
    .swiglu = cuda_swiglu,
};

extern "C" __attribute__((visibility("default"))) const cuda_library *pyllm_cuda(void) {
  static const cuda_library library = {CUDA_INTERFACE, &cuda_ops, info, open, close};
  return &library;
}
