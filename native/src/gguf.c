/* Files on disk, mapped and joined: the parts of one model make one list of tensors, under the first part's
 * values. */
#include "gguf.h"
#include "error.h"
#include "gguf_parse.h"
#include "gguf_value.h"
#include "quant.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(sizeof(size_t) == sizeof(uint64_t), "a file's size fits an address");

struct pyllm_file {
  _Atomic int32_t n_holders;
  int32_t n_parts;
  gguf_part *parts; /* (n_parts) owned, with their paths and mappings */
  uint64_t n_tensors;
  pyllm_tensor *tensors; /* (n_tensors) owned, of all parts */
  gguf_name *names;      /* (n_tensors) owned, sorted */
};

/* ---- one part ---- */

/* The path as messages show it: its end, where it is too long to leave room for the cause. NULL without
 * memory. */
static char *path_label(const char *path) {
  enum { MOST = 400 };
  size_t size = strlen(path);
  if (size <= MOST) return strdup(path);
  char *label = malloc(MOST + 4);
  if (label) snprintf(label, MOST + 4, "...%s", path + size - MOST);
  return label;
}

static int32_t map_descriptor(int fd, gguf_part *part, pyllm_error *err) {
  struct stat info;
  if (fstat(fd, &info)) return fail(err, PYLLM_ERR_FILE, "%s: cannot be read: %s", part->path, strerror(errno));
  if (S_ISDIR(info.st_mode)) return fail(err, PYLLM_ERR_FILE, "%s: is a directory, not a file", part->path);
  if (!S_ISREG(info.st_mode)) return fail(err, PYLLM_ERR_FILE, "%s: is not a regular file", part->path);
  if (info.st_size == 0) return PYLLM_OK; /* nothing to map; the parser says that it is empty */
  void *bytes = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (bytes == MAP_FAILED)
    return fail(err, PYLLM_ERR_FILE, "%s: its %lld bytes cannot be mapped: %s", part->path, (long long)info.st_size,
                strerror(errno));
  part->bytes = bytes;
  part->size = (uint64_t)info.st_size;
  return PYLLM_OK;
}

static int32_t open_part(const char *path, gguf_part *part, pyllm_error *err) {
  part->path = path_label(path);
  if (!part->path) return fail(err, PYLLM_ERR_MEMORY, "memory for a path was refused");
  /* O_NONBLOCK: a named pipe is refused, not waited for. */
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return fail(err, PYLLM_ERR_FILE, "%s: cannot be opened: %s", part->path, strerror(errno));
  int32_t status = map_descriptor(fd, part, err);
  close(fd);
  return status ? status : gguf_parse(part, err);
}

static void close_part(gguf_part *part) {
  gguf_part_free(part);
  if (part->size) munmap((void *)part->bytes, part->size);
  free((char *)part->path);
}

/* ---- parts into one ---- */

/* Leaves *out as it is when the key is absent. */
static int32_t part_u32(const gguf_part *part, const char *key, uint32_t *out, pyllm_error *err) {
  const pyllm_value *v = gguf_part_find(part, key);
  return v ? gguf_value_u32(part->path, v, out, err) : PYLLM_OK;
}

/* A file without the split keys is part 1 of 1. */
static int32_t check_place(const pyllm_file *file, const gguf_part *part, pyllm_error *err) {
  uint32_t no = 0, count = 1;
  int32_t status = part_u32(part, "split.no", &no, err);
  if (!status) status = part_u32(part, "split.count", &count, err);
  if (status) return status;
  if (count == 0) count = 1; /* some writers mark an unsplit file so */
  if (no == (uint32_t)part->index && count == (uint32_t)file->n_parts) return PYLLM_OK;
  return fail(err, PYLLM_ERR_FORMAT,
              "%s: split.no and split.count make this part %" PRIu64 " of %" PRIu32
              ", and it was given as part %d of %d; all parts are needed, in order",
              part->path, (uint64_t)no + 1, count, part->index + 1, file->n_parts);
}

static int32_t check_total(const pyllm_file *file, pyllm_error *err) {
  static const char key[] = "split.tensors.count";
  uint32_t total = 0;
  if (!gguf_find(file, key)) return PYLLM_OK;
  int32_t status = gguf_get_u32(file, key, true, &total, err);
  if (status || total == file->n_tensors) return status;
  return fail(err, PYLLM_ERR_FORMAT, "%s: key '%s' is %" PRIu32 ", and the parts hold %" PRIu64 " tensors",
              gguf_path(file), key, total, file->n_tensors);
}

