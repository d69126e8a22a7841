/* Functions of a few numbers that the CPU's code and the GPU's kernels both call. */
#ifndef PYLLM_SRC_ANYWHERE_H
#define PYLLM_SRC_ANYWHERE_H

#ifdef __CUDACC__
#define ANYWHERE static inline __host__ __device__
#else
#define ANYWHERE static inline
#endif

#endif
