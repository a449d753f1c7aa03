// From the arguments of the operators to an AttentionCall, and how it is cut into blocks.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "attention_call.h"

namespace sparse_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The blocks and threads that compute a call.
struct Launch {
  int64_t blocks, threads, shared_bytes;
  void* stream;
};

// What a call can use of a GPU.
struct Limits {
  int64_t multiprocessors, shared_bytes;  // of these, what one block can have
};

template <class T>
const T* data_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
const T* list_data(const Tensor& tensor, ScalarType dtype, int64_t dims) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.dim() == dims && tensor.is_contiguous(),
      "the lists of a layout must be as fragment_lists makes them");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// A number in one of the 16-bit types.
inline uint16_t element_bits(double number, ScalarType dtype) {
  const auto single = static_cast<float>(number);
  return dtype == ScalarType::Half ? torch::headeronly::Half(single).x : torch::headeronly::BFloat16(single).x;
}

// Strides of packed [tokens, heads, head_dim] or padded [batch, heads, length, head_dim] elements of two bytes.
inline Rows rows_of(const Tensor& tensor, bool packed) {
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK(dims == (packed ? 3 : 4), "query, key, value and output must be 3-dimensional if packed, else 4");
  const int64_t batch = packed ? 0 : 2 * tensor.stride(0);
  const int64_t head = 2 * tensor.stride(1), row = 2 * tensor.stride(packed ? 0 : 2);
  auto* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  const auto aligned = [](int64_t bytes, int64_t size) { return size <= 1 || bytes % 16 == 0; };
  STD_TORCH_CHECK(
      tensor.stride(dims - 1) == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
          aligned(batch, packed ? 1 : tensor.size(0)) && aligned(head, tensor.size(1)) &&
          aligned(row, tensor.size(packed ? 0 : 2)),
      "the rows of query, key, value and output must start at multiples of 16 bytes, their elements side by side");
  STD_TORCH_CHECK(row < MAX_ROW_STRIDE, "rows of query, key, value and output must be less than 4 MB apart");
  return {data, batch, head, static_cast<uint32_t>(row)};
}

// What is computed: tensors, lengths, scale. `call.lse` is null where `lse` is empty.
inline void read_tensors(
    AttentionCall& call,
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const Tensor& output,
    const OptionalTensor& query_lengths,
    const OptionalTensor& key_lengths,
    const OptionalTensor& cu_seqlens,
    int64_t max_length,
    double scale,
    const Tensor& lse) {
  const bool packed = cu_seqlens.has_value();
  call.query = rows_of(query, packed);
  call.key = rows_of(key, packed);
  call.value = rows_of(value, packed);
  call.output = rows_of(output, packed);
  call.batch = static_cast<int32_t>(packed ? cu_seqlens->numel() - 1 : query.size(0));
  call.heads = static_cast<int32_t>(query.size(1));
  call.query_len = static_cast<int32_t>(packed ? max_length : query.size(2));
  call.key_len = static_cast<int32_t>(packed ? max_length : key.size(2));
  call.query_lengths = data_of<int32_t>(query_lengths);
  call.key_lengths = data_of<int32_t>(key_lengths);
  call.cu_seqlens = data_of<int32_t>(cu_seqlens);
  STD_TORCH_CHECK(scale > 0.0, "the scale must be positive");
  call.scale_log2 = static_cast<float>(scale * 1.44269504088896340736);
  const bool has_lse = lse.numel() > 0;
  call.lse = has_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  call.lse_batch = has_lse && !packed ? lse.stride(0) : 0;
  call.lse_head = has_lse ? lse.stride(packed ? 0 : 1) : 0;
}

inline void read_levels(AttentionCall& call, const std::vector<double>& levels, double step, ScalarType dtype) {
  const auto level_count = static_cast<int64_t>(levels.size());
  STD_TORCH_CHECK(level_count <= MAX_LEVELS, "there are at most 256 levels");
  for (int64_t i = 0; i < level_count; ++i) {
    const uint32_t bits = element_bits(levels[i], dtype);
    call.levels[i / 2] |= bits << (16 * (i % 2));
    if (i < 8) {
      call.low_bytes[i / 4] |= (bits & 255) << (8 * (i % 4));
      call.high_bytes[i / 4] |= bits >> 8 << (8 * (i % 4));
    }
  }
  call.level_count = static_cast<int32_t>(level_count);
  call.level_rate = level_count > 0 ? static_cast<float>(1.0 / (static_cast<double>(level_count) * step)) : 0.0f;
  call.below_level_count = std::nextafter(static_cast<float>(level_count), 0.0f);
}

