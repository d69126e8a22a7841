/* A check that stops the test program and says where and why. */
#ifndef PYLLM_TESTS_EXPECT_H
#define PYLLM_TESTS_EXPECT_H
#include <stdio.h>
#include <stdlib.h>

#define EXPECT(condition, ...)                                                                                         \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                                                  \
      fprintf(stderr, __VA_ARGS__);                                                                                    \
      fputc('\n', stderr);                                                                                             \
      abort();                                                                                                         \
    }                                                                                                                  \
  } while (0)

#endif
