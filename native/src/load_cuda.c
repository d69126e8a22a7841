/* The CUDA backend is a library of its own beside this one, loaded when a device asks for it: this one runs without
 * NVIDIA's driver. */
#include "backend.h"
#include "error.h"
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

enum { PATH_BYTES = 4096 };

/* libpyllm_cuda.so in the directory of this library; false where its path is too long. */
static bool library_path(char path[PATH_BYTES]) {
  Dl_info self;
  if (!dladdr((const void *)&cpu_ops, &self) || !self.dli_fname) return false;
  const char *slash = strrchr(self.dli_fname, '/');
  int directory = slash ? (int)(slash - self.dli_fname) : 1;
  int n = snprintf(path, PATH_BYTES, "%.*s/libpyllm_cuda.so", directory, slash ? self.dli_fname : ".");
  return n > 0 && n < PATH_BYTES;
}

const cuda_library *load_cuda(pyllm_error *err) {
  char path[PATH_BYTES];
  if (!library_path(path)) {
    fail(err, PYLLM_ERR_DEVICE, "CUDA cannot be used: where this library lies cannot be told in %d bytes", PATH_BYTES);
    return NULL;
  }
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fail(err, PYLLM_ERR_DEVICE, "CUDA cannot be used: %s (make -C native cuda builds it)", dlerror());
    return NULL;
  }
  const cuda_library *(*entry)(void);
  void *symbol = dlsym(library, "pyllm_cuda");
  memcpy(&entry, &symbol, sizeof entry);
  if (symbol && entry()->interface == CUDA_INTERFACE) return entry();
  fail(err, PYLLM_ERR_DEVICE, "CUDA cannot be used: %s belongs to another build of pyllm; run: make -C native cuda",
       path);
  dlclose(library);
  return NULL;
}
