// Keys that few rows of a group keep are a lane's own. Met by all lanes they would be multiplied mostly for rows that
// do not keep them, so a row and a key meet alone here: vectors run along their dimensions. Scores lie as [slot][lane],
// behind those of the entries that all lanes meet; a slot holds another key for every lane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention_steps.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

constexpr int OWN_ENTRIES = 4;  // that are multiplied at a time

// A part of a group's own entries, lane by lane: those of lane i are [stops[i], stops[i + 1]). Places: see Lists.
struct OwnEntries {
  const int32_t* rows;
  const int32_t* places;
  int64_t stops[LANES + 1] = {};
  int64_t slots = 0;  // the most of a lane, made even
};

// Without what padding or causality hides. Lists that differ from the layout's are made in `memory`, [2][slots *
// LANES].
inline OwnEntries own_entries_of_part(
    const Call& call,
    const Lists& lists,
    const Task& task,
    int64_t part,
    int64_t keys_end,
    int32_t* const (&memory)[2]) {
  const int64_t first_row = part * LANES;
  const int32_t* stops = lists.row_stops + task.head * lists.groups * GROUP_ROWS + first_row;
  OwnEntries own{lists.row_columns + stops[0], lists.row_places + stops[0]};
  for (int lane = 0; lane < LANES; ++lane) {
    own.stops[lane + 1] = stops[lane + 1] - stops[0];
  }
  if (call.causal || call.key_padding || keys_end < lists.blocks * STOP_KEYS) {
    const uint8_t* padding = call.key_padding ? call.key_padding + task.batch * call.key_len : nullptr;
    int64_t count = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t end = call.causal ? std::min(keys_end, first_row + lane + 1) : keys_end;
      const int64_t first = own.stops[lane], last = stops[lane + 1] - stops[0];
      own.stops[lane] = count;
      for (int64_t entry = first; entry < last; ++entry) {
        const int32_t key = own.rows[entry];
        memory[0][count] = key;
        memory[1][count] = static_cast<int32_t>((count - own.stops[lane]) * GROUP_ROWS + lane);
        count += key < end && (!padding || padding[key]);
      }
    }
    own.stops[LANES] = count;
    own.rows = memory[0], own.places = memory[1];
  }
  for (int lane = 0; lane < LANES; ++lane) {
    own.slots = std::max(own.slots, own.stops[lane + 1] - own.stops[lane]);
  }
  own.slots += own.slots % 2;
  return own;
}

SPARSE_ATTN_INLINE uint32_t lane_of(uint32_t place) {
  return place % LANES;
}

SPARSE_ATTN_INLINE uint32_t score_at(uint32_t place) {
  return place / GROUP_ROWS * LANES + lane_of(place);
}

using Four = float __attribute__((vector_size(16)));

// The sums of four vectors' elements.
SPARSE_ATTN_INLINE Four sums_of_four(const Floats (&vectors)[4]) {
#if SPARSE_ATTN_LANES == 16
#define SPARSE_ATTN_QUADS(a, b, c, d) \
  a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#elif SPARSE_ATTN_LANES == 8
#define SPARSE_ATTN_QUADS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#else
#define SPARSE_ATTN_QUADS(a, b, c, d) a, b, c, d
#endif
  Floats halves[2];
  for (int half = 0; half < 2; ++half) {
    const Floats a = vectors[2 * half], b = vectors[2 * half + 1];
    halves[half] = __builtin_shufflevector(a, b, SPARSE_ATTN_QUADS(0, LANES, 1, LANES + 1)) +
                   __builtin_shufflevector(a, b, SPARSE_ATTN_QUADS(2, LANES + 2, 3, LANES + 3));
  }
  const Floats quads = __builtin_shufflevector(halves[0], halves[1], SPARSE_ATTN_QUADS(0, 1, LANES, LANES + 1)) +
                       __builtin_shufflevector(halves[0], halves[1], SPARSE_ATTN_QUADS(2, 3, LANES + 2, LANES + 3));
#undef SPARSE_ATTN_QUADS
  Four sums{};
  for (int first = 0; first < LANES; first += 4) {
    Four quad;
    std::memcpy(&quad, reinterpret_cast<const float*>(&quads) + first, sizeof quad);
    sums += quad;
  }
  return sums;
}

