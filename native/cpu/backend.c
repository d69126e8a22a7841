#include "cpu.h"
#include "sketch.h"

static uint64_t sketch_bytes(int32_t bits, int32_t head_dim) { return sketch_page_bytes(bits, head_dim); }

const ops cpu_ops = {
    .name = "cpu",
    .on_host = true,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .write = cpu_copy,
    .read = cpu_copy,
    .sync = cpu_sync,
    .begin = cpu_begin,
    .scratch_new = cpu_scratch_new,
    .scratch_free = cpu_scratch_free,
    .sketch_bytes = sketch_bytes,
    .scratch_bytes = cpu_scratch_bytes,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .linear = cpu_linear,
    .angles = cpu_angles,
    .rope_store = cpu_rope_store,
    .attend_local = cpu_attend_local,
    .select = cpu_select,
    .attend_bulk = cpu_attend_bulk,
    .record = cpu_record,
    .finish = cpu_finish,
    .swiglu = cpu_swiglu,
};
