/* The GGUF file behind pyllm_file: what the rest of the library asks of it, beyond the public functions.
 * Everything returned points into the read-only mapping and lives until pyllm_file_close. */
#ifndef PYLLM_SRC_GGUF_H
#define PYLLM_SRC_GGUF_H
#include "pyllm.h"
#include <stdbool.h>

/* One more holder: pyllm_file_close frees with the last. */
void gguf_hold(const pyllm_file *file);

/* The first part's path: how messages name the file. */
const char *gguf_path(const pyllm_file *file);
/* The part's path a tensor lives in. */
const char *gguf_part_path(const pyllm_file *file, int32_t part);

/* NULL when absent. */
const pyllm_value *gguf_find(const pyllm_file *file, const char *key);
const pyllm_tensor *gguf_find_tensor(const pyllm_file *file, const char *name);

/* Typed reads. A missing key leaves *out as it is when `required` is false and is PYLLM_ERR_FORMAT when it is true;
 * a value of another type, or one that does not fit, is PYLLM_ERR_FORMAT either way. Integers accept any integer
 * type in range, floats accept f32 and f64; gguf_get_string points at bytes that are not NUL-terminated. */
int32_t gguf_get_u32(const pyllm_file *file, const char *key, bool required, uint32_t *out, pyllm_error *err);
int32_t gguf_get_f32(const pyllm_file *file, const char *key, bool required, float *out, pyllm_error *err);
int32_t gguf_get_string(const pyllm_file *file, const char *key, bool required, const char **out, uint64_t *size,
                        pyllm_error *err);

/* Tells the kernel that the mapped bytes are not needed soon: they leave resident memory and are read again from the
 * file if touched. Of the whole file, not of one tensor: a touched page brings its neighbours along, as many as the
 * kernel likes. */
void gguf_release_pages(const pyllm_file *file);

#endif
