// The steps of one warp: scores of 16 queries and 32 keys, softmax, rounding, output. Include fragments.cuh (or the
// emulator's) before.
#pragma once

#include <cmath>

#include "attention_call.h"

namespace sparse_attn {

enum class Rounding { None, EightLevels, Table };

constexpr int TILES = STEP_KEYS / 8;  // accumulators of a step
constexpr float LN_2 = 0.693147180559945309417f, LOG2_E = 1.44269504088896340736f;

// Scores of a lane: [step][tile][2 rows][2 keys].
template <int STEPS>
using Scores = float[STEPS][TILES][4];

// Probabilities of a lane as left factors: [step][tile][2 rows].
template <int STEPS>
using Probabilities = uint32_t[STEPS][2 * TILES];

template <int HEAD_DIM>
using Query = uint32_t[HEAD_DIM / 16][4];

template <int HEAD_DIM>
using Output = float[HEAD_DIM / 8][4];

// Products of 16 queries with the 32 keys whose rows the lanes point at. A right factor's two words must come from one
// ldmatrix, to lie in registers side by side: lanes 8 apart take the halves of 16 columns of both their keys.
template <Element ELEMENT, int HEAD_DIM>
SPARSE_ATTN_DEVICE void multiply_keys(const Query<HEAD_DIM>& query, uint32_t row, int lane, float (&scores)[TILES][4]) {
  const bool second = lane & 8;
  const uint32_t other = from_neighbour(row, 8), half = second ? 16 : 0;
  const uint32_t rows[2] = {(second ? other : row) ^ half, (second ? row : other) ^ half};
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      scores[tile][element] = 0.0f;
    }
  }
#pragma unroll
  for (int part = 0; part < HEAD_DIM / 16; ++part) {
#pragma unroll
    for (int pair = 0; pair < TILES / 2; ++pair) {
      uint32_t keys[4];
      load_matrices(keys, rows[pair] ^ (32 * part));
      multiply_add<ELEMENT>(scores[pair], query[part], keys[0], keys[1]);
      multiply_add<ELEMENT>(scores[pair + 2], query[part], keys[2], keys[3]);
    }
  }
}

// Scores become -inf where `kept` has no bit: 4 bits a tile.
SPARSE_ATTN_DEVICE void prune(uint32_t kept, float (&scores)[TILES][4]) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      scores[tile][element] = kept >> (4 * tile + element) & 1 ? scores[tile][element] : -INFINITY;
    }
  }
}

template <int HEAD_DIM>
SPARSE_ATTN_DEVICE void scale_output(Output<HEAD_DIM>& output, const float (&factor)[2]) {
#pragma unroll
  for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      output[chunk][element] *= factor[element / 2];
    }
  }
}

template <int HEAD_DIM>
SPARSE_ATTN_DEVICE void clear(Output<HEAD_DIM>& output) {
#pragma unroll
  for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      output[chunk][element] = 0.0f;
    }
  }
}

// Adds the 32 values whose rows the lanes point at, weighted.
template <Element ELEMENT, int HEAD_DIM>
SPARSE_ATTN_DEVICE void add_values(const uint32_t (&p)[2 * TILES], uint32_t row, Output<HEAD_DIM>& output) {
  const uint32_t upper[4] = {p[0], p[1], p[2], p[3]}, lower[4] = {p[4], p[5], p[6], p[7]};
#pragma unroll
  for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
    uint32_t value[4];
    load_matrices_transposed(value, row ^ (16 * chunk));
    multiply_add<ELEMENT>(output[chunk], upper, value[0], value[1]);
    multiply_add<ELEMENT>(output[chunk], lower, value[2], value[3]);
  }
}

// The online softmax of a lane's two rows. What is subtracted from scaled scores, `shift`, is the maximum of the first
// ones. Later ones may exceed it a little: their exponentials are as exact, and what was summed need not be scaled
// again. A row without any kept key keeps the maximum -inf; 0 is subtracted there, so that nothing becomes NaN.
struct RowState {
  static constexpr float MOST_EXCESS = 8.0f;  // exponentials up to 2 ** 8 are far from the end of float16

  float highest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // of the lane's own keys, until `complete`
  float shift[2] = {0.0f, 0.0f};

