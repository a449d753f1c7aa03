// The operator sparse_attn::native_attention_cuda for CPU tensors: the attention kernel, emulated.
#include <torch/csrc/stable/library.h>

#include "emulator.h"

#include "../../csrc/cuda/attention_arguments.h"

namespace sparse_attn {
namespace {

template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
void run(const Launch& launch, Kernel<ELEMENT, HEAD_DIM, ROUNDING>) {
  const auto blocks = static_cast<int>(launch.blocks), threads = static_cast<int>(launch.threads);
  for (int block = 0; block < blocks; ++block) {
    emulator::run_block(block, blocks, threads, launch.call.memory.bytes, [&] {
      attend_in_block<ELEMENT, HEAD_DIM, ROUNDING>(launch.call);
    });
  }
}

// A small GPU: blocks compute several heads, and those of long sequences do not fit beside each other.
constexpr Limits LIMITS{2, 120 * 1024};

void native_attention_cuda(
    const Tensor query,
    const Tensor key,
    const Tensor value,
    const Tensor words,
    const Tensor first_steps,
    const Tensor counts,
    const Tensor order,
    const Tensor places,
    const Tensor tickets,
    bool full,
    int64_t key_count,
    const std::vector<int64_t> heaviest,
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
    int64_t ticket,
    int64_t stream,
    const Tensor output,
    const Tensor lse) {
  const Launch launch = launch_of(
      LIMITS,
      query,
      key,
      value,
      words,
      first_steps,
      counts,
      order,
      places,
      tickets,
      full,
      key_count,
      heaviest,
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
      ticket,
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
