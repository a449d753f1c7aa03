// The operators sparse_attn::native_attention and native_attention_backward on the CPU: they read tensors and choose
// the instruction set of this processor. Schemas: sparse_attn/backends/native_cpu.py.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "attention_threads.h"
#include "list_tensors.h"

namespace sparse_attn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The instruction sets that this processor runs, best first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool pairs = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool pairs_are_slow = __builtin_cpu_is("intel");  // slower than floats, which they are converted to then
  if (pairs && amx_usable()) {
    usable.push_back(&AMX_KERNELS);
  }
  if (pairs && !pairs_are_slow) {
    usable.push_back(&AVX512_BF16_KERNELS);
  }
  if (avx512) {
    usable.push_back(&AVX512_KERNELS);
  }
  if (pairs && pairs_are_slow) {
    usable.push_back(&AVX512_BF16_KERNELS);
  }
  if (avx2) {
    usable.push_back(&AVX2_KERNELS);
  }
#endif
  usable.push_back(&PORTABLE_KERNELS);
  return usable;
}

const Kernels& kernels_named(const std::string& name) {
  static const std::vector<const Kernels*> usable = usable_kernels();
  if (name.empty()) {
    return *usable.front();
  }
  const auto found =
      std::find_if(usable.begin(), usable.end(), [&](const Kernels* kernels) { return kernels->name == name; });
  STD_TORCH_CHECK(found != usable.end(), "this processor or build has no kernels for the instruction set ", name);
  return **found;
}

std::string instruction_sets() {
  std::string names;
  for (const Kernels* kernels : usable_kernels()) {
    names += (names.empty() ? "" : " ") + std::string(kernels->name);
  }
  return names;
}

template <class T>
const T* optional_data(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

Matrix matrix_of(const Tensor& tensor, bool packed) {
  void* data = const_cast<void*>(tensor.const_data_ptr());
  if (packed) {  // [tokens, heads, head_dim]
    return {data, 0, tensor.stride(1), tensor.stride(0), tensor.stride(2)};
  }
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

Lists lists_of(const Tensor& stops, const Tensor& columns, const Tensor& row_bits, bool full, int64_t heads) {
  return {stops_of(stops), list_of(columns), list_of(row_bits), full, stops.size(0) / heads, stops.size(2) - 1};
}

// Without row_stops nothing is divided.
DividedLists divided_lists_of(
    const Tensor& stops,
    const Tensor& columns,
    const Tensor& row_bits,
    const Tensor& row_stops,
    const Tensor& row_columns,
    const Tensor& sorted_columns,
    const Tensor& sorted_places,
    int64_t heads) {
  if (row_stops.numel() == 0) {
    return {};
  }
  DividedLists divided{lists_of(stops, columns, row_bits, false, heads)};
  STD_TORCH_CHECK(
      row_stops.numel() == heads * divided.groups * GROUP_ROWS + 1, "row_stops must be [heads * groups * 16 + 1]");
  divided.row_stops = list_of(row_stops);
  divided.row_columns = list_of(row_columns);
  divided.sorted_columns = list_of(sorted_columns);
  divided.sorted_places = list_of(sorted_places);
  return divided;
}

Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::Float32;
    case ScalarType::BFloat16:
      return Element::BFloat16;
    case ScalarType::Half:
      return Element::Float16;
    default:
      STD_TORCH_CHECK(false, "query must be float32, bfloat16 or float16");
      return Element::Float32;
  }
}

// Packed sequences as the kernels may take them: a traced call comes unchecked.
void check_sequences(const int32_t* cu_seqlens, int64_t count, int64_t tokens, int64_t max_length) {
  STD_TORCH_CHECK(
      count >= 0 && cu_seqlens[0] == 0 && cu_seqlens[count] == tokens,
      "cu_seqlens must begin with 0 and end with the number of tokens, ",
      tokens);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = cu_seqlens[i], end = cu_seqlens[i + 1];
    STD_TORCH_CHECK(
        0 <= first && first <= end && end <= tokens && end - first <= max_length,
        "cu_seqlens has a sequence from token ",
        first,
        " to ",
        end,
        ", but there are ",
        tokens,
        " tokens and max_length is ",
        max_length);
  }
}

// The fields that both passes share.
void read_call(
    Call& call,
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const OptionalTensor& query_lengths,
    const OptionalTensor& key_lengths,
    const OptionalTensor& key_padding,
    const OptionalTensor& cu_seqlens,
    int64_t max_length,
    const OptionalTensor& seed,
    double scale,
    const Tensor& levels,
    int64_t level_count,
    double log2_threshold,
    double step,
    bool mid_points,
    bool causal,
    int64_t query_offset,
    double dropout_factor,
    int64_t dropout_threshold,
    const Tensor& lse) {
  const bool packed = cu_seqlens.has_value();
  call.element = element_of(query);
  call.query = matrix_of(query, packed);
  call.key = matrix_of(key, packed);
  call.value = matrix_of(value, packed);
  call.batch = packed ? cu_seqlens->numel() - 1 : query.size(0);
  call.heads = query.size(1);
  call.query_len = packed ? max_length : query.size(2);
  call.key_len = packed ? max_length : key.size(2);
  call.head_dim = query.size(packed ? 2 : 3);
  call.query_lengths = optional_data<int32_t>(query_lengths);
  call.key_lengths = optional_data<int32_t>(key_lengths);
  call.key_padding = optional_data<uint8_t>(key_padding);
  call.cu_seqlens = optional_data<int32_t>(cu_seqlens);
  if (packed) {
    check_sequences(call.cu_seqlens, call.batch, query.size(0), max_length);
  }
  call.causal = causal;
  call.query_offset = query_offset;
  call.scale = static_cast<float>(scale);
  call.rounding = {
      static_cast<const float*>(levels.const_data_ptr()),
      level_count,
      static_cast<float>(log2_threshold),
      static_cast<float>(step),
      mid_points};
  const auto* counter = optional_data<int64_t>(seed);
  call.dropout = {
      counter ? static_cast<uint32_t>(dropout_threshold) : 0,
      counter ? static_cast<uint32_t>(*counter) : 0,
      static_cast<float>(dropout_factor)};
  const bool has_lse = lse.numel() > 0;
  call.lse_batch = has_lse && !packed ? lse.stride(0) : 0;
  call.lse_head = has_lse ? lse.stride(packed ? 0 : 1) : 0;
}

