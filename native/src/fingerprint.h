/* Telling models and contents apart: a hash for accidents, not against someone who looks for collisions. */
#ifndef PYLLM_SRC_FINGERPRINT_H
#define PYLLM_SRC_FINGERPRINT_H
#include <stdint.h>

/* FNV-1a over 64-bit words, the last one padded with zeros. h: of what came before; 0 to begin. */
uint64_t hash_bytes(uint64_t h, const void *data, uint64_t size);
/* The same, but each word's upper half is folded down, for where two flipped bits must not cancel. */
uint64_t checksum_bytes(const void *data, uint64_t size);

#endif
