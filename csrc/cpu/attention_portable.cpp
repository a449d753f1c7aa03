// The kernels for any processor, with what its compiler makes of four lanes: NEON on Arm, SSE2 on x86.
#define SPARSE_ATTN_ISA portable
#define SPARSE_ATTN_LANES 4
#include "attention_kernels.h"

namespace sparse_attn {

const Kernels PORTABLE_KERNELS = {
    "portable", portable::Workspace::floats, portable::forward, portable::backward_query, portable::backward_key_value};

}  // namespace sparse_attn