  // Takes the maxima of more scores in, unless they exceed those of before little in all rows of the warp. Otherwise
  // `correction` is the factor for what was summed.
  template <int STEPS>
  SPARSE_ATTN_DEVICE bool raise(const Scores<STEPS>& scores, float scale_log2, float (&correction)[2]) {
    float now[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int element = 0; element < 4; ++element) {
          now[element / 2] = fmaxf(now[element / 2], scores[step][tile][element]);
        }
      }
    }
    bool exceeds = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      now[row] *= scale_log2;
      exceeds = exceeds || now[row] > highest[row] + MOST_EXCESS;
    }
    if (!ballot(exceeds)) {
      return false;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      now[row] = fmaxf(now[row], from_neighbour(now[row], 1));
      now[row] = fmaxf(now[row], from_neighbour(now[row], 2));
      now[row] = fmaxf(now[row], highest[row]);
      shift[row] = now[row] == -INFINITY ? 0.0f : now[row];
      correction[row] = exp2_of(highest[row] - shift[row]);
      highest[row] = now[row];
      sum[row] *= correction[row];
    }
    return true;
  }

  // Adds the exponentials of the scores of the first `steps` steps to the sums, and returns them as probabilities if
  // KEPT.
  template <Element ELEMENT, bool KEPT, int STEPS>
  SPARSE_ATTN_DEVICE void add(const Scores<STEPS>& scores, int steps, float scale_log2, Probabilities<STEPS>& p) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (step >= steps) {
        break;
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float first = exp2_of(scores[step][tile][2 * row] * scale_log2 - shift[row]);
          const float second = exp2_of(scores[step][tile][2 * row + 1] * scale_log2 - shift[row]);
          sum[row] += first + second;
          if constexpr (KEPT) {
            p[step][2 * tile + row] = pack<ELEMENT>(first, second);
          }
        }
      }
    }
  }

  // From the sums of the lanes to those of the rows.
  SPARSE_ATTN_DEVICE void complete() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += from_neighbour(sum[row], 1);
      sum[row] += from_neighbour(sum[row], 2);
    }
  }

  // Base-2 log-sum-exp of a complete sum, 0 for a row without keys.
  SPARSE_ATTN_DEVICE float lse2(int row) const {
    return sum[row] == 0.0f ? 0.0f : shift[row] + log2_of(sum[row]);
  }
};

// Rounds probabilities p = 2 ** (score * scale_log2 - lse2) to levels straight from the scores. The bins share
// [log2(threshold), 0] evenly, so with n levels and bins of width w the level's number is
// floor(n * clamp(1 + log2(p) / (n * w), 0, 1)), at most n - 1.
template <Rounding ROUNDING>
class Rounder {
  // A float32 with these bits (1.5 * 2 ** 23) counts in units.
  static constexpr uint32_t FIRST_NUMBER = 0x4b400000u;

  const AttentionCall& call;
  float factor, offset[2];
  uint32_t table;  // Table: where the level would lie whose number has the bits 0

  // The number of a level, plus FIRST_NUMBER.
  SPARSE_ATTN_DEVICE uint32_t number(float score, float row_offset) const {
    return multiply_add_down(multiply_add_clamped(score, factor, row_offset), call.below_level_count, 12582912.0f);
  }

  SPARSE_ATTN_DEVICE uint32_t level(uint32_t number) const {
    return load_shared_half(table + 2 * number);
  }

 public:
  SPARSE_ATTN_DEVICE Rounder(const AttentionCall& call, uint32_t shared, const RowState& state) : call(call) {
    factor = call.scale_log2 * call.level_rate;
    offset[0] = 1.0f - state.lse2(0) * call.level_rate;
    offset[1] = 1.0f - state.lse2(1) * call.level_rate;
    table = shared + call.memory.table - 2 * FIRST_NUMBER;
  }

  template <int STEPS>
  SPARSE_ATTN_DEVICE void round(const Scores<STEPS>& scores, Probabilities<STEPS>& p) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const float (&score)[4] = scores[step][tile];
        const uint32_t first = number(score[0], offset[0]), second = number(score[1], offset[0]);
        const uint32_t third = number(score[2], offset[1]), fourth = number(score[3], offset[1]);
        uint32_t& upper = p[step][2 * tile];
        uint32_t& lower = p[step][2 * tile + 1];
        if constexpr (ROUNDING == Rounding::EightLevels) {
          // The numbers are digits that choose bytes.
          const uint32_t choice = first + (second << 4) + (third << 8) + (fourth << 12);
          const uint32_t lows = choose_bytes(call.low_bytes[0], call.low_bytes[1], choice);
          const uint32_t highs = choose_bytes(call.high_bytes[0], call.high_bytes[1], choice);
          upper = choose_bytes(lows, highs, 0x5140);
          lower = choose_bytes(lows, highs, 0x7362);
        } else {
          upper = level(first) | level(second) << 16;
          lower = level(third) | level(fourth) << 16;
        }
      }
    }
  }
};

}  // namespace sparse_attn
