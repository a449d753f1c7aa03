// Keys that few rows of a group keep are a lane's own. Met by all lanes they would be multiplied mostly for rows that
// do not keep them, so a row and a key meet alone here: vectors run along their dimensions. Scores lie behind those of
// the entries that all lanes meet: for a softmax as [slot][lane], where a slot holds another key for every lane, and
// for gradients, which need no slots, lane by lane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention_steps.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

constexpr int OWN_ENTRIES = 4;                 // that are multiplied at a time
constexpr int QUARTERS = LANES / SORTED_ROWS;  // of a group, in a part

// A part of a group's own entries, in two orders: lane by lane, and sorted, with their places, as products take them.
struct OwnEntries {
  const int32_t* rows;
  int64_t first[LANES], count[LANES] = {};
  int64_t before[LANES];  // how many the lanes before have
  int64_t slots = 0;      // the most of a lane
  const int32_t* sorted_rows;
  const int32_t* places;
  int64_t begin[QUARTERS], end[QUARTERS];  // of the sorted ones
};

enum class Order { Slots, Lanes };  // of scores

// Where the scores of a lane begin, and how far one is from the next.
template <Order ORDER>
SPARSE_ATTN_INLINE int64_t first_score_of(const OwnEntries& own, int64_t lane) {
  return ORDER == Order::Slots ? lane : own.before[lane];
}

template <Order ORDER>
constexpr int64_t SCORE_STEP = ORDER == Order::Slots ? LANES : 1;

SPARSE_ATTN_INLINE uint32_t lane_of(int32_t place) {
  return static_cast<uint32_t>(place) % LANES;
}

template <Order ORDER>
SPARSE_ATTN_INLINE int64_t score_at(const OwnEntries& own, int32_t place) {
  return first_score_of<ORDER>(own, lane_of(place)) + static_cast<uint32_t>(place) / GROUP_ROWS * SCORE_STEP<ORDER>;
}

// Whether divided lists are the faster ones: short sequences have too few entries for what those cost each group.
inline bool divided_are_faster(const DividedLists& lists, int64_t keys_end) {
  return lists.row_stops && 4 * keys_end > 3 * lists.blocks * STOP_KEYS;
}

// How many rows the groups of a task meet by themselves, more or less.
inline int64_t own_uses_of(const DividedLists& lists, const Task& task) {
  const int32_t* stops = lists.row_stops + task.head * lists.groups * GROUP_ROWS;
  return stops[task.end * GROUP_ROWS] - stops[task.first * GROUP_ROWS];
}

// Without what padding or causality hides; lists without it are made in `memory`, [2][slots * LANES].
inline OwnEntries own_entries_of_part(
    const Call& call,
    const DividedLists& lists,
    const Task& task,
    int64_t part,
    int64_t keys_end,
    int32_t* const (&memory)[2]) {
  const int64_t first_row = part * LANES;
  const int32_t* stops = lists.row_stops + task.head * lists.groups * GROUP_ROWS + first_row;
  OwnEntries own;
  own.rows = lists.row_columns, own.sorted_rows = lists.sorted_columns, own.places = lists.sorted_places;
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    own.begin[quarter] = stops[quarter * SORTED_ROWS], own.end[quarter] = stops[(quarter + 1) * SORTED_ROWS];
  }
  for (int lane = 0; lane < LANES; ++lane) {
    own.first[lane] = stops[lane], own.count[lane] = stops[lane + 1] - stops[lane];
  }
  if (call.causal || call.key_padding) {
    const uint8_t* padding = call.key_padding ? call.key_padding + task.batch * call.key_len : nullptr;
    int64_t count = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t end = call.causal ? std::min(keys_end, first_row + lane + 1) : keys_end, first = count;
      own.begin[lane / SORTED_ROWS] = lane % SORTED_ROWS == 0 ? count : own.begin[lane / SORTED_ROWS];
      for (int64_t entry = stops[lane]; entry < stops[lane + 1]; ++entry) {
        const int32_t key = lists.row_columns[entry];
        memory[0][count] = key;
        memory[1][count] = static_cast<int32_t>((count - first) * GROUP_ROWS + lane);
        count += key < end && (!padding || padding[key]);
      }
      own.first[lane] = first, own.count[lane] = count - first;
      own.end[lane / SORTED_ROWS] = count;
    }
    own.rows = own.sorted_rows = memory[0], own.places = memory[1];
  } else if (keys_end < lists.blocks * STOP_KEYS) {
    std::fill_n(own.count, LANES, 0);
    for (int quarter = 0; quarter < QUARTERS; ++quarter) {
      const int32_t *first = own.sorted_rows + own.begin[quarter], *last = own.sorted_rows + own.end[quarter];
      // Counted, not searched: a search guesses wrong at every other step.
      own.end[quarter] = own.begin[quarter] + std::count_if(first, last, [=](int32_t key) { return key < keys_end; });
      for (int64_t entry = own.begin[quarter]; entry < own.end[quarter]; ++entry) {
        own.count[lane_of(own.places[entry])] = own.places[entry] / GROUP_ROWS + 1;
      }
    }
  }
  for (int lane = 0; lane < LANES; ++lane) {
    own.slots = std::max(own.slots, own.count[lane]);
    own.before[lane] = lane > 0 ? own.before[lane - 1] + own.count[lane - 1] : 0;
  }
  return own;
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

