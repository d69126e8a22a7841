/* Attention's two products in floats. Part of kernels.c; needs kernel_strip.h. */

enum { F32_FROM_ROWS = 2 * STRIP_ROWS }; /* rows from which halves are converted once for all of them */

/* (n) halves as floats; n % 16 == 0. */
static inline void f32_convert(const uint16_t *from, int32_t n, float *to) {
  for (int32_t i = 0; i < n; i += VL) vstore(to + i, vload_f16(from + i));
}

/* scores (rows, 64) = q k */
static void attend_scores(const attend_args *a) {
  float wide[STRIP * LARGEST_HEAD];
  for (int s = 0; s < a->n_strips; s++) {
    float *scores = a->scores + s * STRIP;
    if (a->rows >= F32_FROM_ROWS) {
      f32_convert(a->k[s], STRIP * a->head_dim, wide);
      strips keys = {STRIP_F32, 1, a->head_dim / 2, {wide}, {0}};
      strip_gemm_typed(STRIP_F32, a->rows, a->q, a->head_dim, &keys, NULL, scores, KV_BLOCK);
    } else {
      strips keys = {STRIP_F16, 1, a->head_dim / 2, {a->k[s]}, {after_keys(a, s)}};
      strip_gemm_typed(STRIP_F16, a->rows, a->q, a->head_dim, &keys, NULL, scores, KV_BLOCK);
    }
  }
}

/* out (rows, head_dim) = alpha out + scores v */
static void attend_values(const attend_args *a) {
  float wide[KV_STRIPS][STRIP * STRIP];
  for (int32_t j = 0; j < a->head_dim / STRIP; j++) {
    strips values = {STRIP_F16, a->n_strips, STRIP / 2, {0}, {0}};
    float *out = a->out + j * STRIP;
    for (int s = 0; s < a->n_strips; s++) {
      const uint16_t *v = a->v[s], *ahead = after_values(a, s);
      values.data[s] = v + j * STRIP * STRIP;
      values.ahead[s] = ahead ? ahead + j * STRIP * STRIP : NULL;
    }
    if (a->rows >= F32_FROM_ROWS) {
      for (int s = 0; s < a->n_strips; s++) {
        f32_convert(values.data[s], STRIP * STRIP, wide[s]);
        values.data[s] = wide[s];
      }
      strip_gemm_typed(STRIP_F32, a->rows, a->scores, KV_BLOCK, &values, a->alpha, out, a->head_dim);
    } else {
      strip_gemm_typed(STRIP_F16, a->rows, a->scores, KV_BLOCK, &values, a->alpha, out, a->head_dim);
    }
  }
}
