// The backward pass of attention over a global mask, for heads that fit into shared memory: two kernels that are cut as
// the forward one is. The first one walks the lists of queries and yields their gradients; the second one walks those
// of the transposed mask, with keys and queries in each other's places.
//
//   p = exp(s - lse), ds = p * (dp - delta), dp = do v^T, delta = rowsum(o * do)
//   dq = ds k * scale, dk = ds^T q * scale, dv = p^T do
//
// Every sum is one warp's, in a fixed order. Include fragments.cuh (or the emulator's) before.
#pragma once

#include "attention_groups.cuh"
#include "attention_scratch.cuh"

namespace sparse_attn {

constexpr int GRADIENT_AREAS = 2;      // of a warp's scratch: rows of two tensors come in, or two results leave
constexpr int GRADIENT_THREADS = 256;  // leaves 255 registers for each

// A call of either kernel. What `AttentionCall` calls the query are the rows that a group owns, key and value those
// that lists gather, output the first result. `lse` belongs to the queries, wherever they are.
struct GradientCall : AttentionCall {
  Rows second;                   // owned rows of another tensor: the output's gradient, or the value
  Rows attended;                 // queries: the forward pass's output
  Rows second_result;            // keys: the gradient of the value
  const uint8_t* owned_padding;  // [batch, rows], which keys are real; may be null
  float* statistics;  // pairs of lse in units of log2 and delta for each query, which the first kernel hands over
  float scale;
};

// What one warp does in both kernels.
template <int HEAD_DIM>
class GradientWarp {
 protected:
  static constexpr int ROW_BYTES = 2 * HEAD_DIM;
  using Scratch = WarpScratch<ROW_BYTES>;

  const GradientCall& call;
  const int lane;

  SPARSE_ATTN_DEVICE explicit GradientWarp(const GradientCall& call)
      : call(call), lane(thread_number() % 32), ring(call) {
  }

  SPARSE_ATTN_DEVICE Scratch scratch(int area) const {
    return {call, static_cast<unsigned>(computed_here(thread_number())), area};
  }

  SPARSE_ATTN_DEVICE Place place_of(Seat seat) const {
    Place place{};
    place.sequence = ring.fact(seat, SEQUENCE);
    place.head = ring.fact(seat, HEAD);
    place.first_token = ring.fact(seat, FIRST_TOKEN);
    return place;
  }

  // Sends for the rows that a group owns of both tensors.
  SPARSE_ATTN_DEVICE void send_for_rows(const Group& group) const {
    const int rows_end = ring.fact(ring.seat, ROWS_END);
    char* first = ring.template pointer<char>(ring.seat, QUERIES);
    scratch(0).send_for(first, call.query, group.first_row(), rows_end);
    scratch(1).send_for(first_row_of(call.second, place_of(ring.seat)), call.second, group.first_row(), rows_end);
  }

  // The row of the group that half `half` of a lane's accumulators belongs to.
  SPARSE_ATTN_DEVICE int row_of_lane(const Group& group, int half) const {
    return group.first_row() + lane / 4 + 8 * half;
  }

  SPARSE_ATTN_DEVICE bool is_real(int row) const {
    const int64_t sequence = ring.fact(seat, SEQUENCE);
    return row < ring.fact(seat, ROWS_END) &&
           (!call.owned_padding || call.owned_padding[sequence * call.query_len + row]);
  }

  // Results of rows that are not real become zeros, whatever these hold; the others are scaled.
  SPARSE_ATTN_DEVICE void finish(const Group& group, float scale, Output<HEAD_DIM>& result) const {
    const bool real[2] = {is_real(row_of_lane(group, 0)), is_real(row_of_lane(group, 1))};
#pragma unroll
    for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        result[chunk][element] = real[element / 2] ? result[chunk][element] * scale : 0.0f;
      }
    }
  }

 public:
  Ring<ROW_BYTES> ring;
  Seat seat;
};

// The gradients of 16 queries, and what the other kernel wants to know of them.
template <Element ELEMENT, int HEAD_DIM>
class QueryGradientWarp : public GradientWarp<HEAD_DIM> {
  using Base = GradientWarp<HEAD_DIM>;
  using Scratch = typename Base::Scratch;
  using Base::call, Base::lane;
  static constexpr int SEGMENT = 2;  // steps at a time

 public:
  using Base::ring, Base::seat;

  struct Task {
    Group group;
    Query<HEAD_DIM> query, grad_output;
    uint32_t output[Scratch::TURNS][4];  // the lane's pieces of the forward pass's output
    float lse[2];                        // of a lane's rows, at first as they come
    float delta[2];
    uint32_t words[SEGMENT];
  };
  struct Result {
    Output<HEAD_DIM> grad_query;
  };

  SPARSE_ATTN_DEVICE explicit QueryGradientWarp(const GradientCall& call) : Base(call) {
  }

