// Attention over a global mask for sequences whose keys and values fit into shared memory. A block owns a head of a
// sequence (or a share of its queries) and holds all its keys and values; a warp takes 16 queries at a time and walks
// their list, a key a lane: ldmatrix, which wants a row's address from each lane, gathers rows at no cost but that of
// bank conflicts. Include fragments.cuh (or the emulator's) before.
#pragma once

#include "attention_steps.cuh"

namespace sparse_attn {

constexpr int HELD_STEPS = 4;     // lists up to 128 keys have all their scores in registers
constexpr int SEGMENT_STEPS = 2;  // longer ones are taken 64 keys at a time

struct Sequence {
  int64_t index, first_token;
  int rows_end, keys_end, rows_stored;
};

SPARSE_ATTN_DEVICE Sequence sequence_of(const AttentionCall& call, int batch) {
  if (call.cu_seqlens) {
    const int first = call.cu_seqlens[batch];
    // A length that does not fit shared memory is the caller's mistake; what comes out then is cut off, too.
    const int length = min(call.cu_seqlens[batch + 1] - first, call.key_len);
    return {0, first, length, length, length};
  }
  const int rows = call.query_lengths ? min(max(call.query_lengths[batch], 0), call.query_len) : call.query_len;
  const int keys = call.key_lengths ? min(max(call.key_lengths[batch], 0), call.key_len) : call.key_len;
  return {batch, 0, rows, keys, call.query_len};
}

SPARSE_ATTN_DEVICE char* head_of(const Rows& rows, const Sequence& sequence, int head) {
  return rows.data + sequence.index * rows.batch + head * rows.head + sequence.first_token * rows.row;
}

// 16 queries and their list. Not all keys of steps from `partial` on are visible to all rows, and bits of steps before
// `masked` need no look.
struct Group {
  int first_row, first_step, steps, partial, masked;
};

// One warp of a block.
template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
class Warp {
  static constexpr int ROW_BYTES = 2 * HEAD_DIM;
  static constexpr int CHUNKS = ROW_BYTES / 16;
  static constexpr int BLOCKS = HEAD_DIM / 32;  // of 4 chunks, a chunk a lane of four neighbours
  static constexpr bool ROUNDED = ROUNDING != Rounding::None;

  const AttentionCall& call;
  const Sequence sequence;
  const int head, lane, part;
  const uint32_t shared;
  const uint8_t* key_padding;
  // Of the group in the lane's place of the order.
  uint32_t summary, list_start, live;
  // What is on its way for the next group.
  Group next;
  Words queries[2][BLOCKS];
  uint32_t words[HELD_STEPS];
  bool values_arrived = false;

 public:
  SPARSE_ATTN_DEVICE Warp(const AttentionCall& call, int batch, int head, int part)
      : call(call),
        sequence(sequence_of(call, batch)),
        head(head),
        lane(thread_number() % 32),
        part(part),
        shared(shared_memory()),
        key_padding(call.key_padding ? call.key_padding + static_cast<int64_t>(batch) * call.key_len : nullptr) {
    read_lists();
  }

  SPARSE_ATTN_DEVICE void run() {
    start_copies();
    bool found = take(thread_number() / 32);
    await_copies<1>();
    block_barrier();
    while (found) {
      found = attend();
    }
    await_values();
  }

 private:
  // Keys and values on their way to shared memory, and what needs no copy.
  SPARSE_ATTN_DEVICE void start_copies() {
    copy_rows(head_of(call.key, sequence, head), call.key.row, shared);
    commit_copies();
    copy_rows(head_of(call.value, sequence, head), call.value.row, shared + call.memory.values);
    commit_copies();
    const int thread = thread_number();
    if (thread < ROW_BYTES / 4) {
      store_shared(shared + call.memory.zeros + 4 * thread, 0);
      store_shared(shared + call.memory.values + call.memory.zeros + 4 * thread, 0);
    }
    if constexpr (ROUNDING == Rounding::Table) {
      const auto* levels = reinterpret_cast<const uint32_t*>(call.levels);
      for (int pair = thread; pair < call.level_count / 2; pair += thread_count()) {
        store_shared(shared + call.memory.table + 4 * pair, levels[pair]);
      }
    }
    if (thread == 0) {
      store_shared(shared + call.memory.counter, thread_count() / 32);
    }
  }

