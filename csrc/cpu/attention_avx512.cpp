// The kernels for processors with AVX-512 (Skylake-SP, Zen 4 and later).
#if defined(__x86_64__)

#include <immintrin.h>

#include "attention.h"
#include "instructions.h"

#define SPARSE_ATTN_ISA avx512
#define SPARSE_ATTN_LANES 16
SPARSE_ATTN_INSTRUCTIONS_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#include "attention_kernels.h"

namespace sparse_attn {

const Kernels AVX512_KERNELS = {
    "avx512", avx512::Workspace::floats, avx512::forward, avx512::backward_query, avx512::backward_key_value};

}  // namespace sparse_attn
SPARSE_ATTN_INSTRUCTIONS_END

#endif
