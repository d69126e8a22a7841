/* The GGUF loader without Python: what is read back, truncation and mutation under the sanitizers, typed
 * reads, and releasing pages. The files are written here, byte by byte. */
#include "fuzz_gguf.c"
#include "gguf.h"
#include "quant.h"
#include <fcntl.h>
#include <math.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- a writer ---- */

typedef struct buffer {
  size_t size;
  uint8_t bytes[1 << 16];
} buffer;

static void put(buffer *b, const void *bytes, size_t n) {
  EXPECT(n <= sizeof b->bytes - b->size, "buffer too small");
  memcpy(b->bytes + b->size, bytes, n);
  b->size += n;
}

static void put_u32(buffer *b, uint32_t x) { put(b, &x, sizeof x); }

static void put_u64(buffer *b, uint64_t x) { put(b, &x, sizeof x); }

static void put_string(buffer *b, const char *s) {
  put_u64(b, strlen(s));
  put(b, s, strlen(s));
}

static void put_header(buffer *b, uint64_t n_tensors, uint64_t n_values) {
  b->size = 0;
  put(b, "GGUF", 4);
  put_u32(b, 3);
  put_u64(b, n_tensors);
  put_u64(b, n_values);
}

static void put_value(buffer *b, const char *key, uint32_t type, const void *bytes, size_t n) {
  put_string(b, key);
  put_u32(b, type);
  put(b, bytes, n);
}

static void put_array(buffer *b, const char *key, uint32_t item_type, uint64_t n) {
  put_string(b, key);
  put_u32(b, VALUE_ARRAY);
  put_u32(b, item_type);
  put_u64(b, n);
}

static void put_tensor(buffer *b, const char *name, uint32_t type, uint64_t rows, uint64_t cols, uint64_t offset) {
  put_string(b, name);
  put_u32(b, 2);
  put_u64(b, cols);
  put_u64(b, rows);
  put_u32(b, type);
  put_u64(b, offset);
}

static void pad(buffer *b, size_t alignment) {
  while (b->size % alignment) put(b, "", 1);
}

/* ---- the file most tests use: every value type, and two tensors of 64 bytes and 40 ---- */

enum { N_VALUES = 19 };

static void put_numbers(buffer *b) {
  put_value(b, "u8", VALUE_U8, &(uint8_t){200}, 1);
  put_value(b, "i8", VALUE_I8, &(int8_t){-3}, 1);
  put_value(b, "u16", VALUE_U16, &(uint16_t){60000}, 2);
  put_value(b, "i16", VALUE_I16, &(int16_t){300}, 2);
  put_value(b, "u32", VALUE_U32, &(uint32_t){UINT32_MAX}, 4);
  put_value(b, "i32", VALUE_I32, &(int32_t){INT32_MIN}, 4);
  put_value(b, "u64", VALUE_U64, &(uint64_t){1ull << 32}, 8);
  put_value(b, "i64", VALUE_I64, &(int64_t){77}, 8);
  put_value(b, "i64 lowest", VALUE_I64, &(int64_t){INT64_MIN}, 8);
  put_value(b, "f32", VALUE_F32, &(float){0.1f}, 4);
  put_value(b, "f64", VALUE_F64, &(double){0.1}, 8);
  put_value(b, "f64 huge", VALUE_F64, &(double){1e300}, 8);
  put_value(b, "f64 infinite", VALUE_F64, &(double){INFINITY}, 8);
  put_value(b, "bool", VALUE_BOOL, &(uint8_t){1}, 1);
}

static void put_file(buffer *b) {
  put_header(b, 2, N_VALUES);
  put_numbers(b);
  put_value(b, "string", VALUE_STRING, "", 0);
  put_string(b, "some text");
  put_value(b, "general.alignment", VALUE_U32, &(uint32_t){64}, 4);
  put_array(b, "strings", VALUE_STRING, 3);
  put_string(b, "a");
  put_string(b, "");
  put_string(b, "ccc");
  put_array(b, "i16s", VALUE_I16, 2);
  put(b, (int16_t[]){-1, 2}, 4);
  put_array(b, "nothing", VALUE_F64, 0);
  put_tensor(b, "floats", TYPE_F32, 2, 8, 0);
  put_tensor(b, "quants", TYPE_Q4_1, 2, 32, 64);
  pad(b, 64);
  for (uint8_t i = 0; i < 64 + 40; i++) put(b, &i, 1);
}

/* As a pyllm_file of one part; the caller closes it. */
static pyllm_file *open_buffer(const buffer *b) {
  char path[32];
  const char *paths[] = {path};
  pyllm_error err;
  pyllm_file *file = NULL;
  int fd = memfd_create("test_gguf", 0); /* in no folder */
  EXPECT(fd >= 0 && write(fd, b->bytes, b->size) == (ssize_t)b->size, "cannot write to memory");
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int32_t status = pyllm_file_open(paths, 1, &file, &err);
  close(fd);
  EXPECT(!status, "%s", err.message);
  return file;
}

