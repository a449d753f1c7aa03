// Attention over a global mask for sequences whose keys and values fit into shared memory, which holds those of one
// head or more at a time (see attention_ring.cuh). A warp takes 16 queries at a time and walks their list, a key a
// lane: ldmatrix, which wants a row's address from each lane, gathers rows at no cost but that of bank conflicts.
// Include fragments.cuh (or the emulator's) before.
#pragma once

#include "attention_ring.cuh"

namespace sparse_attn {

constexpr int SEGMENT_STEPS = 2;  // long lists are taken 64 keys at a time

// A warp's own part of shared memory: 16 rows of queries on their way in, and then of output on its way out. Pieces of
// 16 bytes are permuted so that 8 of them that are written or read together lie in different banks.
template <int ROW_BYTES>
class WarpScratch {
  static constexpr unsigned CHUNKS = ROW_BYTES / 16;

  uint32_t start;
  unsigned lane;

  SPARSE_ATTN_DEVICE uint32_t address(unsigned row, unsigned chunk) const {
    return start + row * ROW_BYTES + 16 * (chunk ^ row * CHUNKS / 8 % CHUNKS);
  }

 public:
  static constexpr int TURNS = GROUP_ROWS * CHUNKS / 32;  // 512 bytes at a time

  SPARSE_ATTN_DEVICE WarpScratch(const AttentionCall& call, unsigned thread)
      : start(shared_memory() + call.memory.scratch + thread / 32 * (GROUP_ROWS * ROW_BYTES)), lane(thread % 32) {
  }

  // The piece that a lane copies in a turn: its row, its first byte in the row, and where it lies.
  SPARSE_ATTN_DEVICE int row(int turn) const {
    return lane / CHUNKS + 32 / CHUNKS * turn;
  }
  SPARSE_ATTN_DEVICE unsigned byte() const {
    return 16 * (lane % CHUNKS);
  }
  SPARSE_ATTN_DEVICE uint32_t piece(int turn) const {
    return (address(lane / CHUNKS, lane % CHUNKS) ^ (CHUNKS == 8 ? turn % 2 * 64 : 0)) + 512 * turn;
  }

  // What a lane points at: to load a left factor of the matrix unit; to store columns 32 * block + (0 to 31) of 8 rows.
  SPARSE_ATTN_DEVICE uint32_t left_factor(int part) const {
    return address(lane % 16, lane / 16) ^ (32 * part);
  }
  SPARSE_ATTN_DEVICE uint32_t matrix_row(int half, int block) const {
    return (address(lane % 8, lane / 8) ^ (64 * block)) + 8 * ROW_BYTES * half;
  }
};

// One warp of a block.
template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
class Warp {
  static constexpr int ROW_BYTES = 2 * HEAD_DIM;
  static constexpr int BLOCKS = HEAD_DIM / 32;  // of the output's columns, which are stored 32 at a time
  static constexpr bool ROUNDED = ROUNDING != Rounding::None;
  // Steps whose part of the list is sent for ahead. Where they are rounded, lists of up to so many have all their
  // scores in registers; longer ones cost more.
  static constexpr int STEPS_AHEAD = ROUNDING == Rounding::EightLevels ? 4 : SEGMENT_STEPS;
  using Scratch = WarpScratch<ROW_BYTES>;

  // A group with what is sent for ahead: its queries, and the start of its list.
  struct Task {
    bool exists;
    Group group;
    Query<HEAD_DIM> query;
    uint32_t words[STEPS_AHEAD];
  };

  const AttentionCall& call;
  const int lane;
  Ring<ROW_BYTES> ring;
  Seat seat;  // of the group that is computed

 public:
  SPARSE_ATTN_DEVICE explicit Warp(const AttentionCall& call) : call(call), lane(thread_number() % 32), ring(call) {
  }

  SPARSE_ATTN_DEVICE void run() {
    if constexpr (ROUNDING == Rounding::Table) {
      for (int pair = thread_number(); pair < call.level_count / 2; pair += thread_count()) {
        store_shared(shared_memory() + call.memory.table + 4 * pair, call.levels[pair]);
      }
    }
    ring.start();
    Task next;
    next.exists = false;
    bool arriving = false;  // whether the warp's item is not there yet
    // Each piece of work has one place in this loop. That keeps the code small, which a kernel that starts has to read.
    while (true) {
      const Task task = next;
      if (!task.exists && !arriving) {
        if (!ring.advance()) {
          return;
        }
        arriving = true;
      }
      const bool filling = arriving && ring.has_jobs();
      if (arriving && !filling) {
        ring.await_keys();
        arriving = false;
      }
      if (!filling) {
        seat = ring.seat;
        look_ahead(next);
      }
      if (filling || task.exists) {
        ring.help(filling);
      }
      commit_copies();
      RowState state;
      Output<HEAD_DIM> output;
      if (task.exists) {
        attend(task, state, output);
      }
      if (!filling) {
        collect(next);
      }
      if (task.exists) {
        store(task.group, state, output);
      }
      if (!filling && ring.seat.slot != seat.slot) {
        ring.leave(seat);
      }
    }
  }

