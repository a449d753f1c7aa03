// What a block does before its warps go their own ways. Include fragments.cuh (or the emulator's) before.
#pragma once

#include "attention_steps.cuh"

namespace sparse_attn {

constexpr int COPIES_AT_ONCE = 8;

// Where a head of a sequence lies, the ends of its real rows and keys, and the end of the rows that are stored.
struct Place {
  int sequence, first_token, head, rows_end, rows_stored, keys_end;
};

SPARSE_ATTN_DEVICE Place place_of(const AttentionCall& call, int batch, int head) {
  if (call.cu_seqlens) {
    const int first = call.cu_seqlens[batch];
    // Shared memory has room for the length that the caller promised.
    const int length = min(call.cu_seqlens[batch + 1] - first, call.key_len);
    return {0, first, head, length, length, length};
  }
  const int rows = call.query_lengths ? min(max(call.query_lengths[batch], 0), call.query_len) : call.query_len;
  const int keys = call.key_lengths ? min(max(call.key_lengths[batch], 0), call.key_len) : call.key_len;
  return {batch, 0, head, rows, call.query_len, keys};
}

SPARSE_ATTN_DEVICE char* row_of(const Rows& rows, int sequence, int head, int64_t token) {
  return rows.data + static_cast<int64_t>(sequence) * rows.batch + static_cast<int64_t>(head) * rows.head +
         token * rows.row;
}

// 16 queries and their list: `steps` of it can hold keys of the sequence, from `partial` on some of which are hidden,
// and from `masked` on not all rows keep all keys.
struct Group {
  uint32_t packed;
  int first_step;

  SPARSE_ATTN_DEVICE static uint32_t pack(int number, int steps, int partial, int masked) {
    return static_cast<uint32_t>(number | steps << 8 | partial << 16 | masked << 24);
  }
  SPARSE_ATTN_DEVICE int first_row() const {
    return static_cast<int>(packed & 255) * GROUP_ROWS;
  }
  SPARSE_ATTN_DEVICE int steps() const {
    return static_cast<int>(packed >> 8 & 255);
  }
  SPARSE_ATTN_DEVICE int partial() const {
    return static_cast<int>(packed >> 16 & 255);
  }
  SPARSE_ATTN_DEVICE int masked() const {
    return static_cast<int>(packed >> 24);
  }
};

// What a block does before its warps go their own ways: keys and values are on their way to shared memory, and its
// groups are written down.
template <Rounding ROUNDING, int ROW_BYTES>
class Preparation {
  static constexpr int CHUNKS = ROW_BYTES / 16;

  const AttentionCall& call;
  const Place place;
  const uint32_t shared;
  const uint8_t* key_padding;

 public:
  SPARSE_ATTN_DEVICE Preparation(const AttentionCall& call, int batch, int head)
      : call(call), place(place_of(call, batch, head)), shared(shared_memory()), key_padding(call.key_padding) {
    if (key_padding) {
      key_padding += static_cast<int64_t>(batch) * call.key_len;
    }
  }

  SPARSE_ATTN_DEVICE void run() const {
    const int thread = thread_number();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      copy_rows(i == 0 ? call.key : call.value, shared + i * call.memory.values);
      commit_copies();
    }
    const char* queries = row_of(call.query, place.sequence, place.head, place.first_token);
    for (int row = thread; row < place.rows_end; row += thread_count()) {
      prefetch(queries + row * call.query.row);
    }
    if constexpr (ROUNDING == Rounding::Table) {
      for (int pair = thread; pair < call.level_count / 2; pair += thread_count()) {
        store_shared(shared + call.memory.table + 4 * pair, call.levels[pair]);
      }
    }
    if (thread < 32) {
      list_groups(thread);
    }
  }