/* In an allocation of exactly its size, so that a sanitizer sees the first byte read past it. */
static int32_t examine_copy(const uint8_t *bytes, size_t size) {
  uint8_t *copy = malloc(size ? size : 1);
  EXPECT(copy, "no memory");
  memcpy(copy, bytes, size);
  int32_t status = examine(copy, size);
  free(copy);
  return status;
}

/* ---- tests ---- */

static void entries_are_found(const pyllm_file *file) {
  EXPECT(pyllm_file_n_values(file) == N_VALUES && pyllm_file_n_tensors(file) == 2, "counts");
  for (uint64_t i = 0; i < N_VALUES; i++) {
    const pyllm_value *v = pyllm_file_value(file, i);
    char key[32] = {0};
    memcpy(key, v->key, v->key_size);
    EXPECT(gguf_find(file, key) == v, "%s", key);
  }
  EXPECT(!gguf_find(file, "") && !gguf_find(file, "u3") && !gguf_find(file, "u322"), "found what is not there");

  const pyllm_value *strings = gguf_find(file, "strings");
  EXPECT(strings->type == VALUE_ARRAY && strings->item_type == VALUE_STRING && strings->n == 3, "strings");
  EXPECT(strings->size == 3 * 8 + 4, "%d bytes of strings", (int)strings->size);

  const pyllm_tensor *t = gguf_find_tensor(file, "quants");
  EXPECT(t == pyllm_file_tensor(file, 1) && !gguf_find_tensor(file, "quant"), "find_tensor");
  EXPECT(t->type == TYPE_Q4_1 && t->n_dims == 2 && t->part == 0, "tensor");
  EXPECT(t->shape[0] == 32 && t->shape[1] == 2 && t->shape[2] == 1 && t->shape[3] == 1, "shape");
  EXPECT(t->size == 40 && *(const uint8_t *)t->data == 64 && t->offset % 64 == 0, "data");
}

static void expect_u32(const pyllm_file *file, const char *key, int32_t status, uint32_t expected) {
  pyllm_error err = {0};
  uint32_t x = 12345;
  EXPECT(gguf_get_u32(file, key, true, &x, &err) == status, "%s: %s", key, err.message);
  EXPECT(x == (status ? 12345 : expected), "%s is %u", key, x);
  EXPECT(!status || strstr(err.message, key), "%s is not named by: %s", key, err.message);
}

static void integers_are_read_in_range(const pyllm_file *file) {
  expect_u32(file, "u8", PYLLM_OK, 200);
  expect_u32(file, "u16", PYLLM_OK, 60000);
  expect_u32(file, "i16", PYLLM_OK, 300);
  expect_u32(file, "u32", PYLLM_OK, UINT32_MAX);
  expect_u32(file, "i64", PYLLM_OK, 77);
  static const char *const refused[] = {"i8",  "i32",  "i64 lowest", "u64",  "f32",
                                        "f64", "bool", "string",     "i16s", "missing"};
  for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) expect_u32(file, refused[i], PYLLM_ERR_FORMAT, 0);
  pyllm_error err;
  gguf_get_u32(file, "i8", true, &(uint32_t){0}, &err);
  EXPECT(strstr(err.message, " is -3,"), "%s", err.message);
  gguf_get_u32(file, "i64 lowest", true, &(uint32_t){0}, &err);
  EXPECT(strstr(err.message, " is -9223372036854775808,"), "%s", err.message);
}

static void other_types_are_read(const pyllm_file *file) {
  float x = 0;
  const char *text;
  uint64_t size;
  EXPECT(!gguf_get_f32(file, "f32", true, &x, NULL) && x == 0.1f, "%g", (double)x);
  EXPECT(!gguf_get_f32(file, "f64", true, &x, NULL) && x == (float)0.1, "%g", (double)x);
  EXPECT(!gguf_get_f32(file, "f64 infinite", true, &x, NULL) && isinf(x), "%g", (double)x);
  EXPECT(gguf_get_f32(file, "f64 huge", true, &x, NULL) == PYLLM_ERR_FORMAT, "%g", (double)x);
  EXPECT(gguf_get_f32(file, "u8", true, &x, NULL) == PYLLM_ERR_FORMAT, "%g", (double)x);
  EXPECT(!gguf_get_string(file, "string", true, &text, &size, NULL), "string");
  EXPECT(size == 9 && memcmp(text, "some text", 9) == 0, "%.*s", (int)size, text);
  EXPECT(gguf_get_string(file, "strings", true, &text, &size, NULL) == PYLLM_ERR_FORMAT, "array as string");
}

static void missing_keys_are_optional_or_not(const pyllm_file *file) {
  uint32_t n = 5;
  float x = 6;
  const char *text = "seven";
  uint64_t size = 8;
  for (int required = 0; required < 2; required++) {
    int32_t expected = required ? PYLLM_ERR_FORMAT : PYLLM_OK;
    EXPECT(gguf_get_u32(file, "absent", required, &n, NULL) == expected, "u32");
    EXPECT(gguf_get_f32(file, "absent", required, &x, NULL) == expected, "f32");
    EXPECT(gguf_get_string(file, "absent", required, &text, &size, NULL) == expected, "string");
  }
  EXPECT(n == 5 && x == 6 && strcmp(text, "seven") == 0 && size == 8, "written though absent");
}

