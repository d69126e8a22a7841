/* Weight matrices as the kernels read them: repacked once at load from the GGUF blocks, which are then let go. */
#ifndef PYLLM_CPU_PACK_H
#define PYLLM_CPU_PACK_H
#include "kernels.h"
#include "quant.h"
#include "threads.h"

typedef struct matrix {
  int32_t rows, cols;     /* y (rows) = W x (cols) */
  const quant_type *type; /* of the file */
  bool quantized;         /* tiles and 16-bit activations; otherwise strips and float activations */
  tile_format format;     /* where quantized */
  enum strip_type strip;  /* otherwise */
  size_t tile_bytes;      /* bytes of 16 rows in either form */
  unsigned char *data;    /* (ceil(rows / 16), tile_bytes), owned; missing rows are zero */
} matrix;

/* Tiles, or strips, of 16 rows; the last one may be part empty. Of any rows: no sum that overflows. */
static inline int32_t tiles_of_rows(int32_t rows) { return rows / TILE_ROWS + (rows % TILE_ROWS != 0); }

/* Bytes pack will allocate for a (rows, cols) matrix of a type. */
size_t pack_bytes(const quant_type *type, int32_t rows, int32_t cols);

/* source: rows of cols values in the type's blocks; cols a multiple of the block and, for float types, even.
 * On success out owns its data (pack_free). A non-finite weight is PYLLM_ERR_NUMERIC; `where` opens the message. */
int32_t pack(pool *threads, const quant_type *type, const void *source, int32_t rows, int32_t cols, const char *where,
             matrix *out, pyllm_error *err);
void pack_free(matrix *m);

#endif
