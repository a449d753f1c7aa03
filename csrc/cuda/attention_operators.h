// The operators for GPUs, whose schemas are in sparse_attn/backends/native_cuda.py, on any Machine that can start their
// kernels:
//   Machine(device_index)                  makes a GPU the current one as long as it lives
//   limits()                               of that GPU
//   start<Kernel>(launch, Kernel::Call)    runs a kernel
// Include fragments.cuh (or the emulator's) before.
#pragma once

#include <type_traits>

#include "attention_arguments.h"
#include "attention_gradients.cuh"
#include "attention_kernel.cuh"

namespace sparse_attn {

// visit(element, head_dim), both integral constants.
template <class Visit>
void with_types(ScalarType dtype, int64_t head_dim, const Visit& visit) {
  const auto with_head_dim = [&](auto element) {
    STD_TORCH_CHECK(head_dim == 32 || head_dim == 64, "head_dim must be 32 or 64");
    if (head_dim == 32) {
      visit(element, std::integral_constant<int, 32>());
    } else {
      visit(element, std::integral_constant<int, 64>());
    }
  };
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "query must be float16 or bfloat16");
  if (dtype == ScalarType::Half) {
    with_head_dim(std::integral_constant<Element, Element::Float16>());
  } else {
    with_head_dim(std::integral_constant<Element, Element::BFloat16>());
  }
}

template <class Machine>
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
  const Machine machine(query.get_device_index());
  const int64_t head_dim = query.size(query.dim() - 1);
  AttentionCall call{};
  read_tensors(call, query, key, value, output, query_lengths, key_lengths, cu_seqlens, max_length, scale, lse);
  call.key_padding = data_of<uint8_t>(key_padding);
  call.causal = causal;
  read_levels(call, levels, step, query.scalar_type());
  read_lists(call, words, first_steps, counts, order, places, full, key_count, heaviest);
  const Launch launch =
      cut(call, machine.limits(), head_dim, FORWARD_THREADS, 1, warps, parts, tickets, ticket, stream);
  with_types(query.scalar_type(), head_dim, [&](auto element, auto dim) {
    constexpr Element ELEMENT = decltype(element)::value;
    constexpr int HEAD_DIM = decltype(dim)::value;
    if (call.level_count == 0) {
      machine.template start<Forward<ELEMENT, HEAD_DIM, Rounding::None>>(launch, call);
    } else if (call.level_count <= 8) {
      machine.template start<Forward<ELEMENT, HEAD_DIM, Rounding::EightLevels>>(launch, call);
    } else {
      machine.template start<Forward<ELEMENT, HEAD_DIM, Rounding::Table>>(launch, call);
    }
  });
}

// One of the two kernels of the backward pass: for queries if the forward pass's output is given, else for keys; see
// GradientCall.
template <class Machine>
void native_attention_gradients_cuda(
    const Tensor owned,
    const Tensor first_gathered,
    const Tensor second_gathered,
    const Tensor words,
    const Tensor first_steps,
    const Tensor counts,
    const Tensor order,
    const Tensor places,
    const Tensor tickets,
    bool full,
    int64_t gathered_count,
    const std::vector<int64_t> heaviest,
    const OptionalTensor owned_lengths,
    const OptionalTensor gathered_lengths,
    const OptionalTensor key_padding,
    const OptionalTensor cu_seqlens,
    int64_t max_length,
    double scale,
    int64_t warps,
    int64_t parts,
    int64_t ticket,
    int64_t stream,
    const Tensor lse,
    const Tensor second_owned,
    const OptionalTensor attended,
    const Tensor statistics,
    const Tensor result,
    const OptionalTensor second_result) {
  const Machine machine(owned.get_device_index());
  const int64_t head_dim = owned.size(owned.dim() - 1);
  const bool packed = cu_seqlens.has_value();
  GradientCall call{};
  read_tensors(
      call,
      owned,
      first_gathered,
      second_gathered,
      result,
      owned_lengths,
      gathered_lengths,
      cu_seqlens,
      max_length,
      scale,
      lse);
  STD_TORCH_CHECK(attended.has_value() != second_result.has_value(), "queries have an output, keys two results");
  STD_TORCH_CHECK(
      lse.is_contiguous() && statistics.is_contiguous() && statistics.numel() == 2 * lse.numel() &&
          statistics.scalar_type() == ScalarType::Float,
      "statistics must have two float32 for each lse");
  call.second = rows_of(second_owned, packed);
  call.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  call.scale = static_cast<float>(scale);
  (attended ? call.key_padding : call.owned_padding) = data_of<uint8_t>(key_padding);
  read_lists(call, words, first_steps, counts, order, places, full, gathered_count, heaviest);
  const Launch launch =
      cut(call, machine.limits(), head_dim, GRADIENT_THREADS, GRADIENT_AREAS, warps, parts, tickets, ticket, stream);
  with_types(owned.scalar_type(), head_dim, [&](auto element, auto dim) {
    constexpr Element ELEMENT = decltype(element)::value;
    constexpr int HEAD_DIM = decltype(dim)::value;
    if (attended) {
      call.attended = rows_of(*attended, packed);
      machine.template start<Gradients<QueryGradientWarp<ELEMENT, HEAD_DIM>>>(launch, call);
    } else {
      call.second_result = rows_of(*second_result, packed);
      machine.template start<Gradients<KeyGradientWarp<ELEMENT, HEAD_DIM>>>(launch, call);
    }
  });
}

}  // namespace sparse_attn