// Rows of float32, as own entries meet them.
struct FloatRow {
  static constexpr int LEAST_VECTORS = 1;  // of sums, that a row is cut into

  static SPARSE_ATTN_INLINE_MEMBER Floats add_products(Floats sum, Floats a, Floats b) {
    return sum + a * b;
  }

  // VECTORS vectors, from `dim` on, of the sum of `count` rows with weights STEP apart.
  template <int VECTORS, int64_t STEP>
  static SPARSE_ATTN_INLINE_MEMBER void sum(
      const float* weights, int64_t dim, Rows rows, const int32_t* names, int64_t count, float* sums) {
    Floats even[VECTORS], odd[VECTORS];  // sums by turns, which hide the latency of an FMA
#pragma GCC unroll 4
    for (int vector = 0; vector < VECTORS; ++vector) {
      even[vector] = odd[vector] = splat(0.0f);
    }
    for (int64_t index = 0; index < count; index += 2) {
      const int64_t next = std::min(index + 1, count - 1);
      const float* row = reinterpret_cast<const float*>(rows.at(names[index])) + dim;
      const float* next_row = reinterpret_cast<const float*>(rows.at(names[next])) + dim;
      const Floats weight = splat(weights[index * STEP]);
      const Floats next_weight = splat(next > index ? weights[next * STEP] : 0.0f);
#pragma GCC unroll 4
      for (int vector = 0; vector < VECTORS; ++vector) {
        even[vector] += weight * load(row + vector * LANES);
        odd[vector] += next_weight * load(next_row + vector * LANES);
      }
    }
#pragma GCC unroll 4
    for (int vector = 0; vector < VECTORS; ++vector) {
      store(sums + vector * LANES, even[vector] + odd[vector]);
    }
  }
};

// The products of OWN_ENTRIES lanes' rows, in lane_rows [LANES][words], with the rows that they meet, times a factor.
// The entries may be the same.
template <Order ORDER, class Row>
SPARSE_ATTN_INLINE void four_products(
    const float* lane_rows,
    int64_t words,
    Rows rows,
    const OwnEntries& own,
    const int64_t (&entries)[OWN_ENTRIES],
    float factor,
    float* scores) {
  const float *row[OWN_ENTRIES], *lane_row[OWN_ENTRIES];
  int32_t place[OWN_ENTRIES];
  Floats sum[OWN_ENTRIES];
#pragma GCC unroll 4
  for (int i = 0; i < OWN_ENTRIES; ++i) {
    place[i] = own.places[entries[i]];
    row[i] = reinterpret_cast<const float*>(rows.at(own.sorted_rows[entries[i]]));
    lane_row[i] = lane_rows + lane_of(place[i]) * static_cast<uint32_t>(words);
    sum[i] = splat(0.0f);
  }
  for (int64_t word = 0; word < words; word += LANES) {
#pragma GCC unroll 4
    for (int i = 0; i < OWN_ENTRIES; ++i) {
      sum[i] = Row::add_products(sum[i], load(lane_row[i] + word), load(row[i] + word));
    }
  }
  const Four sums = sums_of_four(sum) * factor;
#pragma GCC unroll 4
  for (int i = 0; i < OWN_ENTRIES; ++i) {
    scores[score_at<ORDER>(own, place[i])] = sums[i];
  }
}

