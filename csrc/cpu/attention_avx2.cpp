// The kernels for processors with AVX2, FMA and F16C (Haswell, Zen and later).
#if defined(__x86_64__)

#include <immintrin.h>

#include "attention.h"
#include "instructions.h"

#define SPARSE_ATTN_ISA avx2
#define SPARSE_ATTN_LANES 8
SPARSE_ATTN_INSTRUCTIONS_BEGIN("avx2,fma,f16c")
#include "attention_kernels.h"

namespace sparse_attn {

const Kernels AVX2_KERNELS = {
    "avx2", avx2::Workspace::floats, avx2::forward, avx2::backward_query, avx2::backward_key_value};

}  // namespace sparse_attn
SPARSE_ATTN_INSTRUCTIONS_END

#endif
