// The kernels for processors with AVX-512 and its bfloat16 products (Cooper Lake, Zen 4 and later).
#if defined(__x86_64__)

#include <immintrin.h>

#include "attention.h"
#include "instructions.h"

#define SPARSE_ATTN_ISA avx512_bf16
#define SPARSE_ATTN_BFLOAT16_PRODUCTS
#define SPARSE_ATTN_LANES 16
SPARSE_ATTN_INSTRUCTIONS_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#include "attention_kernels.h"

namespace sparse_attn {

const Kernels AVX512_BF16_KERNELS = {
    "avx512_bf16",
    avx512_bf16::Workspace::floats,
    avx512_bf16::forward_any,
    avx512_bf16::backward_query_any,
    avx512_bf16::backward_key_value_any};

}  // namespace sparse_attn
SPARSE_ATTN_INSTRUCTIONS_END

#endif
