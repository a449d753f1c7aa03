// The kernels for processors with AVX2 and FMA (Haswell, Zen and later).
#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention.h"

#define SPARSE_ATTN_ISA avx2
#define SPARSE_ATTN_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "attention_kernels.h"

namespace sparse_attn {

const Kernels AVX2_KERNELS = {
    "avx2", avx2::Workspace::floats, avx2::forward, avx2::backward_query, avx2::backward_key_value};

}  // namespace sparse_attn
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
