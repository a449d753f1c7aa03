// The kernels for processors with AMX and AVX-512's bfloat16 products (Sapphire Rapids and later).
#if defined(__x86_64__)

#include <immintrin.h>

#include "attention.h"
#include "instructions.h"
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
SPARSE_ATTN_INSTRUCTIONS_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#include "attention_kernels.h"

namespace sparse_attn {

const Kernels AMX_KERNELS = {
    tile_unit::KERNELS_NAME,
    amx::Workspace::floats,
    amx::forward_any,
    amx::backward_query_any,
    amx::backward_key_value_any};

}  // namespace sparse_attn
SPARSE_ATTN_INSTRUCTIONS_END

#endif
