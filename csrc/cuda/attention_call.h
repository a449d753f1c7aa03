// One attention call as the CUDA kernel takes it. See sparse_attn.ops.AttentionCall for what the arguments mean and
// sparse_attn/backends/fragment_lists.py for the form of the layout.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparse_attn {

constexpr int GROUP_ROWS = 16;
constexpr int STEP_KEYS = 32;  // keys that a warp takes at a time, a key a lane; also the keys between two counts
constexpr int MAX_LENGTH = 512;
constexpr int MAX_GROUPS = MAX_LENGTH / GROUP_ROWS;
constexpr int MAX_LEVELS = 256;
constexpr int MAX_ORDERED_HEADS = 64;
constexpr int MAX_SORTED_SEQUENCES = 256;
constexpr int KNOWN_ROUNDS = 8;  // whose items warps can look up: more than slots

constexpr int64_t MAX_ROW_STRIDE = 1 << 22;  // so that 32 bits address the rows of a head

// A tensor's memory, strides in bytes. The elements of a row lie side by side. Packed tensors have no stride between
// sequences.
struct Rows {
  char* data;
  int64_t batch, head;
  uint32_t row;
};

// The layout's lists, in steps of 32 keys.
struct FragmentLists {
  const uint32_t* words;       // [steps, 32 lanes]
  const int32_t* first_steps;  // [heads * groups]
  const int32_t* counts;       // [heads * groups, blocks + 1], keys of a list below 0, 32, 64, ...
  const uint8_t* order;        // [heads, MAX_GROUPS], groups of a head, the longest list first
  const uint16_t* places;      // [heads, places_of_head], where a key's row begins, in the order of copying
  int32_t groups, blocks, keys, places_of_head;
  bool full;  // all rows of a group keep all keys of its list
};

// Shared memory holds a ring of slots. A slot has the keys and values of a head of a sequence, and elsewhere, beside
// each other, its groups (see Group in attention_ring.cuh), facts and barriers. Numbers are bytes.
struct SharedMemory {
  int32_t slots, slot, values;  // how many; the size of one; where its values begin
  int32_t scratch;              // one or more areas of a group's rows for each warp
  int32_t table;                // of levels
  int32_t infos;                // the slots' groups, facts and barriers, then the number of jobs taken
  int32_t rounds, sorted;       // see Schedule; how many sequences it sorts, or 0
  int32_t bytes;                // everything
};

// What all warps know of a slot: a word each. A register that does not hold one of them holds a score.
// Pointers to the first query, output and lse of the head have two words.
enum Fact {
  QUERIES,
  OUTPUTS = QUERIES + 2,
  LSES = OUTPUTS + 2,
  GROUPS = LSES + 2,
  GROUPS_TAKEN,
  SEQUENCE,
  HEAD,
  FIRST_TOKEN,
  ROWS_END,
  ROWS_STORED,
  KEYS_END,
  FACTS
};

// Passed when the keys and facts of a slot, or its values, have arrived; when all warps have left it.
enum Barrier { KEYS_ARRIVED, VALUES_ARRIVED, SLOT_FREE, BARRIERS };

constexpr int MAX_SLOTS = 4;
static_assert(MAX_SLOTS + 2 <= KNOWN_ROUNDS);
constexpr int FACTS_AT = 8 * MAX_GROUPS, BARRIERS_AT = FACTS_AT + 4 * FACTS, INFO_BYTES = BARRIERS_AT + 8 * BARRIERS;
static_assert(BARRIERS_AT % 8 == 0 && INFO_BYTES % 8 == 0);

// At least one slot; more, up to `wanted`, as far as `limit` allows.
inline SharedMemory shared_memory_of(
    int64_t head_dim,
    int64_t key_len,
    int64_t level_count,
    int64_t scratch_areas,
    int64_t sorted,
    int64_t limit,
    int64_t wanted) {
  // Both regions start at the first bank.
  const int64_t region = (key_len + 1) / 2 * 2 * 2 * head_dim, table_bytes = level_count > 8 ? 2 * MAX_LEVELS : 0;
  const int64_t scratch_bytes = scratch_areas * GROUP_ROWS * 2 * head_dim;
  const int64_t rounds_bytes = 4 * (KNOWN_ROUNDS + 2 * sorted);
  const int64_t others = scratch_bytes + table_bytes + 8 + rounds_bytes;  // 8: the number of jobs taken
  const int64_t fitting = (limit - others) / (2 * region + INFO_BYTES);
  const int64_t slots = std::max<int64_t>(1, std::min({wanted, fitting, int64_t{MAX_SLOTS}}));
  SharedMemory memory{};
  memory.slots = static_cast<int32_t>(slots);
  memory.slot = static_cast<int32_t>(2 * region);
  memory.values = static_cast<int32_t>(region);
  memory.scratch = memory.slots * memory.slot;
  memory.table = memory.scratch + static_cast<int32_t>(scratch_bytes);
  memory.infos = memory.table + static_cast<int32_t>(table_bytes);
  memory.rounds = memory.infos + memory.slots * INFO_BYTES + 8;
  memory.sorted = static_cast<int32_t>(sorted);
  memory.bytes = memory.rounds + static_cast<int32_t>(rounds_bytes);
  return memory;
}

struct AttentionCall {
  Rows query, key, value, output;
  FragmentLists lists;
  int32_t batch, heads, query_len, key_len;  // lengths: the longest of a packed batch
  const int32_t* query_lengths;              // these four may be null
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
  int32_t parts;     // items that share the groups of a head of a sequence
  int32_t items;     // parts of heads of sequences; a block takes one after the other
  uint32_t* ticket;  // the counter that blocks take them from, 0 before and after a call; may be null
  SharedMemory memory;
  uint8_t heaviest[MAX_ORDERED_HEADS];   // heads, those with most work first; the others follow by number
  uint32_t levels[MAX_LEVELS / 2];       // pairs of elements
  uint32_t low_bytes[2], high_bytes[2];  // of the first eight levels
};

}  // namespace sparse_attn
