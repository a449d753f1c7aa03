// Attention over a global mask for sequences whose keys and values fit into shared memory. A block owns a head of a
// sequence (or a share of its queries) and holds all its keys and values; a warp takes 16 queries at a time and walks
// their list, a key a lane: ldmatrix, which wants a row's address from each lane, gathers rows at no cost but that of
// bank conflicts. Include fragments.cuh (or the emulator's) before.
#pragma once

#include "attention_preparation.cuh"

namespace sparse_attn {

constexpr int HELD_STEPS = 4;     // lists up to 128 keys have all their scores in registers
constexpr int SEGMENT_STEPS = 2;  // longer ones are taken 64 keys at a time

// One warp of a block.
template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
class Warp {
  static constexpr int ROW_BYTES = 2 * HEAD_DIM;
  static constexpr int BLOCKS = ROW_BYTES / 64;  // four neighbours have 16 bytes each
  static constexpr bool ROUNDED = ROUNDING != Rounding::None;

  const AttentionCall& call;
  const uint32_t shared;
  const int lane;
  bool values_arrived = false;
  // The group to come, with what is sent for ahead: its queries (see `attend`) and the start of its list.
  Group next;
  Query<HEAD_DIM> query;
  uint32_t words[HELD_STEPS];

 public:
  SPARSE_ATTN_DEVICE explicit Warp(const AttentionCall& call)
      : call(call), shared(shared_memory()), lane(thread_number() % 32) {
  }

  SPARSE_ATTN_DEVICE void run() {
    Group group{0, 0};
    RowState state;
    Output<HEAD_DIM> output;
    bool first = true;
    for (int turn = uniform(thread_number() / 32);; turn = next_turn()) {
      const bool found = take(turn);
      if (first) {
        await_copies<1>();
        block_barrier();
        first = false;
      } else {
        store(group, state, output);
      }
      if (!found) {
        break;
      }
      group = next;
      state = RowState();
      attend(group, state, output);
    }
    await_values();
  }

 private:
  SPARSE_ATTN_DEVICE int fact(Fact name) const {
    return static_cast<int>(load_shared(shared + call.memory.facts + 4 * name));
  }

  // Looks up a group of the block and sends for what it needs first.
  SPARSE_ATTN_DEVICE bool take(int turn) {
    if (turn >= uniform(fact(GROUPS))) {
      return false;
    }
    const uint32_t entry = shared + call.memory.groups + 8 * turn;
    next.packed = uniform(load_shared(entry));
    next.first_step = uniform(load_shared(entry + 4));
    const int lane = computed_here(this->lane), row = next.first_row() + lane / 4, rows_end = fact(ROWS_END);
    const char* from = row_of(call.query, fact(SEQUENCE), fact(HEAD), fact(FIRST_TOKEN) + row) + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* half = from + i / 2 * 16 + i % 2 * 8 * call.query.row;
      const bool exists = row + i % 2 * 8 < rows_end;
#pragma unroll
      for (int part = 0; part < HEAD_DIM / 16; ++part) {
        query[part][i] = load_word(half + 32 * part, exists);
      }
    }
    read_words<HELD_STEPS>(next, 0, words);
    return true;
  }

  SPARSE_ATTN_DEVICE int next_turn() const {
    uint32_t turn = 0;
    if (lane == 0) {
      turn = add_shared(shared + call.memory.facts + 4 * GROUPS_TAKEN, 1);
    }
    return uniform(turn);
  }

