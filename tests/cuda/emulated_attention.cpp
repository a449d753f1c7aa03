// The operator sparse_attn::native_attention_cuda for CPU tensors: the attention kernel, emulated.
#include <torch/csrc/stable/library.h>

#include "emulator.h"

#include "../../csrc/cuda/attention_arguments.h"

namespace sparse_attn {
namespace {

template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
void run(const Launch& launch, Kernel<ELEMENT, HEAD_DIM, ROUNDING>) {
  for (int64_t block = 0; block < launch.blocks; ++block) {
    emulator::run_block(static_cast<int>(block), static_cast<int>(launch.threads), launch.call.memory.bytes, [&] {
      attend_in_block<ELEMENT, HEAD_DIM, ROUNDING>(launch.call);
    });
  }
}

void native_attention_cuda(
    const Tensor query,
    const Tensor key,
    const Tensor value,
    const Tensor words,
    const Tensor first_steps,
    const Tensor counts,
    const Tensor order,
    const Tensor swizzles,
    bool full,
    const OptionalTensor query_lengths,
    const OptionalTensor key_lengths,
    const OptionalTensor key_padding,
    const OptionalTensor cu_seqlens,
    int64_t max_length,
    double scale,
    const std::vector<double> levels,
    double step,
    bool causal,
    int64_t warps,
    int64_t parts,
    int64_t stream,
    const Tensor output,
    const Tensor lse) {
  const Launch launch = launch_of(
      query,
      key,
      value,
      words,
      first_steps,
      counts,
      order,
      swizzles,
      full,
      query_lengths,
      key_lengths,
      key_padding,
      cu_seqlens,
      max_length,
      scale,
      levels,
      step,
      causal,
      warps,
      parts,
      stream,
      output,
      lse);
  with_kernel(launch, [&](auto kernel) { run(launch, kernel); });
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, library) {
  library.impl("native_attention_cuda", TORCH_BOX(&sparse_attn::native_attention_cuda));
}
