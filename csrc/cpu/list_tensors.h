// The lists of a layout as operators get them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace sparse_attn {

inline const int32_t* list_of(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.is_contiguous(),
      "the lists of a layout are contiguous int32 tensors");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// The stops of lists in one part.
inline const int32_t* stops_of(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(1) == 1, "stops must be [heads * groups, 1, key_blocks + 1]");
  return list_of(tensor);
}

}  // namespace sparse_attn