  SPARSE_ATTN_DEVICE void send(Task& task) const {
    this->send_for_rows(task.group);
    const Scratch scratch = this->scratch(0);
    const Place place = this->place_of(ring.seat);
    const int rows_end = ring.fact(ring.seat, ROWS_END);
    char* outputs = first_row_of(call.attended, place) + scratch.byte();
#pragma unroll
    for (int turn = 0; turn < Scratch::TURNS; ++turn) {
      const int row = task.group.first_row() + scratch.row(turn);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        task.output[turn][i] = 0;
      }
      if (row < rows_end) {
        load_words(task.output[turn], row_of(outputs, call.attended, row));
      }
    }
    const float* lses = call.lse + first_lse(call, place);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = this->row_of_lane(task.group, half);
      task.lse[half] = row < rows_end ? lses[row] : INFINITY;  // no probabilities where there is no row
    }
    read_words(call, task.group, 0, task.words);
  }

  SPARSE_ATTN_DEVICE void receive(Task& task) const {
    this->scratch(0).take(task.query);
    this->scratch(1).take(task.grad_output);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      task.lse[half] = task.lse[half] == -INFINITY ? 0.0f : task.lse[half] * LOG2_E;
    }
    // Eight lanes, or four, have a row's pieces; each turn yields the rows of all lanes.
    const Scratch scratch = this->scratch(1);
    float sums[Scratch::TURNS];
#pragma unroll
    for (int turn = 0; turn < Scratch::TURNS; ++turn) {
      uint32_t words[4];
      load_shared_words(words, scratch.piece(turn));
      sums[turn] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float output[2], gradient[2];
        unpack<ELEMENT>(task.output[turn][i], output);
        unpack<ELEMENT>(words[i], gradient);
        sums[turn] += output[0] * gradient[0] + output[1] * gradient[1];
      }
#pragma unroll
      for (int distance = 1; distance < HEAD_DIM / 8; distance *= 2) {
        sums[turn] += from_neighbour(sums[turn], distance);
      }
    }
    constexpr int LANES_OF_A_ROW = HEAD_DIM / 8, ROWS_OF_A_TURN = 32 / LANES_OF_A_ROW;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      task.delta[half] = 0.0f;
#pragma unroll
      for (int turn = 0; turn < Scratch::TURNS; ++turn) {
        const float sum = from_lane(sums[turn], row % ROWS_OF_A_TURN * LANES_OF_A_ROW);
        task.delta[half] = row / ROWS_OF_A_TURN == turn ? sum : task.delta[half];
      }
    }
  }

  SPARSE_ATTN_DEVICE void compute(const Task& task, Result& result) const {
    clear<HEAD_DIM>(result.grad_query);
    ring.await_values(seat);
    hand_over(task);
    const int steps = task.group.steps();
    uint32_t words[SEGMENT], following[SEGMENT];
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) {
      following[i] = task.words[i];
    }
#pragma unroll 1
    for (int first = 0; first < steps; first += SEGMENT) {
#pragma unroll
      for (int i = 0; i < SEGMENT; ++i) {
        words[i] = following[i];
      }
      read_words(call, task.group, first + SEGMENT, following);
      hide(call, ring, seat, task.group, first, words);
#pragma unroll
      for (int i = 0; i < SEGMENT; ++i) {
        if (first + i < steps) {
          add_step(task, words[i], first + i >= task.group.masked(), result);
        }
      }
    }
  }

  SPARSE_ATTN_DEVICE void store(const Group& group, Result& result) const {
    this->finish(group, call.scale, result.grad_query);
    this->scratch(0).template write<ELEMENT, HEAD_DIM>(
        result.grad_query,
        ring.template pointer<char>(seat, OUTPUTS),
        call.output,
        group.first_row(),
        ring.fact(seat, ROWS_STORED));
  }

 private:
  SPARSE_ATTN_DEVICE void hand_over(const Task& task) const {
    const int rows_stored = ring.fact(seat, ROWS_STORED);
    float* statistics = call.statistics + 2 * first_lse(call, this->place_of(seat));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = this->row_of_lane(task.group, half);
      if (row < rows_stored && lane % 4 == 0) {
        store_pair(statistics + 2 * row, task.lse[half], task.delta[half]);
      }
    }
  }

  SPARSE_ATTN_DEVICE void add_step(const Task& task, uint32_t word, bool masked, Result& result) const {
    const uint32_t keys = ring.keys(seat) + (word >> 16);
    float scores[TILES][4], grads[TILES][4];
    multiply_keys<ELEMENT, HEAD_DIM>(task.query, keys, lane, scores);
    multiply_keys<ELEMENT, HEAD_DIM>(task.grad_output, keys + call.memory.values, lane, grads);
    if (masked) {
      prune(word, scores);
    }
    uint32_t factor[2 * TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float ds[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int element = 2 * half + side;
          const float p = exp2_of(scores[tile][element] * call.scale_log2 - task.lse[half]);
          ds[side] = p * (grads[tile][element] - task.delta[half]);
        }
        factor[2 * tile + half] = pack<ELEMENT>(ds[0], ds[1]);
      }
    }
    add_values<ELEMENT, HEAD_DIM>(factor, keys, result.grad_query);
  }
};