  SPARSE_ATTN_DEVICE void copy_rows(const char* from, int64_t stride, uint32_t to) {
    const uint8_t* swizzles = call.lists.swizzles + head * call.lists.keys;
#pragma unroll 4
    for (int piece = thread_number(); piece < sequence.keys_end * CHUNKS; piece += thread_count()) {
      const int row = piece / CHUNKS, chunk = piece % CHUNKS;
      copy_async(to + row * ROW_BYTES + ((chunk ^ swizzles[row]) << 4), from + row * stride + 16 * chunk);
    }
  }

  // Each lane looks at the list of one group of the head, in the order in which they are to be taken.
  SPARSE_ATTN_DEVICE void read_lists() {
    const FragmentLists& lists = call.lists;
    const int group = lists.order[head * 32 + lane], first_row = group * GROUP_ROWS;
    const bool stored = group < lists.groups && first_row < sequence.rows_stored;
    live = ballot(stored);
    summary = 0;
    list_start = 0;
    if (stored) {
      const int list = head * lists.groups + group;
      const int32_t* counts = lists.counts + list * (lists.blocks + 1);
      int end = sequence.keys_end, shown = key_padding ? 0 : sequence.keys_end;
      if (call.causal) {
        end = min(end, first_row + GROUP_ROWS);
        shown = min(shown, first_row + 1);
      }
      const int all = counts[lists.blocks], all_steps = (all + STEP_KEYS - 1) / STEP_KEYS;
      int steps = 0;
      if (first_row < sequence.rows_end) {
        steps = (counts[min((end + STEP_KEYS - 1) / STEP_KEYS, lists.blocks)] + STEP_KEYS - 1) / STEP_KEYS;
      }
      const int partial = shown >= lists.keys ? all_steps : counts[shown / STEP_KEYS] / STEP_KEYS;
      // Only the last step of a full list has lanes without a key of their own.
      const int masked = lists.full ? min(partial, all_steps - 1) : 0;
      summary = group | steps << 8 | partial << 16 | max(masked, 0) << 24;
      list_start = lists.first_steps[list];
    }
  }

  // Finds the group in a place of the block's order and sends for its queries and the start of its list.
  SPARSE_ATTN_DEVICE bool take(int place) {
    const int wanted = place * call.parts + part;
    const bool lives = live >> lane & 1;
    const uint32_t owner = ballot(lives && count_bits(live & ((1u << lane) - 1)) == wanted);
    if (!owner) {
      return false;
    }
    const uint32_t found = from_lane(summary, lowest_bit(owner));
    next.first_row = static_cast<int>(found & 255) * GROUP_ROWS;
    next.first_step = static_cast<int>(from_lane(list_start, lowest_bit(owner)));
    next.steps = static_cast<int>(found >> 8 & 255);
    next.partial = static_cast<int>(found >> 16 & 255);
    next.masked = static_cast<int>(found >> 24);
#pragma unroll
    for (int step = 0; step < HELD_STEPS; ++step) {
      words[step] = step < next.steps ? word_at(next, step) : 0;
    }
    const char* from = head_of(call.query, sequence, head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = next.first_row + lane / 4 + 8 * half;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        queries[half][block] = Words{{0, 0, 0, 0}};
        if (row < sequence.rows_end) {
          queries[half][block] = load_words(from + row * call.query.row + 64 * block + 16 * (lane % 4));
        }
      }
    }
    return true;
  }

  SPARSE_ATTN_DEVICE bool take_next() {
    uint32_t place = 0;
    if (lane == 0) {
      place = add_shared(shared + call.memory.counter, 1);
    }
    return take(static_cast<int>(from_lane(place, 0)));
  }

  SPARSE_ATTN_DEVICE uint32_t word_at(const Group& group, int step) const {
    return call.lists.words[static_cast<int64_t>(group.first_step + step) * 32 + lane];
  }

  // Before the first look at the values, once in every warp.
  SPARSE_ATTN_DEVICE void await_values() {
    if (!values_arrived) {
      await_copies<0>();
      block_barrier();
      values_arrived = true;
    }
  }