void native_attention(
    const Tensor query,
    const Tensor key,
    const Tensor value,
    const Tensor stops,
    const Tensor columns,
    const Tensor row_bits,
    bool full,
    const Tensor shared_stops,
    const Tensor shared_columns,
    const Tensor shared_bits,
    const Tensor row_stops,
    const Tensor row_columns,
    const Tensor sorted_columns,
    const Tensor sorted_places,
    const OptionalTensor query_lengths,
    const OptionalTensor key_lengths,
    const OptionalTensor key_padding,
    const OptionalTensor cu_seqlens,
    int64_t max_length,
    const OptionalTensor seed,
    double scale,
    const Tensor levels,
    int64_t level_count,
    double log2_threshold,
    double step,
    bool mid_points,
    bool causal,
    int64_t query_offset,
    double dropout_factor,
    int64_t dropout_threshold,
    const std::string instruction_set,
    const Tensor output,
    const Tensor lse) {
  Forward call{};
  read_call(
      call,
      query,
      key,
      value,
      query_lengths,
      key_lengths,
      key_padding,
      cu_seqlens,
      max_length,
      seed,
      scale,
      levels,
      level_count,
      log2_threshold,
      step,
      mid_points,
      causal,
      query_offset,
      dropout_factor,
      dropout_threshold,
      lse);
  call.lists = lists_of(stops, columns, row_bits, full, call.heads);
  call.divided = divided_lists_of(
      shared_stops, shared_columns, shared_bits, row_stops, row_columns, sorted_columns, sorted_places, call.heads);
  call.output = matrix_of(output, call.cu_seqlens);
  call.lse = lse.numel() > 0 ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  const Kernels& kernels = kernels_named(instruction_set);
  const int64_t end = (call.query_len + query_offset + GROUP_ROWS - 1) / GROUP_ROWS;
  run<Forward>(call, kernels, {{kernels.forward, query_offset / GROUP_ROWS, end}});
}

void native_attention_backward(
    const Tensor query,
    const Tensor key,
    const Tensor value,
    const Tensor stops,
    const Tensor columns,
    const Tensor row_bits,
    bool full,
    const Tensor transposed_stops,
    const Tensor transposed_columns,
    const Tensor transposed_bits,
    bool transposed_full,
    const Tensor shared_stops,
    const Tensor shared_columns,
    const Tensor shared_bits,
    const Tensor row_stops,
    const Tensor row_columns,
    const Tensor sorted_columns,
    const Tensor sorted_places,
    const OptionalTensor query_lengths,
    const OptionalTensor key_lengths,
    const OptionalTensor key_padding,
    const OptionalTensor cu_seqlens,
    int64_t max_length,
    const OptionalTensor seed,
    double scale,
    const Tensor levels,
    int64_t level_count,
    double log2_threshold,
    double step,
    bool mid_points,
    bool causal,
    int64_t query_offset,
    double dropout_factor,
    int64_t dropout_threshold,
    const std::string instruction_set,
    const Tensor lse,
    const Tensor grad_output,
    const Tensor delta,
    const Tensor grad_query,
    const Tensor grad_key,
    const Tensor grad_value) {
  Backward call{};
  read_call(
      call,
      query,
      key,
      value,
      query_lengths,
      key_lengths,
      key_padding,
      cu_seqlens,
      max_length,
      seed,
      scale,
      levels,
      level_count,
      log2_threshold,
      step,
      mid_points,
      causal,
      query_offset,
      dropout_factor,
      dropout_threshold,
      lse);
  const bool packed = cu_seqlens.has_value();
  call.lists = lists_of(stops, columns, row_bits, full, call.heads);
  call.transposed = lists_of(transposed_stops, transposed_columns, transposed_bits, transposed_full, call.heads);
  call.divided = divided_lists_of(
      shared_stops, shared_columns, shared_bits, row_stops, row_columns, sorted_columns, sorted_places, call.heads);
  call.grad_output = matrix_of(grad_output, packed);
  call.grad_query = matrix_of(grad_query, packed);
  call.grad_key = matrix_of(grad_key, packed);
  call.grad_value = matrix_of(grad_value, packed);
  call.lse = static_cast<const float*>(lse.const_data_ptr());
  call.delta = static_cast<float*>(delta.mutable_data_ptr());
  const Kernels& kernels = kernels_named(instruction_set);
  const int64_t query_end = (call.query_len + query_offset + GROUP_ROWS - 1) / GROUP_ROWS;
  const int64_t key_end = (call.key_len + GROUP_ROWS - 1) / GROUP_ROWS;
  run<Backward>(
      call,
      kernels,
      {{kernels.backward_query, query_offset / GROUP_ROWS, query_end}, {kernels.backward_key_value, 0, key_end}});
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, library) {
  library.impl("native_attention", TORCH_BOX(&sparse_attn::native_attention));
  library.impl("native_attention_backward", TORCH_BOX(&sparse_attn::native_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CompositeExplicitAutograd, library) {
  library.impl("instruction_sets", TORCH_BOX(&sparse_attn::instruction_sets));
}