  // The list from step `first` on, a key a lane: in the upper half of a word where its rows lie in shared memory.
  template <int STEPS>
  SPARSE_ATTN_DEVICE void read_words(const Group& group, int first, uint32_t (&word)[STEPS]) const {
    const uint32_t* list = call.lists.words + static_cast<int64_t>(group.first_step) * 32 + computed_here(lane);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      word[i] = first + i < group.steps() ? list[(first + i) * 32] : 0;
    }
#pragma unroll 1
    for (int step = max(first, group.partial()); step < min(first + STEPS, group.steps()); ++step) {
      const uint32_t shown = without_hidden(group, list[step * 32]);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        word[i] = first + i == step ? shown : word[i];
      }
    }
  }

  // A word without the bits of what lengths, padding and causality hide. Keys past the end are not in shared memory:
  // the first row, of which nothing is used then, takes their place.
  SPARSE_ATTN_DEVICE uint32_t without_hidden(const Group& group, uint32_t word) const {
    const int key = static_cast<int>((word >> 16) / ROW_BYTES);
    const bool exists = key < fact(KEYS_END);
    bool shown = exists;
    if (call.key_padding && exists) {
      shown = call.key_padding[static_cast<int64_t>(fact(SEQUENCE)) * call.key_len + key];
    }
    uint32_t bits = 0;
    if (call.causal) {
      uint32_t rows = shown ? 0xffffu : 0;
      if (key > group.first_row()) {
        rows = key < group.first_row() + GROUP_ROWS ? rows << (key - group.first_row()) & 0xffffu : 0;
      }
#pragma unroll
      for (int i = 0; i < STEP_KEYS / 4; ++i) {
        const int tile = i / 2, side = i % 2;
        const uint32_t seen = from_lane(rows, 8 * tile + 2 * (lane % 4) + side) >> (lane / 4);
        bits |= (seen & 1) << (4 * tile + side) | (seen >> 8 & 1) << (4 * tile + side + 2);
      }
    } else {
      bits = ballot(shown) >> (2 * (lane % 4)) & 0x03030303u;  // two keys of a tile in each byte
      bits |= bits << 2;                                       // and for both rows
      bits = (bits | bits >> 4) & 0x00ff00ffu;
      bits = bits | bits >> 8;
    }
    return (exists ? word & 0xffff0000u : 0) | (word & bits & 0xffffu);
  }

  // Before the first look at the values, once in every warp.
  SPARSE_ATTN_DEVICE void await_values() {
    if (!values_arrived) {
      await_copies<0>();
      block_barrier();
      values_arrived = true;
    }
  }

  SPARSE_ATTN_DEVICE void attend(const Group& group, RowState& state, Output<HEAD_DIM>& output) {
    clear<HEAD_DIM>(output);
    // A kernel of its own for every length up to HELD_STEPS.
    switch (group.steps()) {
      case 0:
        break;
      case 1:
        return attend_held<1>(group, state, output);
      case 2:
        return attend_held<2>(group, state, output);
      case 3:
        return attend_held<3>(group, state, output);
      case 4:
        return attend_held<4>(group, state, output);
      default:
        attend_in_segments(group, state, output);
    }
  }

  template <int STEPS>
  SPARSE_ATTN_DEVICE void attend_held(const Group& group, RowState& state, Output<HEAD_DIM>& output) {
    float scores[STEPS][TILES][4];
    Probabilities<STEPS> p;
    float correction[2];
    score<STEPS>(group, 0, words, scores);
    state.raise<STEPS>(scores, call.scale_log2, correction);
    state.add<ELEMENT, !ROUNDED, STEPS>(scores, call.scale_log2, p);
    state.complete();
    if constexpr (ROUNDED) {
      Rounder<ROUNDING>(call, shared, state).template round<STEPS>(scores, p);
    }
    await_values();
    add<STEPS>(p, words, STEPS, output);
  }

  // Without rounding in one pass; with it the normaliser must be known first.
  SPARSE_ATTN_DEVICE void attend_in_segments(const Group& group, RowState& state, Output<HEAD_DIM>& output) {
    float scores[SEGMENT_STEPS][TILES][4];
    Probabilities<SEGMENT_STEPS> p;
    uint32_t segment[SEGMENT_STEPS], following[SEGMENT_STEPS];
#pragma unroll
    for (int i = 0; i < SEGMENT_STEPS; ++i) {
      following[i] = words[i];
    }
    await_values();
#pragma unroll 1
    for (int first = 0; first < group.steps(); first += SEGMENT_STEPS) {
      score_segment(group, first, segment, following, scores);
      float correction[2];
      state.template raise<SEGMENT_STEPS>(scores, call.scale_log2, correction);
      state.template add<ELEMENT, !ROUNDED, SEGMENT_STEPS>(scores, call.scale_log2, p);
      if constexpr (!ROUNDED) {
        scale_output<HEAD_DIM>(output, correction);
        add<SEGMENT_STEPS>(p, segment, group.steps() - first, output);
      }
    }
    state.complete();
    if constexpr (ROUNDED) {
      const Rounder<ROUNDING> rounder(call, shared, state);
#pragma unroll 1
      for (int first = 0; first < group.steps(); first += SEGMENT_STEPS) {
        score_segment(group, first, segment, following, scores);
        rounder.template round<SEGMENT_STEPS>(scores, p);
        add<SEGMENT_STEPS>(p, segment, group.steps() - first, output);
      }
    }
  }

  // The scores of a segment whose words have been sent for; sends for those of the next one, after the last one for
  // those of the first.
  SPARSE_ATTN_DEVICE void score_segment(
      const Group& group,
      int first,
      uint32_t (&segment)[SEGMENT_STEPS],
      uint32_t (&following)[SEGMENT_STEPS],
      Scores<SEGMENT_STEPS>& scores) const {
#pragma unroll
    for (int i = 0; i < SEGMENT_STEPS; ++i) {
      segment[i] = following[i];
    }
    const int next_first = first + SEGMENT_STEPS;
    read_words<SEGMENT_STEPS>(group, next_first < group.steps() ? next_first : 0, following);
    score<SEGMENT_STEPS>(group, first, segment, scores);
  }

  // Scores of STEPS steps from `first` on, -inf where not kept and past the end of the list.
  template <int STEPS, int WORDS>
  SPARSE_ATTN_DEVICE void score(
      const Group& group, int first, const uint32_t (&word)[WORDS], float (&scores)[STEPS][TILES][4]) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      multiply_keys<ELEMENT, HEAD_DIM>(query, shared + (word[step] >> 16), lane, scores[step]);
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (first + step >= group.masked()) {
        prune(word[step], scores[step]);
      }
    }
  }

  // Adds values of the first `steps` of STEPS steps, at least one.
  template <int STEPS, int WORDS>
  SPARSE_ATTN_DEVICE void add(
      const Probabilities<STEPS>& p, const uint32_t (&word)[WORDS], int steps, Output<HEAD_DIM>& output) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step == 0 || step < steps) {
        add_values<ELEMENT, HEAD_DIM>(p[step], shared + call.memory.values + (word[step] >> 16), output);
      }
    }
  }

  SPARSE_ATTN_DEVICE void store(const Group& group, const RowState& state, Output<HEAD_DIM>& output) const {
    const int lane = computed_here(this->lane), rows_end = fact(ROWS_END), rows_stored = fact(ROWS_STORED);
    const int sequence = fact(SEQUENCE), head = fact(HEAD), first_token = fact(FIRST_TOKEN);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group.first_row() + lane / 4 + 8 * half;
      // Padding rows may have seen a full list: they yield zeros and -inf like any row without keys.
      const bool real = row < rows_end && state.sum[half] != 0.0f;
      // A sum that is NaN makes the row NaN also where it was rounded.
      factor[half] = !real ? 0.0f : ROUNDED ? 1.0f + 0.0f * state.sum[half] : inverse_of(state.sum[half]);
      if (call.lse && row < rows_stored && lane % 4 == 0) {
        float* lse = call.lse + sequence * call.lse_batch + head * call.lse_head + first_token;
        lse[row] = real ? state.lse2(half) * LN_2 : -INFINITY;
      }
    }
    scale_output<HEAD_DIM>(output, factor);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group.first_row() + lane / 4 + 8 * half;
      char* to = row_of(call.output, sequence, head, first_token + row) + lane % 4 * 16;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t chunk[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&values)[4] = output[4 * block + i];
          chunk[i] = pack<ELEMENT>(values[2 * half], values[2 * half + 1]);
        }
        transpose_neighbours(chunk, lane);
        if (row < rows_stored) {
          store_words(to + 64 * block, chunk);
        }
      }
    }
  }
};

// Blocks: sequence by sequence, head by head, part by part.
template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
SPARSE_ATTN_DEVICE void attend_in_block(const AttentionCall& call) {
  const int pair = block_number() / call.parts;
  Preparation<ROUNDING, 2 * HEAD_DIM>(call, pair / call.heads, pair % call.heads).run();
  block_barrier();
  Warp<ELEMENT, HEAD_DIM, ROUNDING>(call).run();
}

}  // namespace sparse_attn