 private:
  // A thread always takes the same piece of a row. The compiler moves no copy: what several of them need is read before
  // the first of these. Keys that are padding may hold anything, and zeros take their place.
  SPARSE_ATTN_DEVICE void copy_rows(const Rows& rows, uint32_t to) const {
    const int chunk = thread_number() % CHUNKS, stride = thread_count() / CHUNKS;
    const char* from = row_of(rows, place.sequence, place.head, place.first_token) + 16 * chunk;
    const uint8_t* swizzles = call.lists.swizzles + place.head * call.lists.keys;
#pragma unroll 1
    for (int first = thread_number() / CHUNKS; first < place.keys_end; first += COPIES_AT_ONCE * stride) {
      int place_of_chunk[COPIES_AT_ONCE];
#pragma unroll
      for (int i = 0; i < COPIES_AT_ONCE; ++i) {
        const int row = min(first + i * stride, place.keys_end - 1);
        place_of_chunk[i] = (row * CHUNKS + (chunk ^ swizzles[row])) * 16;
      }
      bool padding[COPIES_AT_ONCE] = {};
      if (key_padding) {
#pragma unroll
        for (int i = 0; i < COPIES_AT_ONCE; ++i) {
          padding[i] = !key_padding[min(first + i * stride, place.keys_end - 1)];
        }
      }
#pragma unroll
      for (int i = 0; i < COPIES_AT_ONCE; ++i) {
        const int row = first + i * stride;
        if (row < place.keys_end) {
          copy_async(to + place_of_chunk[i], from + row * rows.row, padding[i]);
        }
      }
    }
  }

  // The block's groups, the longest list first. Each lane looks at one group of the head.
  SPARSE_ATTN_DEVICE void list_groups(int lane) const {
    const FragmentLists& lists = call.lists;
    const int group = lists.order[place.head * MAX_GROUPS + lane], first_row = group * GROUP_ROWS;
    const bool stored = group < lists.groups && first_row < place.rows_stored;
    const uint32_t live = ballot(stored);
    const int part = block_number() % call.parts, turn = count_bits(live & ((1u << lane) - 1));
    if (lane == 0) {
      const uint32_t facts = shared + call.memory.facts;
      store_shared(facts + 4 * GROUPS, (count_bits(live) - part + call.parts - 1) / call.parts);
      store_shared(facts + 4 * GROUPS_TAKEN, thread_count() / 32);
      store_shared(facts + 4 * SEQUENCE, place.sequence);
      store_shared(facts + 4 * FIRST_TOKEN, place.first_token);
      store_shared(facts + 4 * HEAD, place.head);
      store_shared(facts + 4 * ROWS_END, place.rows_end);
      store_shared(facts + 4 * ROWS_STORED, place.rows_stored);
      store_shared(facts + 4 * KEYS_END, place.keys_end);
    }
    if (!stored || turn % call.parts != part) {
      return;
    }
    const int list = place.head * lists.groups + group;
    const int32_t* counts = lists.counts + list * (lists.blocks + 1);
    const int last_key = call.causal ? first_row + GROUP_ROWS : MAX_LENGTH;
    const int first_hidden = key_padding ? 0 : call.causal ? first_row + 1 : MAX_LENGTH;
    const int end = min(place.keys_end, last_key), shown = min(place.keys_end, first_hidden);
    const int all_steps = (counts[lists.blocks] + STEP_KEYS - 1) / STEP_KEYS;
    int steps = 0;
    if (first_row < place.rows_end) {
      steps = (counts[min((end + STEP_KEYS - 1) / STEP_KEYS, lists.blocks)] + STEP_KEYS - 1) / STEP_KEYS;
    }
    const int partial = shown >= lists.keys ? all_steps : counts[shown / STEP_KEYS] / STEP_KEYS;
    // The last step of a full list has lanes without a key of their own.
    const int masked = lists.full ? max(min(partial, all_steps - 1), 0) : 0;
    const uint32_t entry = shared + call.memory.groups + 8 * (turn / call.parts);
    store_shared(entry, Group::pack(group, steps, partial, masked));
    store_shared(entry + 4, lists.first_steps[list]);
  }
};

}  // namespace sparse_attn
