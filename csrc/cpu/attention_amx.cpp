// The kernels for processors with AMX and AVX-512's bfloat16 products (Sapphire Rapids and later).
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "attention.h"
#if !defined(SPARSE_ATTN_TILE_UNIT)  // a test brings its own
#include "tile_unit.h"
#endif

namespace sparse_attn {

bool amx_usable() {
  static const bool usable = tile_unit::usable();
  return usable;
}

}  // namespace sparse_attn

// What follows has the instructions of AVX-512 wherever the compiler likes; AMX's are in the assembly of tile_unit.h.
#define SPARSE_ATTN_ISA amx
#define SPARSE_ATTN_TILE_PRODUCTS
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

const Kernels AMX_KERNELS = {
    tile_unit::KERNELS_NAME, amx::Workspace::floats, amx::forward, amx::backward_query, amx::backward_key_value};

}  // namespace sparse_attn
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
