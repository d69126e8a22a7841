#include "cpu.h"

const ops cpu_ops = {
    .name = "cpu",
    .on_host = true,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .write = cpu_copy,
    .read = cpu_copy,
    .sync = cpu_sync,
    .begin = cpu_begin,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .linear = cpu_linear,
    .angles = cpu_angles,
    .finite = cpu_finite,
    .attention = &cpu_attention_ops,
    .swiglu = cpu_swiglu,
};
