/* How every function reports failure: a status and one sentence. */
#ifndef PYLLM_SRC_ERROR_H
#define PYLLM_SRC_ERROR_H
#include "pyllm.h"

/* Fills err (may be NULL) with the formatted sentence, cut to fit, and returns status. */
int32_t fail(pyllm_error *err, pyllm_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* The failure of a call is its caller's. */
#define TRY(call)                                                                                                      \
  do {                                                                                                                 \
    int32_t status_ = (call);                                                                                          \
    if (status_) return status_;                                                                                       \
  } while (0)

#endif