// The layout's lists, for a call whose tensors have been read.
inline void read_lists(
    AttentionCall& call,
    const Tensor& words,
    const Tensor& first_steps,
    const Tensor& counts,
    const Tensor& order,
    const Tensor& places,
    bool full,
    int64_t key_count,
    const std::vector<int64_t>& heaviest) {
  FragmentLists& lists = call.lists;
  lists.words = list_data<uint32_t>(words, ScalarType::Int, 2);
  lists.first_steps = list_data<int32_t>(first_steps, ScalarType::Int, 2);
  lists.counts = list_data<int32_t>(counts, ScalarType::Int, 3);
  lists.order = list_data<uint8_t>(order, ScalarType::Byte, 2);
  lists.places = list_data<uint16_t>(places, ScalarType::Short, 2);
  lists.groups = static_cast<int32_t>(first_steps.size(1));
  lists.blocks = static_cast<int32_t>(counts.size(2)) - 1;
  lists.keys = static_cast<int32_t>(key_count);
  lists.places_of_head = static_cast<int32_t>(places.size(1));
  lists.full = full;
  STD_TORCH_CHECK(
      call.query_len <= MAX_LENGTH && call.key_len <= lists.keys && call.query_len <= lists.groups * GROUP_ROWS,
      "queries and keys must lie within the layout, and within ",
      MAX_LENGTH);
  STD_TORCH_CHECK(
      first_steps.size(0) == call.heads && order.size(1) == MAX_GROUPS &&
          static_cast<int64_t>(heaviest.size()) == std::min(call.heads, MAX_ORDERED_HEADS),
      "the layout is for other heads");
  std::copy(heaviest.begin(), heaviest.end(), call.heaviest);
}

// How a call whose tensors, levels and lists have been read is cut: `warps` a block with `areas` of scratch each, and
// each head of a sequence into at least `parts` items.
inline Launch cut(
    AttentionCall& call,
    const Limits& limits,
    int64_t head_dim,
    int64_t most_threads,
    int64_t areas,
    int64_t warps,
    int64_t parts,
    const Tensor& tickets,
    int64_t ticket,
    int64_t stream) {
  STD_TORCH_CHECK(0 < warps && 32 * warps <= most_threads && 0 < parts, "a block has 1 to ", most_threads, " threads");
  // A few heads are cut so that all multiprocessors have some of their groups.
  const int64_t pairs = static_cast<int64_t>(call.batch) * call.heads;
  const int64_t groups = (call.query_len + GROUP_ROWS - 1) / GROUP_ROWS;
  if (pairs > 0) {
    parts = std::max(parts, std::min(limits.multiprocessors / pairs, groups));
  }
  STD_TORCH_CHECK(pairs * parts < std::numeric_limits<int32_t>::max() / 2, "there are too many heads and sequences");
  call.parts = static_cast<int32_t>(parts);
  call.items = static_cast<int32_t>(pairs * parts);
  STD_TORCH_CHECK(
      ticket < tickets.numel() && tickets.scalar_type() == ScalarType::Int && tickets.is_contiguous(),
      "there is no such ticket");
  call.ticket = ticket >= 0 ? static_cast<uint32_t*>(tickets.mutable_data_ptr()) + ticket : nullptr;
  const int64_t blocks = std::min(pairs * parts, limits.multiprocessors);
  const int64_t rounds = blocks > 0 ? (call.items + blocks - 1) / blocks : 1;
  const bool uneven = call.cu_seqlens || call.query_lengths || call.key_lengths;
  const int64_t sorted = uneven && call.batch <= MAX_SORTED_SEQUENCES ? call.batch : 0;
  call.memory =
      shared_memory_of(head_dim, call.key_len, call.level_count, areas * warps, sorted, limits.shared_bytes, rounds);
  STD_TORCH_CHECK(
      call.memory.bytes <= limits.shared_bytes,
      "keys and values take ",
      call.memory.bytes,
      " bytes of shared memory, the GPU has ",
      limits.shared_bytes);
  return {blocks, 32 * warps, call.memory.bytes, reinterpret_cast<void*>(stream)};
}

}  // namespace sparse_attn
