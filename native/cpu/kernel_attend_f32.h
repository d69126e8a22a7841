/* Attention's two products in floats. Part of kernels.c; needs kernel_strip.h. */

/* scores (rows, 64) = q k */
static void attend_scores(const attend_args *a) {
  for (int s = 0; s < a->n_strips; s++) {
    strips keys = {STRIP_F16, 1, a->head_dim / 2, {a->k[s]}, {after_keys(a, s)}};
    strip_gemm_typed(STRIP_F16, a->rows, a->q, a->head_dim, &keys, NULL, a->scores + s * STRIP, KV_BLOCK);
  }
}

/* out (rows, head_dim) = alpha out + scores v */
static void attend_values(const attend_args *a) {
  strips values = {STRIP_F16, a->n_strips, STRIP / 2, {0}, {0}};
  for (int32_t j = 0; j < a->head_dim / STRIP; j++) {
    for (int s = 0; s < a->n_strips; s++) {
      values.data[s] = a->v[s] + j * STRIP * STRIP;
      values.ahead[s] = after_values(a, s) ? after_values(a, s) + j * STRIP * STRIP : NULL;
    }
    strip_gemm_typed(STRIP_F16, a->rows, a->scores, KV_BLOCK, &values, a->alpha, a->out + j * STRIP, a->head_dim);
  }
}
