// The operators for NVIDIA GPUs from sm_80 on.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "fragments.cuh"

#include "attention_operators.h"

namespace sparse_attn {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next call would find this one's error
  }
  STD_TORCH_CHECK(status == cudaSuccess, what, " failed: ", cudaGetErrorString(status));
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::MOST_THREADS, 1)
    attention_kernel(const __grid_constant__ typename Kernel::Call call) {
  Kernel::run(call);
}

int attribute_of_device(cudaDeviceAttr name) {
  int device = 0, number = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&number, name, device), "cudaDeviceGetAttribute");
  return number;
}

class Gpu {
  torch::stable::accelerator::DeviceGuard device_;
  Limits limits_;

 public:
  explicit Gpu(int32_t device)
      : device_(device),
        limits_{
            attribute_of_device(cudaDevAttrMultiProcessorCount),
            attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin)} {
  }
  const Limits& limits() const {
    return limits_;
  }
  template <class Kernel>
  void start(const Launch& launch, const typename Kernel::Call& call) const {
    if (launch.blocks == 0) {
      return;
    }
    // The same for every call: others may be started by other threads, or captured in the same graph.
    const auto bytes = static_cast<int>(limits_.shared_bytes);
    check(
        cudaFuncSetAttribute(attention_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "reserving shared memory for a block");
    const auto blocks = static_cast<unsigned>(launch.blocks), threads = static_cast<unsigned>(launch.threads);
    attention_kernel<Kernel><<<blocks, threads, launch.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(call);
    check(cudaGetLastError(), "starting an attention kernel");
  }
};

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CUDA, library) {
  library.impl("native_attention_cuda", TORCH_BOX(&sparse_attn::native_attention_cuda<sparse_attn::Gpu>));
  library.impl(
      "native_attention_gradients_cuda", TORCH_BOX(&sparse_attn::native_attention_gradients_cuda<sparse_attn::Gpu>));
}