/* Whether the page at an address is in this process's memory: bit 63 of its entry in the kernel's page map.
 */
static bool resident(const void *address) {
  uint64_t entry = 0, page = (uint64_t)sysconf(_SC_PAGESIZE);
  int fd = open("/proc/self/pagemap", O_RDONLY);
  EXPECT(fd >= 0 && pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)address / page * sizeof entry)) == sizeof entry,
         "no page map");
  close(fd);
  return entry >> 63;
}

/* Every page leaves, and what is read afterwards is the same. */
static void released_pages_come_back(void) {
  static buffer b;
  enum { PAGE = 4096, SIZE = 3 * PAGE };
  put_header(&b, 1, 0);
  put_tensor(&b, "several pages", TYPE_F32, 1, SIZE / 4, 0);
  pad(&b, 32);
  for (size_t i = 0; i < SIZE; i++) put(&b, &(uint8_t){(uint8_t)(i * 31 % 251)}, 1);
  pyllm_file *file = open_buffer(&b);
  const pyllm_tensor *t = pyllm_file_tensor(file, 0);
  const uint8_t *data = t->data;
  EXPECT(memcmp(data, b.bytes + t->offset, t->size) == 0, "as written");
  EXPECT(resident(data) && resident(data + PAGE) && resident(data + SIZE - 1), "resident after reading");
  gguf_release_pages(file);
  for (size_t i = 0; i < SIZE; i += PAGE) EXPECT(!resident(data + i), "released at %d", (int)i);
  EXPECT(!resident(data + SIZE - 1), "the last page released");
  EXPECT(memcmp(data, b.bytes + t->offset, t->size) == 0, "as written, after");
  pyllm_file_close(file);
}

static void every_truncation_is_refused(const buffer *b) {
  EXPECT(examine_copy(b->bytes, b->size) == PYLLM_OK, "the whole file");
  for (size_t size = 0; size < b->size; size++)
    EXPECT(examine_copy(b->bytes, size) == PYLLM_ERR_FORMAT, "the first %d bytes", (int)size);
}

static void long_names_are_cut_in_messages(void) {
  gguf_shown shown;
  char name[1000];
  memset(name, 0xff, sizeof name);
  for (uint64_t size = 0; size <= sizeof name; size++) {
    gguf_show(name, size, &shown);
    EXPECT(strlen(shown.text) < sizeof shown.text, "%d bytes", (int)size);
    EXPECT(strlen(shown.text) == 2 + 4 * size || strstr(shown.text, "'..."), "%s", shown.text);
  }
  EXPECT(strcmp(gguf_show("a\n'", 3, &shown), "'a\\x0a''") == 0, "%s", shown.text);
}

/* ---- mutation ---- */

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
  uint64_t x = *state += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

/* One change of the kinds that break parsers: a bit, a number at the edge of something, a moved run, another
 * end. */
static void mutate(buffer *b, uint64_t *random) {
  const uint64_t edges[] = {0, 1, 8, 9, 12, 64, b->size, INT32_MAX, UINT32_MAX, INT64_MAX, UINT64_MAX - 7, UINT64_MAX};
  if (b->size < 16) return;
  size_t at = next_random(random) % (b->size - 8), from = next_random(random) % (b->size - 8);
  switch (next_random(random) % 4) {
  case 0: b->bytes[at] ^= (uint8_t)(1 << next_random(random) % 8); break;
  case 1: memcpy(b->bytes + at, &edges[next_random(random) % (sizeof edges / sizeof *edges)], 4 + at % 2 * 4); break;
  case 2: memmove(b->bytes + at, b->bytes + from, b->size - (at > from ? at : from)); break;
  default: b->size -= next_random(random) % 8;
  }
}

static void mutations_do_no_harm(const buffer *original, uint64_t seed) {
  enum { ROUNDS = 20000 };
  static buffer b;
  int accepted = 0;
  uint64_t random = seed;
  for (int i = 0; i < ROUNDS; i++) {
    b = *original;
    for (uint64_t n = 1 + next_random(&random) % 3; n > 0; n--) mutate(&b, &random);
    accepted += examine_copy(b.bytes, b.size) == PYLLM_OK;
  }
  EXPECT(accepted > ROUNDS / 100 && accepted < ROUNDS, "%d of %d accepted: the mutations miss", accepted, ROUNDS);
}

/* test_gguf [SEED]: the same mutations every time, or others. */
int main(int argc, char **argv) {
  static buffer b;
  put_file(&b);
  pyllm_file *file = open_buffer(&b);
  entries_are_found(file);
  integers_are_read_in_range(file);
  other_types_are_read(file);
  missing_keys_are_optional_or_not(file);
  pyllm_file_close(file);
  pyllm_file_close(NULL);
  released_pages_come_back();
  every_truncation_is_refused(&b);
  long_names_are_cut_in_messages();
  mutations_do_no_harm(&b, argc > 1 ? strtoull(argv[1], NULL, 0) : 1);
  LLVMFuzzerTestOneInput(b.bytes, b.size);
  return 0;
}
