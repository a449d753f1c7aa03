// Attention over a global mask for sequences whose keys and values fit into shared memory, which holds those of one
// head or more at a time (see attention_ring.cuh). A warp takes 16 queries at a time and walks their list, a key a
// lane: ldmatrix, which wants a row's address from each lane, gathers rows at no cost but that of bank conflicts.
// Include fragments.cuh (or the emulator's) before.
#pragma once

#include "attention_groups.cuh"
#include "attention_scratch.cuh"

namespace sparse_attn {

constexpr int SEGMENT_STEPS = 2;      // long lists are taken 64 keys at a time
constexpr int FORWARD_THREADS = 384;  // leaves 168 registers for each

// One warp of a block.
template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
class Warp {
  static constexpr int ROW_BYTES = 2 * HEAD_DIM;
  static constexpr bool ROUNDED = ROUNDING != Rounding::None;
  // Steps whose part of the list is sent for ahead. Where they are rounded, lists of up to so many have all their
  // scores in registers; longer ones cost more.
  static constexpr int STEPS_AHEAD = ROUNDING == Rounding::EightLevels ? 4 : SEGMENT_STEPS;
  using Scratch = WarpScratch<ROW_BYTES>;

  const AttentionCall& call;
  const int lane;

 public:
  // A group with what is sent for ahead: its queries, and the start of its list.
  struct Task {
    Group group;
    Query<HEAD_DIM> query;
    uint32_t words[STEPS_AHEAD];
  };
  struct Result {
    RowState state;
    Output<HEAD_DIM> output;
  };

  Ring<ROW_BYTES> ring;
  Seat seat;

  SPARSE_ATTN_DEVICE explicit Warp(const AttentionCall& call) : call(call), lane(thread_number() % 32), ring(call) {
  }

  SPARSE_ATTN_DEVICE void run() {
    if constexpr (ROUNDING == Rounding::Table) {
      for (int pair = thread_number(); pair < call.level_count / 2; pair += thread_count()) {
        store_shared(shared_memory() + call.memory.table + 4 * pair, call.levels[pair]);
      }
    }
    take_groups(*this);
  }

  SPARSE_ATTN_DEVICE void send(Task& task) const {
    Scratch(call, computed_here(thread_number()))
        .send_for(
            ring.template pointer<char>(ring.seat, QUERIES),
            call.query,
            task.group.first_row(),
            ring.fact(ring.seat, ROWS_END));
    read_words(call, task.group, 0, task.words);
  }

  SPARSE_ATTN_DEVICE void receive(Task& task) const {
    Scratch(call, computed_here(thread_number())).take(task.query);
  }

  SPARSE_ATTN_DEVICE void compute(const Task& task, Result& result) const {
    if constexpr (ROUNDED) {
      if (task.group.steps() <= STEPS_AHEAD) {
        return attend_held(task, result.state, result.output);
      }
    }
    attend_in_segments(task, result.state, result.output);
  }

  SPARSE_ATTN_DEVICE void store(const Group& group, Result& result) const {
    const RowState& state = result.state;
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
    scale_output<HEAD_DIM>(result.output, factor);
    Scratch(call, computed_here(thread_number()))
        .template write<ELEMENT, HEAD_DIM>(
            result.output, ring.template pointer<char>(seat, OUTPUTS), call.output, group.first_row(), rows_stored);
  }

 private:
  SPARSE_ATTN_DEVICE void attend_held(const Task& task, RowState& state, Output<HEAD_DIM>& output) const {
    const int steps = task.group.steps();
    Scores<STEPS_AHEAD> scores;
    Probabilities<STEPS_AHEAD> p;
    uint32_t words[STEPS_AHEAD];
#pragma unroll
    for (int i = 0; i < STEPS_AHEAD; ++i) {
      words[i] = task.words[i];
    }
    hide(call, ring, seat, task.group, 0, words);
    score<STEPS_AHEAD>(task, 0, words, scores);
    float correction[2];
    state.template raise<STEPS_AHEAD>(scores, call.scale_log2, correction);
    state.template add<ELEMENT, false, STEPS_AHEAD>(scores, steps, call.scale_log2, p);
    state.complete();
    Rounder<ROUNDING>(call, shared_memory(), state).template round<STEPS_AHEAD>(scores, p);
    ring.await_values(seat);
    clear<HEAD_DIM>(output);
    add<STEPS_AHEAD>(p, words, steps, output);
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
    read_words(call, task.group, next_first < task.group.steps() ? next_first : 0, following);
    hide(call, ring, seat, task.group, first, segment);
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
};

template <Element ELEMENT, int HEAD_DIM, Rounding ROUNDING>
struct Forward {
  using Call = AttentionCall;
  static constexpr int MOST_THREADS = FORWARD_THREADS;

  static SPARSE_ATTN_DEVICE void run(const Call& call) {
    Warp<ELEMENT, HEAD_DIM, ROUNDING>(call).run();
  }
};

}  // namespace sparse_attn