static int32_t join_tensors(pyllm_file *file, pyllm_error *err) {
  uint64_t n = 0;
  for (int32_t p = 0; p < file->n_parts; p++) n += file->parts[p].n_tensors;
  file->tensors = calloc(n + 1, sizeof *file->tensors);
  file->names = calloc(n + 1, sizeof *file->names);
  if (!file->tensors || !file->names)
    return fail(err, PYLLM_ERR_MEMORY, "%s: memory for %" PRIu64 " tensors was refused", gguf_path(file), n);
  for (int32_t p = 0; p < file->n_parts; p++) {
    const gguf_part *part = &file->parts[p];
    for (uint64_t i = 0; i < part->n_tensors; i++) {
      const pyllm_tensor *t = &part->tensors[i];
      file->tensors[file->n_tensors] = *t;
      file->names[file->n_tensors] = (gguf_name){t->name, t->name_size, file->n_tensors};
      file->n_tensors++;
    }
  }
  return PYLLM_OK;
}

static int32_t index_tensors(pyllm_file *file, pyllm_error *err) {
  gguf_names_sort(file->names, file->n_tensors);
  const gguf_name *twice = gguf_names_duplicate(file->names, file->n_tensors);
  if (!twice) return PYLLM_OK;
  gguf_shown name;
  return fail(err, PYLLM_ERR_FORMAT, "%s: tensor %s appears twice",
              gguf_part_path(file, file->tensors[twice->entry].part), gguf_show(twice->bytes, twice->size, &name));
}

static int32_t open_all(pyllm_file *file, const char *const *paths, pyllm_error *err) {
  for (int32_t p = 0; p < file->n_parts; p++) {
    file->parts[p].index = p;
    int32_t status = open_part(paths[p], &file->parts[p], err);
    if (!status) status = check_place(file, &file->parts[p], err);
    if (status) return status;
  }
  int32_t status = join_tensors(file, err);
  if (!status) status = index_tensors(file, err);
  return status ? status : check_total(file, err);
}

int32_t pyllm_file_open(const char *const *paths, int32_t n_paths, pyllm_file **out, pyllm_error *err) {
  if (n_paths < 1) return fail(err, PYLLM_ERR_ARGUMENT, "no file to open: %d paths were given", n_paths);
  pyllm_file *file = calloc(1, sizeof *file);
  gguf_part *parts = calloc((size_t)n_paths, sizeof *parts);
  if (!file || !parts) {
    free(file);
    free(parts);
    return fail(err, PYLLM_ERR_MEMORY, "%s: memory for %d parts was refused", paths[0], n_paths);
  }
  file->n_holders = 1;
  file->parts = parts;
  file->n_parts = n_paths;
  int32_t status = open_all(file, paths, err);
  if (status) {
    pyllm_file_close(file);
    return status;
  }
  *out = file;
  return PYLLM_OK;
}

void gguf_hold(const pyllm_file *file) { ((pyllm_file *)file)->n_holders++; }

void pyllm_file_close(pyllm_file *file) {
  if (!file || --file->n_holders > 0) return;
  for (int32_t p = 0; p < file->n_parts; p++) close_part(&file->parts[p]);
  free(file->parts);
  free(file->tensors);
  free(file->names);
  free(file);
}

/* ---- what the file holds ---- */

uint64_t pyllm_file_n_values(const pyllm_file *file) { return file->parts[0].n_values; }

uint64_t pyllm_file_n_tensors(const pyllm_file *file) { return file->n_tensors; }

const pyllm_value *pyllm_file_value(const pyllm_file *file, uint64_t i) { return &file->parts[0].values[i]; }

const pyllm_tensor *pyllm_file_tensor(const pyllm_file *file, uint64_t i) { return &file->tensors[i]; }

const char *pyllm_type_name(int32_t type) {
  const quant_type *found = quant_find(type);
  return found ? found->name : NULL;
}

const char *gguf_path(const pyllm_file *file) { return gguf_part_path(file, 0); }

const char *gguf_part_path(const pyllm_file *file, int32_t part) { return file->parts[part].path; }

const pyllm_value *gguf_find(const pyllm_file *file, const char *key) { return gguf_part_find(&file->parts[0], key); }

const pyllm_tensor *gguf_find_tensor(const pyllm_file *file, const char *name) {
  uint64_t i;
  return gguf_names_find(file->names, file->n_tensors, name, &i) ? &file->tensors[i] : NULL;
}

void gguf_release_pages(const pyllm_file *file) {
  for (int32_t p = 0; p < file->n_parts; p++) {
    const gguf_part *part = &file->parts[p];
    /* Only advice: where it is refused, the pages stay resident. */
    (void)madvise((void *)part->bytes, (size_t)part->size, MADV_DONTNEED);
  }
}
