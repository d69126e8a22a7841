/* In the emulated library the CUDA backend is linked in, in place of src/load_cuda.c. */
extern "C" {
#include "backend.h"
const cuda_library *pyllm_cuda(void);
const cuda_library *load_cuda(pyllm_error *) { return pyllm_cuda(); }
}
