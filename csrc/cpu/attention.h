// One attention call as the CPU kernels take it. See sparse_attn.ops.AttentionCall for what the arguments mean.
#pragma once

#include <cstdint>

namespace sparse_attn {

enum class Element { Float32, BFloat16, Float16 };

// A tensor's memory: strides in elements. Packed tensors have no stride between sequences.
struct Matrix {
  void* data;
  int64_t batch, head, row, dim;
};

// The column lists of sparse_attn.layout.ColumnLists for groups of 16 rows, in one part.
struct Lists {
  const int32_t* stops;
  const int32_t* columns;
  const int32_t* row_bits;
  bool full;
  int64_t groups;  // of one head
  int64_t blocks;  // stops of a list, less one
};

// The same lists divided, as sparse_attn.backends.row_lists.RowLists says.
struct DividedLists : Lists {
  const int32_t* row_stops;  // null where nothing is divided
  const int32_t* row_columns;
  const int32_t* sorted_columns;
  const int32_t* sorted_places;
};

// The quantiser of probabilities: `levels` values for bins of width `step` in log2(p) above `log2_threshold`.
struct Rounding {
  const float* levels;  // at least 16 can be read
  int64_t count;        // 0: no rounding
  float log2_threshold, step;
  bool mid_points;
};

struct Dropout {
  uint32_t threshold;  // 0: none
  uint32_t seed;
  float factor;
};

struct Call {
  Element element;
  Matrix query, key, value;
  int64_t batch, heads, query_len, key_len, head_dim;  // lengths: the longest of a packed batch
  const int32_t* query_lengths;                        // these four may be null
  const int32_t* key_lengths;
  const uint8_t* key_padding;
  const int32_t* cu_seqlens;
  bool causal;
  int64_t query_offset;
  float scale;
  Rounding rounding;
  Dropout dropout;
  int64_t lse_batch, lse_head;  // strides of lse and delta, whose rows are contiguous
};

struct Forward : Call {
  Lists lists;
  DividedLists divided;
  Matrix output;
  float* lse;  // may be null
};

struct Backward : Call {
  Lists lists, transposed;
  DividedLists divided;  // of the transposed ones
  Matrix grad_output, grad_query, grad_key, grad_value;
  const float* lse;
  float* delta;
};

constexpr int GROUP_ROWS = 16;  // queries, or keys, that share a list
constexpr int SORTED_ROWS = 4;  // of a group, whose own lists are sorted together: as many as a kernel takes at a time

// What a thread works on: row groups [first, end) of one head of one sequence. The backward pass has two kinds: groups
// of queries, then groups of keys.
struct Task {
  int64_t batch, head, first, end;
};

// The kernels of one instruction set. `workspace` is 64-byte aligned memory of a thread's own, `workspace_floats` of
// it.
struct Kernels {
  const char* name;
  int64_t (*workspace_floats)(const Call& call);
  void (*forward)(const Forward& call, const Task& task, float* workspace);
  void (*backward_query)(const Backward& call, const Task& task, float* workspace);
  void (*backward_key_value)(const Backward& call, const Task& task, float* workspace);
};

extern const Kernels PORTABLE_KERNELS;
#if defined(__x86_64__)
extern const Kernels AVX2_KERNELS;
extern const Kernels AVX512_KERNELS;
extern const Kernels AVX512_BF16_KERNELS;
extern const Kernels AMX_KERNELS;
bool amx_usable();
#endif

}  // namespace sparse_attn
