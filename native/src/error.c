#include "error.h"
#include <stdarg.h>
#include <stdio.h>

int32_t fail(pyllm_error *err, pyllm_status status, const char *format, ...) {
  if (err) {
    va_list args;
    va_start(args, format);
    err->status = (int32_t)status;
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
  }
  return (int32_t)status;
}
