// The steps of one warp: scores of 16 queries and 32 keys, softmax, rounding, output. Include fragments.cuh (or the
// emulator's) before.
#pragma once

#include <cmath>

#include "attention_call.h"

namespace sparse_attn {

enum class Rounding { None, EightLevels, Table };

constexpr int TILES = STEP_KEYS / 8;  // accumulators of a step
constexpr float LN_2 = 0.693147180559945309417f;

// Scores of a lane: [step][tile][2 rows][2 keys].
template <int STEPS>
using Scores = float[STEPS][TILES][4];

// Probabilities of a lane as left factors: [step][2 rows of each tile].
template <int STEPS>
using Probabilities = uint32_t[STEPS][2 * TILES];

// word[i] of lane j of four neighbours becomes word[j] of lane i.
SPARSE_ATTN_DEVICE void transpose_neighbours(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(i & distance)) {
        const uint32_t received = from_neighbour(upper ? word[i] : word[i + distance], distance);
        word[i] = upper ? received : word[i];
        word[i + distance] = upper ? word[i + distance] : received;
      }
    }
  }
}

// Products of 16 queries with the 32 keys whose rows the lanes point at.
template <Element ELEMENT, int HEAD_DIM>
SPARSE_ATTN_DEVICE void multiply_keys(
    const uint32_t (&query)[HEAD_DIM / 16][4], uint32_t row, float (&scores)[TILES][4]) {
#pragma unroll
  for (int part = 0; part < HEAD_DIM / 16; ++part) {
    uint32_t first[4], second[4];
    load_matrices(first, row ^ (32 * part));
    load_matrices(second, row ^ (32 * part + 16));
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const uint32_t(&left)[4] = query[part];
      multiply_add<ELEMENT>(scores[tile], left[0], left[1], left[2], left[3], first[tile], second[tile]);
    }
  }
}

// Adds the 32 values whose rows the lanes point at, weighted.
template <Element ELEMENT, int HEAD_DIM>
SPARSE_ATTN_DEVICE void add_values(const uint32_t (&p)[2 * TILES], uint32_t row, float (&output)[HEAD_DIM / 8][4]) {
#pragma unroll
  for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
    uint32_t value[4];
    load_matrices_transposed(value, row ^ (16 * chunk));
    multiply_add<ELEMENT>(output[chunk], p[0], p[1], p[2], p[3], value[0], value[1]);
    multiply_add<ELEMENT>(output[chunk], p[4], p[5], p[6], p[7], value[2], value[3]);
  }
}

// The online softmax of a lane's two rows, over unscaled scores. A row without any kept key keeps the maximum
// -inf; 0 is subtracted there, so that nothing becomes NaN.
struct RowState {
  float highest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // of the lane's own keys
  float shift[2] = {0.0f, 0.0f};

  // Takes the maxima of more scores in and returns through `correction` the factor for what was summed before.
  template <int STEPS>
  SPARSE_ATTN_DEVICE void raise(const Scores<STEPS>& scores, int steps, float scale_log2, float (&correction)[2]) {
    float now[2] = {highest[0], highest[1]};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step < steps) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          now[0] = fmaxf(now[0], fmaxf(scores[step][tile][0], scores[step][tile][1]));
          now[1] = fmaxf(now[1], fmaxf(scores[step][tile][2], scores[step][tile][3]));
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      now[row] = fmaxf(now[row], from_neighbour(now[row], 1));
      now[row] = fmaxf(now[row], from_neighbour(now[row], 2));
      shift[row] = now[row] == -INFINITY ? 0.0f : now[row] * scale_log2;
      correction[row] = exp2_of(highest[row] * scale_log2 - shift[row]);
      highest[row] = now[row];
      sum[row] *= correction[row];
    }
  }

  // The sum over all lanes of a row.
  SPARSE_ATTN_DEVICE void complete() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += from_neighbour(sum[row], 1);
      sum[row] += from_neighbour(sum[row], 2);
    }
  }

  // Base-2 log-sum-exp of a complete sum, 0 for a row without keys.
  SPARSE_ATTN_DEVICE float lse2(int row) const {
    return sum[row] > 0.0f ? shift[row] + log2_of(sum[row]) : 0.0f;
  }
};

