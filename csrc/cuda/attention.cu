// The operator sparse_attn::native_attention_cuda on NVIDIA GPUs from sm_80 on.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include "fragments.cuh"

#include "attention_arguments.h"

namespace sparse_attn {
namespace {

void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, " failed: ", cudaGetErrorString(status));
}

// Makes a device the current one of this module's runtime, and undoes that.
class CurrentDevice {
  int before = 0, device;

 public:
  explicit CurrentDevice(int device) : device(device) {
    check(cudaGetDevice(&before), "cudaGetDevice");
    if (device != before) {
      check(cudaSetDevice(device), "cudaSetDevice");
    }
  }
  CurrentDevice(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (device != before) {
      cudaSetDevice(before);
    }
  }
};

template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
__global__ void __launch_bounds__(MAX_THREADS, 1) attention_kernel(const __grid_constant__ AttentionCall call) {
  attend_in_block<ELEMENT, HEAD_DIM, ROUNDING>(call);
}

template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
void start(const Launch& launch, Kernel<ELEMENT, HEAD_DIM, ROUNDING>) {
  const auto kernel = attention_kernel<ELEMENT, HEAD_DIM, ROUNDING>;
  const int bytes = launch.call.memory.bytes;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "reserving shared memory for a block");
  // All of an SM's memory that can be: as many blocks as fit.
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "reserving shared memory of an SM");
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto blocks = static_cast<unsigned>(launch.blocks), threads = static_cast<unsigned>(launch.threads);
  kernel<<<blocks, threads, bytes, stream>>>(launch.call);
  check(cudaGetLastError(), "starting the attention kernel");
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
    const Tensor levels,
    int64_t level_count,
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
      level_count,
      step,
      causal,
      warps,
      parts,
      stream,
      output,
      lse);
  if (launch.blocks > 0) {
    const CurrentDevice device(query.get_device_index());
    with_kernel(launch, [&](auto kernel) { start(launch, kernel); });
  }
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, library) {
  library.impl("native_attention_cuda", TORCH_BOX(&sparse_attn::native_attention_cuda));
}
