// One attention call as the CUDA kernel takes it. See sparse_attn.ops.AttentionCall for what the arguments mean and
// sparse_attn/backends/fragment_lists.py for the form of the layout.
#pragma once

#include <cstdint>

namespace sparse_attn {

constexpr int GROUP_ROWS = 16;
constexpr int STEP_KEYS = 32;  // keys that a warp takes at a time, a key a lane; also the keys between two counts
constexpr int MAX_LENGTH = 512;
constexpr int MAX_GROUPS = MAX_LENGTH / GROUP_ROWS;
constexpr int MAX_THREADS = 384;  // leaves 168 registers for each
constexpr int MAX_LEVELS = 256;

// A tensor's memory, strides in bytes. The elements of a row lie side by side. Packed tensors have no stride between
// sequences.
struct Rows {
  char* data;
  int64_t batch, head, row;
};

// The layout's lists, in steps of 32 keys.
struct FragmentLists {
  const uint32_t* words;       // [steps, 32 lanes]
  const int32_t* first_steps;  // [heads * groups]
  const int32_t* counts;       // [heads * groups, blocks + 1], keys of a list below 32, 64, ...
  const uint8_t* order;        // [heads, MAX_GROUPS], groups of a head, the longest list first
  const uint8_t* swizzles;     // [heads, keys]
  int32_t groups, blocks, keys;
  bool full;  // all rows of a group keep all keys of its list
};

// Where things lie in a block's shared memory, in bytes: keys, values, a table of levels, the block's groups (see Group
// in attention_kernel.cuh) and its facts.
struct SharedMemory {
  int32_t values, table, groups, facts, bytes;
};

// What all warps of a block know: a word each. A register that does not hold one of them holds a score.
enum Fact { GROUPS, GROUPS_TAKEN, SEQUENCE, FIRST_TOKEN, HEAD, ROWS_END, ROWS_STORED, KEYS_END, FACTS };

inline SharedMemory shared_memory_of(int64_t head_dim, int64_t key_len, int64_t level_count) {
  // Both regions start at the first bank.
  const int32_t region = static_cast<int32_t>((key_len + 1) / 2 * 2 * 2 * head_dim);
  const int32_t groups = 2 * region + (level_count > 8 ? 2 * MAX_LEVELS : 0), facts = groups + 8 * MAX_GROUPS;
  return {region, 2 * region, groups, facts, facts + 4 * FACTS};
}

struct AttentionCall {
  Rows query, key, value, output;
  FragmentLists lists;
  int32_t heads, query_len, key_len;  // lengths: the longest of a packed batch
  const int32_t* query_lengths;       // these four may be null
  const int32_t* key_lengths;
  const uint8_t* key_padding;
  const int32_t* cu_seqlens;
  bool causal;
  float scale_log2;         // positive
  int32_t level_count;      // 0: no rounding
  float level_rate;         // 1 / (level_count * width of a bin in log2(p))
  float below_level_count;  // the largest float32 below level_count
  float* lse;               // may be null
  int64_t lse_batch, lse_head;
  int32_t parts;  // blocks that share the groups of a head
  SharedMemory memory;
  uint32_t levels[MAX_LEVELS / 2];  // pairs of elements
};

}  // namespace sparse_attn