// In slots, minus infinity where a lane meets fewer.
template <Order ORDER, class Row>
SPARSE_ATTN_INLINE void own_products(
    const float* lane_rows, int64_t words, Rows rows, const OwnEntries& own, float factor, float* scores) {
  for (int64_t slot = 0; ORDER == Order::Slots && slot < own.slots; ++slot) {
    store(scores + slot * LANES, splat(-std::numeric_limits<float>::infinity()));
  }
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    const int64_t begin = own.begin[quarter], end = own.end[quarter], rest = (end - begin) % OWN_ENTRIES;
    for (int64_t first = begin; first < end - rest; first += OWN_ENTRIES) {
      const int64_t entries[] = {first, first + 1, first + 2, first + 3};
      four_products<ORDER, Row>(lane_rows, words, rows, own, entries, factor, scores);
    }
    if (rest > 0) {
      const int64_t entries[] = {end - rest, end - 1 - rest / 2, end - 1, end - 1};
      four_products<ORDER, Row>(lane_rows, words, rows, own, entries, factor, scores);
    }
  }
}

// For each lane the sum of the rows that it meets, weighted: to sums [LANES][dims].
template <Order ORDER, class Row>
SPARSE_ATTN_INLINE void own_sums(const float* weights, int64_t dims, Rows rows, const OwnEntries& own, float* sums) {
  constexpr int VECTORS = 4;  // of sums at a time: 64 dimensions, with 16 lanes
  for (int lane = 0; lane < LANES; ++lane) {
    const int32_t* names = own.rows + own.first[lane];
    const int64_t count = own.count[lane];
    const float* own_weights = weights + first_score_of<ORDER>(own, lane);
    int64_t dim = 0;
    for (; dim + VECTORS * LANES <= dims; dim += VECTORS * LANES) {
      Row::template sum<VECTORS, SCORE_STEP<ORDER>>(own_weights, dim, rows, names, count, sums + lane * dims + dim);
    }
    for (; dim < dims; dim += Row::LEAST_VECTORS * LANES) {
      Row::template sum<Row::LEAST_VECTORS, SCORE_STEP<ORDER>>(
          own_weights, dim, rows, names, count, sums + lane * dims + dim);
    }
  }
}

// Dropout of weights [slots][LANES].
inline void drop_own(const Dropout& dropout, Words row_words, const OwnEntries& own, float* weights) {
  for (int quarter = 0; quarter < QUARTERS; ++quarter) {
    for (int64_t entry = own.begin[quarter]; entry < own.end[quarter]; ++entry) {
      const int32_t place = own.places[entry];
      const Words key = splat_word(static_cast<uint32_t>(own.sorted_rows[entry]));
      weights[score_at<Order::Slots>(own, place)] *= dropout_factors(dropout, row_words, key)[lane_of(place)];
    }
  }
}

using Names = int32_t[LANES];

// visit(lane, names, at, which) for up to LANES entries of a lane at a time: what they name, where their scores lie,
// and a bit for each. Where there are fewer, the last is named again.
template <class Visit>
SPARSE_ATTN_INLINE void visit_own(const OwnEntries& own, Visit visit) {
  for (int lane = 0; lane < LANES; ++lane) {
    const int32_t* rows = own.rows + own.first[lane];
    for (int64_t number = 0; number < own.count[lane]; number += LANES) {
      const int64_t left = own.count[lane] - number;
      Names names;
      for (int i = 0; i < LANES; ++i) {
        names[i] = rows[std::min(number + i, own.count[lane] - 1)];
      }
      const uint32_t which = left < LANES ? (1u << left) - 1 : ALL_LANES;
      visit(lane, names, first_score_of<Order::Lanes>(own, lane) + number, which);
    }
  }
}

template <class NumberOf>
SPARSE_ATTN_INLINE Floats gathered(const Names& names, NumberOf number_of) {
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) {
    lanes[i] = number_of(names[i]);
  }
  return load(lanes);
}

// Stores the lanes `which` alone: the others are the next lane's.
SPARSE_ATTN_INLINE void store_some(float* to, uint32_t which, Floats lanes) {
  store(to, select(which, lanes, load(to)));
}

}  // namespace sparse_attn::SPARSE_ATTN_ISA