 private:
  // Takes a group that no warp has taken yet, of the item or else of the next one, and sends for what it needs first.
  SPARSE_ATTN_DEVICE void look_ahead(Task& task) {
    int turn = ring.take_turn();
    if (turn < 0 && ring.advance_at_once()) {
      turn = ring.take_turn();
    }
    task.exists = turn >= 0;
    if (task.exists) {
      task.group = ring.group_of(turn);
      const Scratch scratch(call, computed_here(thread_number()));
      const int first_row = task.group.first_row(), rows_end = ring.fact(ring.seat, ROWS_END);
      char* queries = ring.template pointer<char>(ring.seat, QUERIES) + scratch.byte();
#pragma unroll
      for (int turn = 0; turn < Scratch::TURNS; ++turn) {
        const int row = first_row + scratch.row(turn);
        copy_async(scratch.piece(turn), row_of(queries, call.query, row), row >= rows_end);
      }
      read_words<STEPS_AHEAD>(ring.seat, task.group, 0, task.words);
    }
    commit_copies();
  }

  // Takes the queries that were sent for before the last group of copies was. The scratch is free then.
  SPARSE_ATTN_DEVICE void collect(Task& task) const {
    await_copies<1>();
    warp_barrier();
    if (task.exists) {
      const Scratch scratch(call, computed_here(thread_number()));
#pragma unroll
      for (int part = 0; part < HEAD_DIM / 16; ++part) {
        load_matrices(task.query[part], scratch.left_factor(part));
      }
    }
  }

