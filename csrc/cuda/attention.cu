// The operator sparse_attn::native_attention_cuda on NVIDIA GPUs from sm_80 on.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "fragments.cuh"

#include "attention_arguments.h"

namespace sparse_attn {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next call would find this one's error
  }
  STD_TORCH_CHECK(status == cudaSuccess, what, " failed: ", cudaGetErrorString(status));
}

template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
__global__ void __launch_bounds__(MAX_THREADS, 1) attention_kernel(const __grid_constant__ AttentionCall call) {
  attend_in_block<ELEMENT, HEAD_DIM, ROUNDING>(call);
}

int attribute_of_device(cudaDeviceAttr name) {
  int device = 0, number = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&number, name, device), "cudaDeviceGetAttribute");
  return number;
}

Limits limits_of_device() {
  return {
      attribute_of_device(cudaDevAttrMultiProcessorCount),
      attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
void start(const Launch& launch, const Limits& limits, Kernel<ELEMENT, HEAD_DIM, ROUNDING>) {
  const auto kernel = attention_kernel<ELEMENT, HEAD_DIM, ROUNDING>;
  // The same for every call: others may be started by other threads, or captured in the same graph.
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits.shared_bytes)),
      "reserving shared memory for a block");
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto blocks = static_cast<unsigned>(launch.blocks), threads = static_cast<unsigned>(launch.threads);
  kernel<<<blocks, threads, launch.call.memory.bytes, stream>>>(launch.call);
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
  const torch::stable::accelerator::DeviceGuard device(query.get_device_index());
  const Limits limits = limits_of_device();
  const Launch launch = launch_of(
      limits,
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
  if (launch.blocks > 0) {
    with_kernel(launch, [&](auto kernel) { start(launch, limits, kernel); });
  }
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, library) {
  library.impl("native_attention_cuda", TORCH_BOX(&sparse_attn::native_attention_cuda));
}