// The gradients of 16 keys and values: lists gather queries and the output's gradient.
template <Element ELEMENT, int HEAD_DIM>
class KeyGradientWarp : public GradientWarp<HEAD_DIM> {
  using Base = GradientWarp<HEAD_DIM>;
  using Base::call, Base::lane;

 public:
  using Base::ring, Base::seat;

  struct Task {
    Group group;
    Query<HEAD_DIM> key, value;
    uint32_t words[1];
  };
  struct Result {
    Output<HEAD_DIM> grad_key, grad_value;
  };

  SPARSE_ATTN_DEVICE explicit KeyGradientWarp(const GradientCall& call) : Base(call) {
  }

  SPARSE_ATTN_DEVICE void send(Task& task) const {
    this->send_for_rows(task.group);
    read_words(call, task.group, 0, task.words);
  }

  SPARSE_ATTN_DEVICE void receive(Task& task) const {
    this->scratch(0).take(task.key);
    this->scratch(1).take(task.value);
  }

  SPARSE_ATTN_DEVICE void compute(const Task& task, Result& result) const {
    clear<HEAD_DIM>(result.grad_key);
    clear<HEAD_DIM>(result.grad_value);
    ring.await_values(seat);
    const float* statistics = call.statistics + 2 * first_lse(call, this->place_of(seat));
    uint32_t following[1] = {task.words[0]};
#pragma unroll 1
    for (int step = 0; step < task.group.steps(); ++step) {
      uint32_t words[1] = {following[0]};
      read_words(call, task.group, step + 1, following);
      hide(call, ring, seat, task.group, step, words);
      add_step(task, words[0], step >= task.group.masked(), statistics, result);
    }
  }

  SPARSE_ATTN_DEVICE void store(const Group& group, Result& result) const {
    const int rows_stored = ring.fact(seat, ROWS_STORED);
    this->finish(group, call.scale, result.grad_key);
    this->finish(group, 1.0f, result.grad_value);
    this->scratch(0).template write<ELEMENT, HEAD_DIM>(
        result.grad_key, ring.template pointer<char>(seat, OUTPUTS), call.output, group.first_row(), rows_stored);
    this->scratch(1).template write<ELEMENT, HEAD_DIM>(
        result.grad_value,
        first_row_of(call.second_result, this->place_of(seat)),
        call.second_result,
        group.first_row(),
        rows_stored);
  }

 private:
  SPARSE_ATTN_DEVICE void add_step(
      const Task& task, uint32_t word, bool masked, const float* statistics, Result& result) const {
    const uint32_t queries = ring.keys(seat) + (word >> 16), grad_outputs = queries + call.memory.values;
    float lse2, delta;  // of the lane's query
    load_pair(statistics + 2 * ((word >> 16) / Base::ROW_BYTES), lse2, delta);
    float scores[TILES][4], grads[TILES][4];
    multiply_keys<ELEMENT, HEAD_DIM>(task.key, queries, lane, scores);
    multiply_keys<ELEMENT, HEAD_DIM>(task.value, grad_outputs, lane, grads);
    if (masked) {
      prune(word, scores);
    }
    uint32_t p[2 * TILES], ds[2 * TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      float p_of[4], ds_of[4];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = 8 * tile + 2 * (lane % 4) + side;
        const float its_lse2 = from_lane(lse2, column), its_delta = from_lane(delta, column);
#pragma unroll
        for (int element = side; element < 4; element += 2) {
          p_of[element] = exp2_of(scores[tile][element] * call.scale_log2 - its_lse2);
          ds_of[element] = p_of[element] * (grads[tile][element] - its_delta);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        p[2 * tile + half] = pack<ELEMENT>(p_of[2 * half], p_of[2 * half + 1]);
        ds[2 * tile + half] = pack<ELEMENT>(ds_of[2 * half], ds_of[2 * half + 1]);
      }
    }
    add_values<ELEMENT, HEAD_DIM>(p, grad_outputs, result.grad_value);
    add_values<ELEMENT, HEAD_DIM>(ds, queries, result.grad_key);
  }
};

// The kernel of one of these warps.
template <class Warp>
struct Gradients {
  using Call = GradientCall;
  static constexpr int MOST_THREADS = GRADIENT_THREADS;

  static SPARSE_ATTN_DEVICE void run(const Call& call) {
    Warp warp(call);
    take_groups(warp);
  }
};

}  // namespace sparse_attn