// The products of OWN_ENTRIES lanes' rows, in lane_rows [LANES][dims], with the rows that they meet. The entries may be
// the same.
SPARSE_ATTN_INLINE void four_products(
    const float* lane_rows,
    int64_t dims,
    Rows rows,
    const OwnEntries& own,
    const int64_t (&entries)[OWN_ENTRIES],
    float* scores) {
  const float *row[OWN_ENTRIES], *lane_row[OWN_ENTRIES];
  uint32_t place[OWN_ENTRIES];
  Floats sum[OWN_ENTRIES];
#pragma GCC unroll 4
  for (int i = 0; i < OWN_ENTRIES; ++i) {
    place[i] = static_cast<uint32_t>(own.places[entries[i]]);
    row[i] = reinterpret_cast<const float*>(rows.at(own.rows[entries[i]]));
    lane_row[i] = lane_rows + lane_of(place[i]) * static_cast<uint32_t>(dims);
    sum[i] = splat(0.0f);
  }
  for (int64_t dim = 0; dim < dims; dim += LANES) {
#pragma GCC unroll 4
    for (int i = 0; i < OWN_ENTRIES; ++i) {
      sum[i] += load(lane_row[i] + dim) * load(row[i] + dim);
    }
  }
  const Four sums = sums_of_four(sum);
#pragma GCC unroll 4
  for (int i = 0; i < OWN_ENTRIES; ++i) {
    scores[score_at(place[i])] = sums[i];
  }
}

// To scores [slots][LANES], minus infinity where a lane meets fewer.
SPARSE_ATTN_INLINE void own_products(
    const float* lane_rows, int64_t dims, Rows rows, const OwnEntries& own, float* scores) {
  for (int64_t slot = 0; slot < own.slots; ++slot) {
    store(scores + slot * LANES, splat(-std::numeric_limits<float>::infinity()));
  }
  const int64_t count = own.stops[LANES], rest = count % OWN_ENTRIES, last = count - 1;
  for (int64_t first = 0; first < count - rest; first += OWN_ENTRIES) {
    four_products(lane_rows, dims, rows, own, {first, first + 1, first + 2, first + 3}, scores);
  }
  if (rest > 0) {
    four_products(lane_rows, dims, rows, own, {last - rest + 1, last - rest / 2, last, last}, scores);
  }
}

// VECTORS vectors of the sum of `count` rows with weights [count][LANES]; if that is odd, one more weight is zero.
template <int VECTORS>
SPARSE_ATTN_INLINE void own_sum(
    const float* weights, int64_t dim, Rows rows, const int32_t* names, int64_t count, float* sums) {
  Floats even[VECTORS], odd[VECTORS];  // sums by turns, which hide the latency of an FMA
#pragma GCC unroll 4
  for (int vector = 0; vector < VECTORS; ++vector) {
    even[vector] = odd[vector] = splat(0.0f);
  }
  for (int64_t index = 0; index < count; index += 2) {
    const float* row = reinterpret_cast<const float*>(rows.at(names[index])) + dim;
    const float* next_row = reinterpret_cast<const float*>(rows.at(names[std::min(index + 1, count - 1)])) + dim;
    const Floats weight = splat(weights[index * LANES]), next_weight = splat(weights[(index + 1) * LANES]);
#pragma GCC unroll 4
    for (int vector = 0; vector < VECTORS; ++vector) {
      even[vector] += weight * load(row + vector * LANES);
      odd[vector] += next_weight * load(next_row + vector * LANES);
    }
  }
#pragma GCC unroll 4
  for (int vector = 0; vector < VECTORS; ++vector) {
    store(sums + dim + vector * LANES, even[vector] + odd[vector]);
  }
}

// For each lane the sum of the rows that it meets, with weights [slots][LANES]: to sums [LANES][dims].
SPARSE_ATTN_INLINE void own_sums(const float* weights, int64_t dims, Rows rows, const OwnEntries& own, float* sums) {
  for (int lane = 0; lane < LANES; ++lane) {
    const int32_t* names = own.rows + own.stops[lane];
    const int64_t count = own.stops[lane + 1] - own.stops[lane];
    int64_t dim = 0;
    for (; dim + 4 * LANES <= dims; dim += 4 * LANES) {
      own_sum<4>(weights + lane, dim, rows, names, count, sums + lane * dims);
    }
    for (; dim < dims; dim += LANES) {
      own_sum<1>(weights + lane, dim, rows, names, count, sums + lane * dims);
    }
  }
}

// Dropout of weights [slots][LANES].
inline void drop_own(const Dropout& dropout, Words row_words, const OwnEntries& own, float* weights) {
  for (int64_t entry = 0; entry < own.stops[LANES]; ++entry) {
    const auto place = static_cast<uint32_t>(own.places[entry]);
    const Words key = splat_word(static_cast<uint32_t>(own.rows[entry]));
    weights[score_at(place)] *= dropout_factors(dropout, row_words, key)[lane_of(place)];
  }
}

}  // namespace sparse_attn::SPARSE_ATTN_ISA
