// The operators for GPUs for CPU tensors: their kernels, emulated.
#include <torch/csrc/stable/library.h>

#include "emulator.h"

#include "../../csrc/cuda/attention_operators.h"

namespace sparse_attn {
namespace {

// A small GPU: blocks compute several heads, and those of long sequences do not fit beside each other.
struct Emulator {
  explicit Emulator(int32_t) {
  }
  Limits limits() const {
    return {2, 120 * 1024};
  }
  template <class Kernel>
  void start(const Launch& launch, const typename Kernel::Call& call) const {
    const auto blocks = static_cast<int>(launch.blocks), threads = static_cast<int>(launch.threads);
    for (int block = 0; block < blocks; ++block) {
      emulator::run_block(block, blocks, threads, launch.shared_bytes, [&] { Kernel::run(call); });
    }
  }
};

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, library) {
  library.impl("native_attention_cuda", TORCH_BOX(&sparse_attn::native_attention_cuda<sparse_attn::Emulator>));
  library.impl(
      "native_attention_gradients_cuda",
      TORCH_BOX(&sparse_attn::native_attention_gradients_cuda<sparse_attn::Emulator>));
}
