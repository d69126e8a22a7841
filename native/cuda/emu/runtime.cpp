#include "emu.h"
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <malloc.h>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

typedef std::vector<std::function<cudaError_t()>> commands;
struct emu_graph {
  commands list;
};
struct emu_stream {
  emu_graph *capture; /* NULL while none is written down */
  commands waiting;   /* until the stream is waited for */
  cudaError_t error;
  std::atomic_flag busy; /* a command is on its way: those of a session's turn come from one thread at a time */
  std::mutex order;      /* of commands, which another thread's freeing may do too */
};
static std::vector<cudaStream_t> streams;
static std::mutex registry; /* of streams and of memory; taken before a stream's order */

/* The one device; every thread begins on another, as it may on a machine with two. */
enum { DEVICE = 0, OTHER_DEVICE = 1 };
static thread_local int current_device = OTHER_DEVICE;

static size_t memory_bytes = (size_t)4 << 30, memory_used;
static thread_local cudaError_t last_error;

static cudaError_t failed(cudaError_t error) { return last_error = error; }

/* What a test has asked to fail; the function asks by its name. */
static struct {
  std::string call;
  cudaError_t error;
  int times;
} plan;

static cudaError_t planned(const char *call) {
  if (plan.times == 0 || plan.call != call) return cudaSuccess;
  plan.times--;
  return failed(plan.error);
}
void emu::fail_next(const char *call, int error, int times) { plan = {call, (cudaError_t)error, times}; }

static cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> command) {
  if (stream->busy.test_and_set()) return failed(cudaErrorIllegalState);
  std::lock_guard turn(stream->order);
  (stream->capture ? stream->capture->list : stream->waiting).push_back(std::move(command));
  stream->busy.clear();
  return cudaSuccess;
}

/* Does what waits; as on a device, the first error stays, and nothing is done behind it. */
static cudaError_t perform_waiting(cudaStream_t stream) {
  std::lock_guard turn(stream->order);
  for (const auto &command : stream->waiting)
    if (!stream->error) stream->error = command();
  stream->waiting.clear();
  if (stream->error) failed(stream->error);
  return stream->error;
}

static cudaError_t perform(cudaStream_t stream) {
  if (stream->busy.test_and_set()) return failed(cudaErrorIllegalState);
  cudaError_t error = perform_waiting(stream);
  stream->busy.clear();
  return error;
}

/* As freeing does: what other threads have in their streams may be done early, and is not theirs at once with it. With
 * the registry taken. */
static void perform_all() {
  for (cudaStream_t stream : streams) perform_waiting(stream);
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *n) {
  *n = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device != DEVICE) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int device) {
  if (device != DEVICE) return failed(cudaErrorInvalidDevice);
  *out = {"emulated on the processor", 9, 0, 2, memory_bytes, 227 << 10};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *out, cudaDeviceAttr, int device) {
  cudaDeviceProp properties = {};
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  *out = properties.multiProcessorCount;
  return error;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = memory_used < memory_bytes ? memory_bytes - memory_used : 0;
  *total = memory_bytes;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, void (*)()) { return planned(__func__); }
cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
  case cudaSuccess: return "no error";
  case cudaErrorMemoryAllocation: return "out of memory";
  case cudaErrorInvalidDevice: return "invalid device ordinal";
  case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
  case cudaErrorInvalidResourceHandle: return "a stream of a device that is not the thread's current one";
  case cudaErrorIllegalState: return "a stream that two threads use at once";
  case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
  case cudaErrorLaunchFailure: return emu::failure();
  default: return "invalid argument";
  }
}

/* ---- memory ---- */

static std::map<const char *, size_t> on_device; /* what cudaMalloc gave, and its bytes */

static bool is_on_device(const void *address) {
  std::lock_guard turn(registry);
  auto behind = on_device.upper_bound((const char *)address);
  if (behind == on_device.begin()) return false;
  --behind;
  return (const char *)address < behind->first + behind->second;
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
  if (current_device != DEVICE) return failed(cudaErrorInvalidDevice);
  std::lock_guard turn(registry);
  size_t free, total;
  cudaMemGetInfo(&free, &total);
  *out = bytes <= free ? malloc(bytes) : nullptr;
  if (!*out) return failed(cudaErrorMemoryAllocation);
  on_device[(const char *)*out] = bytes;
  memset(*out, 0xff, bytes);
  memory_used += malloc_usable_size(*out);
  return cudaSuccess;
}
cudaError_t cudaFree(void *at) {
  std::lock_guard turn(registry);
  perform_all();
  on_device.erase((const char *)at);
  if (at) memory_used -= malloc_usable_size(at);
  free(at);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) {
  if (cudaError_t error = planned(__func__)) return error;
  *out = malloc(bytes);
  return *out ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void *at) {
  std::lock_guard turn(registry);
  perform_all();
  free(at);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void **out, void *at, unsigned) {
  *out = at;
  return cudaSuccess;
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
  if (current_device != DEVICE) return failed(cudaErrorInvalidDevice);
  *out = new (std::nothrow) emu_stream{nullptr, {}, cudaSuccess, ATOMIC_FLAG_INIT, {}};
  if (!*out) return failed(cudaErrorMemoryAllocation);
  std::lock_guard turn(registry);
  streams.push_back(*out);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  perform(stream);
  std::lock_guard turn(registry);
  std::erase(streams, stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (cudaError_t error = planned(__func__)) return error;
  return perform(stream);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  auto copy = [=] {
    memcpy(to, from, bytes);
    return cudaSuccess;
  };
  return is_on_device(to) || is_on_device(from) ? submit(stream, copy) : copy();
}
cudaError_t cudaMemsetAsync(void *at, int value, size_t bytes, cudaStream_t stream) {
  return submit(stream, [=] {
    memset(at, value, bytes);
    return cudaSuccess;
  });
}

cudaError_t emu::launch(cudaStream_t stream, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> thread) {
  if (current_device != DEVICE) return failed(cudaErrorInvalidResourceHandle);
  return submit(stream,
                [=] { return emu::run(grid, block, shared_bytes, thread) ? cudaSuccess : cudaErrorLaunchFailure; });
}
void emu::set_memory(size_t bytes) { memory_bytes = bytes; }

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream->capture) return failed(cudaErrorInvalidValue);
  if (cudaError_t error = planned(__func__)) return error;
  stream->capture = new (std::nothrow) emu_graph;
  return stream->capture ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
  *out = stream->capture;
  stream->capture = nullptr;
  if (!*out) return failed(cudaErrorInvalidValue);
  cudaError_t error = planned(__func__);
  if (error) cudaGraphDestroy(std::exchange(*out, nullptr));
  return error;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long) {
  if (cudaError_t error = planned(__func__)) return error;
  *out = new (std::nothrow) emu_graph(*graph);
  return *out ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return planned(__func__); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (cudaError_t error = planned(__func__)) return error;
  for (const auto &command : graph->list) submit(stream, command);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}