  // The list from step `first` on, a key a lane: in the upper half of a word where its rows lie in shared memory.
  template <int STEPS>
  SPARSE_ATTN_DEVICE void read_words(Seat seat, const Group& group, int first, uint32_t (&word)[STEPS]) const {
    const uint32_t* list = call.lists.words + static_cast<int64_t>(group.first_step) * 32 + computed_here(lane);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      word[i] = first + i < group.steps() ? list[(first + i) * 32] : 0;
    }
#pragma unroll 1
    for (int step = max(first, group.partial()); step < min(first + STEPS, group.steps()); ++step) {
      const uint32_t shown = without_hidden(seat, group, list[step * 32]);
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        word[i] = first + i == step ? shown : word[i];
      }
    }
  }

  // A word without the bits of what lengths, padding and causality hide. Keys past the end are not in shared memory:
  // the first row, of which nothing is used then, takes their place.
  SPARSE_ATTN_DEVICE uint32_t without_hidden(Seat seat, const Group& group, uint32_t word) const {
    const int key = static_cast<int>((word >> 16) / ROW_BYTES);
    const bool exists = key < ring.fact(seat, KEYS_END);
    bool shown = exists;
    if (call.key_padding && exists) {
      shown = call.key_padding[static_cast<int64_t>(ring.fact(seat, SEQUENCE)) * call.key_len + key];
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

  SPARSE_ATTN_DEVICE void attend(const Task& task, RowState& state, Output<HEAD_DIM>& output) const {
    if constexpr (ROUNDED) {
      if (task.group.steps() <= STEPS_AHEAD) {
        return attend_held(task, state, output);
      }
    }
    attend_in_segments(task, state, output);
  }

  SPARSE_ATTN_DEVICE void attend_held(const Task& task, RowState& state, Output<HEAD_DIM>& output) const {
    const int steps = task.group.steps();
    Scores<STEPS_AHEAD> scores;
    Probabilities<STEPS_AHEAD> p;
    score<STEPS_AHEAD>(task, 0, task.words, scores);
    float correction[2];
    state.template raise<STEPS_AHEAD>(scores, call.scale_log2, correction);
    state.template add<ELEMENT, false, STEPS_AHEAD>(scores, steps, call.scale_log2, p);
    state.complete();
    Rounder<ROUNDING>(call, shared_memory(), state).template round<STEPS_AHEAD>(scores, p);
    ring.await_values(seat);
    clear<HEAD_DIM>(output);
    add<STEPS_AHEAD>(p, task.words, steps, output);
  }

  // Without rounding in one pass; with it the normaliser must be known first.
  SPARSE_ATTN_DEVICE void attend_in_segments(const Task& task, RowState& state, Output<HEAD_DIM>& output) const {
    const int steps = task.group.steps();
    Scores<SEGMENT_STEPS> scores;
    Probabilities<SEGMENT_STEPS> p;
    uint32_t segment[SEGMENT_STEPS], following[SEGMENT_STEPS];
#pragma unroll
    for (int i = 0; i < SEGMENT_STEPS; ++i) {
      following[i] = task.words[i];
    }
    clear<HEAD_DIM>(output);
    ring.await_values(seat);
#pragma unroll 1
    for (int first = 0; first < steps; first += SEGMENT_STEPS) {
      score_segment(task, first, segment, following, scores);
      float correction[2];
      if (state.template raise<SEGMENT_STEPS>(scores, call.scale_log2, correction) && !ROUNDED) {
        scale_output<HEAD_DIM>(output, correction);
      }
      state.template add<ELEMENT, !ROUNDED, SEGMENT_STEPS>(scores, steps - first, call.scale_log2, p);
      if constexpr (!ROUNDED) {
        add<SEGMENT_STEPS>(p, segment, steps - first, output);
      }
    }
    state.complete();
    if constexpr (ROUNDED) {
      const Rounder<ROUNDING> rounder(call, shared_memory(), state);
#pragma unroll 1
      for (int first = 0; first < steps; first += SEGMENT_STEPS) {
        score_segment(task, first, segment, following, scores);
        rounder.template round<SEGMENT_STEPS>(scores, p);
        add<SEGMENT_STEPS>(p, segment, steps - first, output);
      }
    }
  }

  // The scores of a segment whose words have been sent for; sends for those of the next one, after the last one for
  // those of the first.
  SPARSE_ATTN_DEVICE void score_segment(
      const Task& task,
      int first,
      uint32_t (&segment)[SEGMENT_STEPS],
      uint32_t (&following)[SEGMENT_STEPS],
      Scores<SEGMENT_STEPS>& scores) const {
#pragma unroll
    for (int i = 0; i < SEGMENT_STEPS; ++i) {
      segment[i] = following[i];
    }
    const int next_first = first + SEGMENT_STEPS;
    read_words<SEGMENT_STEPS>(seat, task.group, next_first < task.group.steps() ? next_first : 0, following);
    score<SEGMENT_STEPS>(task, first, segment, scores);
  }

  // Scores of STEPS steps from `first` on, -inf where not kept and past the end of the list.
  template <int STEPS, int WORDS>
  SPARSE_ATTN_DEVICE void score(
      const Task& task, int first, const uint32_t (&word)[WORDS], Scores<STEPS>& scores) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (first + step < task.group.steps()) {
        multiply_keys<ELEMENT, HEAD_DIM>(task.query, ring.keys(seat) + (word[step] >> 16), lane, scores[step]);
        if (first + step >= task.group.masked()) {
          prune(word[step], scores[step]);
        }
      } else {
        prune(0, scores[step]);
      }
    }
  }

  // Adds values of the first `steps` of STEPS steps.
  template <int STEPS, int WORDS>
  SPARSE_ATTN_DEVICE void add(
      const Probabilities<STEPS>& p, const uint32_t (&word)[WORDS], int steps, Output<HEAD_DIM>& output) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step < steps) {
        add_values<ELEMENT, HEAD_DIM>(p[step], ring.keys(seat) + call.memory.values + (word[step] >> 16), output);
      }
    }
  }

  SPARSE_ATTN_DEVICE void store(const Group& group, const RowState& state, Output<HEAD_DIM>& output) const {
    const unsigned lane = computed_here(this->lane);
    const int rows_end = ring.fact(seat, ROWS_END), rows_stored = ring.fact(seat, ROWS_STORED);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group.first_row() + static_cast<int>(lane / 4) + 8 * half;
      // Padding rows may have seen a full list: they yield zeros and -inf like any row without keys.
      const bool real = row < rows_end && state.sum[half] != 0.0f;
      // A sum that is NaN makes the row NaN also where it was rounded.
      factor[half] = !real ? 0.0f : ROUNDED ? 1.0f + 0.0f * state.sum[half] : inverse_of(state.sum[half]);
      if (call.lse && row < rows_stored && lane % 4 == 0) {
        ring.template pointer<float>(seat, LSES)[row] = real ? state.lse2(half) * LN_2 : -INFINITY;
      }
    }
    scale_output<HEAD_DIM>(output, factor);
    // Through shared memory: there lanes put what they have of a row, and take 16 bytes of one.
    const Scratch scratch(call, computed_here(thread_number()));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        uint32_t chunk[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&values)[4] = output[4 * block + i];
          chunk[i] = pack<ELEMENT>(values[2 * half], values[2 * half + 1]);
        }
        store_matrices(scratch.matrix_row(half, block), chunk);
      }
    }
    warp_barrier();
    char* outputs = ring.template pointer<char>(seat, OUTPUTS) + scratch.byte();
#pragma unroll
    for (int turn = 0; turn < Scratch::TURNS; ++turn) {
      const int row = group.first_row() + scratch.row(turn);
      uint32_t piece[4];
      load_shared_words(piece, scratch.piece(turn));
      if (row < rows_stored) {
        store_words(row_of(outputs, call.output, row), piece);
      }
    }
    warp_barrier();
  }
};

template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
SPARSE_ATTN_DEVICE void attend_in_block(const AttentionCall& call) {
  Warp<ELEMENT, HEAD_DIM, ROUNDING>(call).run();
}

}  // namespace sparse_attn