  // One group, and what the next one needs sent for. Whether there is a next one.
  SPARSE_ATTN_DEVICE bool attend() {
    uint32_t query[HEAD_DIM / 16][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        transpose_neighbours(queries[half][block].word, lane);
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
          query[2 * block + chunk / 2][2 * (chunk % 2) + half] = queries[half][block].word[chunk];
        }
      }
    }
    const Group group = next;
    RowState state;
    float output[HEAD_DIM / 8][4] = {};
    bool more;
    if (group.steps <= HELD_STEPS) {
      float scores[HELD_STEPS][TILES][4];
      uint32_t offsets[HELD_STEPS];
      score<HELD_STEPS>(group, 0, group.steps, query, words, scores, offsets);
      more = take_next();
      attend_held(group, scores, offsets, state, output);
    } else {
      attend_in_segments(group, query, state, output);
      more = take_next();
    }
    store(group, state, output);
    return more;
  }

  SPARSE_ATTN_DEVICE void attend_held(
      const Group& group, const Scores<HELD_STEPS>& scores, const uint32_t (&offsets)[HELD_STEPS], RowState& state,
      float (&output)[HEAD_DIM / 8][4]) {
    Probabilities<HELD_STEPS> p;
    float correction[2];
    state.template raise<HELD_STEPS>(scores, group.steps, call.scale_log2, correction);
    exponentials<ELEMENT, !ROUNDED, HELD_STEPS>(scores, group.steps, call.scale_log2, state, p);
    state.complete();
    if constexpr (ROUNDED) {
      const float lse2[2] = {state.lse2(0), state.lse2(1)};
      Rounder<ROUNDING>(call, shared).template round<HELD_STEPS>(scores, group.steps, lse2, p);
    }
    await_values();
    add<HELD_STEPS>(group.steps, p, offsets, output);
  }

  // Without rounding in one pass; with it the normaliser must be known first.
  SPARSE_ATTN_DEVICE void attend_in_segments(
      const Group& group, const uint32_t (&query)[HEAD_DIM / 16][4], RowState& state,
      float (&output)[HEAD_DIM / 8][4]) {
    float scores[SEGMENT_STEPS][TILES][4];
    uint32_t offsets[SEGMENT_STEPS];
    Probabilities<SEGMENT_STEPS> p;
    await_values();
    for (int first = 0; first < group.steps; first += SEGMENT_STEPS) {
      const int steps = group.steps - first;
      score_segment(group, first, query, scores, offsets);
      float correction[2];
      state.template raise<SEGMENT_STEPS>(scores, steps, call.scale_log2, correction);
      exponentials<ELEMENT, !ROUNDED, SEGMENT_STEPS>(scores, steps, call.scale_log2, state, p);
      if constexpr (!ROUNDED) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
          for (int element = 0; element < 4; ++element) {
            output[chunk][element] *= correction[element / 2];
          }
        }
        add<SEGMENT_STEPS>(steps, p, offsets, output);
      }
    }
    state.complete();
    if constexpr (ROUNDED) {
      const Rounder<ROUNDING> rounder(call, shared);
      const float lse2[2] = {state.lse2(0), state.lse2(1)};
      for (int first = 0; first < group.steps; first += SEGMENT_STEPS) {
        const int steps = group.steps - first;
        score_segment(group, first, query, scores, offsets);
        rounder.template round<SEGMENT_STEPS>(scores, steps, lse2, p);
        add<SEGMENT_STEPS>(steps, p, offsets, output);
      }
    }
  }

  SPARSE_ATTN_DEVICE void score_segment(
      const Group& group, int first, const uint32_t (&query)[HEAD_DIM / 16][4], Scores<SEGMENT_STEPS>& scores,
      uint32_t (&offsets)[SEGMENT_STEPS]) {
    uint32_t segment[SEGMENT_STEPS];
#pragma unroll
    for (int step = 0; step < SEGMENT_STEPS; ++step) {
      segment[step] = first + step < group.steps ? word_at(group, first + step) : 0;
    }
    score<SEGMENT_STEPS>(group, first, group.steps - first, query, segment, scores, offsets);
  }

  // Scores of the first `steps` of STEPS steps, -inf where not kept, and where in a region the lane's rows lie.
  template <int STEPS>
  SPARSE_ATTN_DEVICE void score(
      const Group& group, int first, int steps, const uint32_t (&query)[HEAD_DIM / 16][4],
      const uint32_t (&word)[STEPS], Scores<STEPS>& scores, uint32_t (&offsets)[STEPS]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      offsets[step] = word[step] >> 16;
      uint32_t kept = word[step];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int element = 0; element < 4; ++element) {
          scores[step][tile][element] = 0.0f;
        }
      }
      if (step < steps) {
        if (first + step >= group.partial) {
          kept &= visible(group, offsets[step]);
        }
        multiply_keys<ELEMENT, HEAD_DIM>(query, shared + offsets[step], scores[step]);
        if (first + step >= group.masked) {
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int element = 0; element < 4; ++element) {
              scores[step][tile][element] =
                  kept >> (4 * tile + element) & 1 ? scores[step][tile][element] : -INFINITY;
            }
          }
        }
      }
    }
  }

  // The bits of a step's positions that lengths, padding and causality leave. A lane whose key nobody may see takes the
  // row of zeros instead of one that may hold anything.
  SPARSE_ATTN_DEVICE uint32_t visible(const Group& group, uint32_t& offset) const {
    const int key = static_cast<int>(offset / ROW_BYTES);
    uint32_t rows = key < sequence.keys_end ? 0xffffu : 0;
    if (rows && key_padding && !key_padding[key]) {
      rows = 0;
    }
    if (call.causal && key > group.first_row) {
      rows = key < group.first_row + GROUP_ROWS ? rows << (key - group.first_row) & 0xffffu : 0;
    }
    offset = rows ? offset : static_cast<uint32_t>(call.memory.zeros);
    uint32_t bits = 0;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const uint32_t seen = from_lane(rows, 8 * tile + 2 * (lane % 4) + side) >> (lane / 4);
        bits |= (seen & 1) << (4 * tile + side) | (seen >> 8 & 1) << (4 * tile + side + 2);
      }
    }
    return bits;
  }

  template <int STEPS>
  SPARSE_ATTN_DEVICE void add(
      int steps, const Probabilities<STEPS>& p, const uint32_t (&offsets)[STEPS], float (&output)[HEAD_DIM / 8][4]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step < steps) {
        add_values<ELEMENT, HEAD_DIM>(p[step], shared + call.memory.values + offsets[step], output);
      }
    }
  }

  SPARSE_ATTN_DEVICE void store(const Group& group, const RowState& state, const float (&output)[HEAD_DIM / 8][4]) {
    char* to = head_of(call.output, sequence, head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group.first_row + lane / 4 + 8 * half;
      const bool real = row < sequence.rows_end, stored = row < sequence.rows_stored;
      const float sum = state.sum[half];
      // Padding rows may have seen a full list: they yield zeros and -inf like any row without keys.
      const float factor = !real ? 0.0f : ROUNDED ? 1.0f : sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t chunk[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&values)[4] = output[4 * block + i];
          chunk[i] = pack<ELEMENT>(values[2 * half] * factor, values[2 * half + 1] * factor);
        }
        transpose_neighbours(chunk, lane);
        if (stored) {
          store_words(to + row * call.output.row + 64 * block + 16 * (lane % 4), chunk);
        }
      }
      if (call.lse && stored && lane % 4 == 0) {
        float* lse = call.lse + sequence.index * call.lse_batch + head * call.lse_head + sequence.first_token;
        lse[row] = real && sum > 0.0f ? state.lse2(half) * LN_2 : -INFINITY;
      }
    }
  }
};

// Blocks: sequence by sequence, head by head, part by part.
template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
SPARSE_ATTN_DEVICE void attend_in_block(const AttentionCall& call) {
  const int part = block_number() % call.parts, pair = block_number() / call.parts;
  Warp<ELEMENT, HEAD_DIM, ROUNDING>(call, pair / call.heads, pair % call.heads, part).run();
}

}  // namespace sparse_attn