// Adds the exponentials of scores to the sums, and returns them as probabilities if PACKED.
template <Element ELEMENT, bool PACKED, int STEPS>
SPARSE_ATTN_DEVICE void exponentials(
    const Scores<STEPS>& scores, int steps, float scale_log2, RowState& state, Probabilities<STEPS>& p) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if (step < steps) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float first = exp2_of(scores[step][tile][2 * row] * scale_log2 - state.shift[row]);
          const float second = exp2_of(scores[step][tile][2 * row + 1] * scale_log2 - state.shift[row]);
          state.sum[row] += first + second;
          if constexpr (PACKED) {
            p[step][2 * tile + row] = pack<ELEMENT>(first, second);
          }
        }
      }
    }
  }
}

// Rounds probabilities p = 2 ** (score * scale_log2 - lse2) to levels straight from the scores. The bins share
// [log2(threshold), 0] evenly, so with n levels and bins of width w the level's number is
// floor(n * clamp(1 + log2(p) / (n * w), 0, 1)), at most n - 1.
template <Rounding ROUNDING>
struct Rounder {
  float rate, factor, below_count;
  uint32_t low[2], high[2];  // EightLevels: the lower and the upper bytes of all levels
  uint32_t table;            // Table: where number 0 would lie, if numbers were the bits of `number`

  SPARSE_ATTN_DEVICE Rounder(const AttentionCall& call, uint32_t shared) {
    rate = call.level_rate;
    factor = call.scale_log2 * call.level_rate;
    // The largest float32 below the count.
    below_count = static_cast<float>(call.level_count) * (1.0f - 0x1p-24f);
    if constexpr (ROUNDING == Rounding::EightLevels) {
      const Words levels = load_words(call.levels);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        low[half] = choose_bytes(levels.word[2 * half], levels.word[2 * half + 1], 0x6420);
        high[half] = choose_bytes(levels.word[2 * half], levels.word[2 * half + 1], 0x7531);
      }
    }
    table = shared + call.memory.table - 2u * FIRST_NUMBER;
  }

  // 2 ** 23 * 1.5 as bits: a float32 of this size counts in units.
  static constexpr uint32_t FIRST_NUMBER = 0x4b400000u;

  // The number of a level, plus FIRST_NUMBER.
  SPARSE_ATTN_DEVICE uint32_t number(float score, float offset) const {
    return multiply_add_down(multiply_add_clamped(score, factor, offset), below_count, 12582912.0f);
  }

  SPARSE_ATTN_DEVICE void round(const float (&scores)[4], const float (&offset)[2], uint32_t& upper, uint32_t& lower)
      const {
    const uint32_t numbers[4] = {
        number(scores[0], offset[0]), number(scores[1], offset[0]), number(scores[2], offset[1]),
        number(scores[3], offset[1])};
    if constexpr (ROUNDING == Rounding::EightLevels) {
      // A level's number is a digit of the choice.
      const uint32_t choice = numbers[0] + (numbers[1] << 4) + (numbers[2] << 8) + (numbers[3] << 12);
      const uint32_t lows = choose_bytes(low[0], low[1], choice), highs = choose_bytes(high[0], high[1], choice);
      upper = choose_bytes(lows, highs, 0x5140);
      lower = choose_bytes(lows, highs, 0x7362);
    } else {
      upper = load_shared_half(table + 2 * numbers[0]) | load_shared_half(table + 2 * numbers[1]) << 16;
      lower = load_shared_half(table + 2 * numbers[2]) | load_shared_half(table + 2 * numbers[3]) << 16;
    }
  }

  template <int STEPS>
  SPARSE_ATTN_DEVICE void round(
      const Scores<STEPS>& scores, int steps, const float (&lse2)[2], Probabilities<STEPS>& p) const {
    const float offset[2] = {1.0f - lse2[0] * rate, 1.0f - lse2[1] * rate};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step < steps) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          round(scores[step][tile], offset, p[step][2 * tile], p[step][2 * tile + 1]);
        }
      }
    }
  }
};

}  // namespace sparse_attn
