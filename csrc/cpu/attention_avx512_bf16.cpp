// The kernels for processors with AVX-512 and its bfloat16 products (Cooper Lake, Zen 4 and later).
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention.h"

#define SPARSE_ATTN_ISA avx512_bf16
#define SPARSE_ATTN_BFLOAT16_PRODUCTS
#define SPARSE_ATTN_LANES 16
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif
#include "attention_kernels.h"

namespace sparse_attn {

const Kernels AVX512_BF16_KERNELS = {
    "avx512_bf16",
    avx512_bf16::Workspace::floats,
    avx512_bf16::forward,
    avx512_bf16::backward_query,
    avx512_bf16::backward_key_value};

}  // namespace sparse_attn
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
