// What the forward and the backward kernels share: the list of a group, the two products that all the work goes into,
// and what happens to probabilities. Included by attention_kernels.h, once for each instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention_rows.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.693147180559945309417f;
constexpr int ENTRIES = 8;  // list entries whose products are summed at a time: as many as hide the latency of an FMA
constexpr int PARTS = GROUP_ROWS / LANES;  // of a group, each as many rows as there are lanes
constexpr uint32_t ALL_ROWS = 0xffff, ALL_LANES = (1u << LANES) - 1;
constexpr int64_t STOP_KEYS = 32;

// Bits of those of `count` numbers, counted from `first`, that lie in [begin, end).
SPARSE_ATTN_INLINE uint32_t bits_between(int64_t first, int count, int64_t begin, int64_t end) {
  const int64_t low = std::clamp<int64_t>(begin - first, 0, count), high = std::clamp<int64_t>(end - first, 0, count);
  return low < high ? (1u << high) - (1u << low) : 0;
}

// What a group, or a part of it, meets: rows of the other side, and for each the bits of those that keep it (null:
// all).
struct Entries {
  const int32_t* rows;
  const int32_t* kept;
  int64_t count;
};

// The part of a group's list below position `end`.
inline Entries entries_of(const Lists& lists, int64_t head, int64_t group, int64_t end) {
  const int32_t* stops = lists.stops + (head * lists.groups + group) * (lists.blocks + 1);
  const int64_t first = stops[0];
  int64_t last = stops[std::min((end + STOP_KEYS - 1) / STOP_KEYS, lists.blocks)];
  while (last > first && lists.columns[last - 1] >= end) {
    --last;
  }
  return {lists.columns + first, lists.full ? nullptr : lists.row_bits + first, last - first};
}

// How many rows the groups of a task meet below position `end`, each counted once for each group.
inline int64_t uses_of(const Lists& lists, const Task& task, int64_t end) {
  int64_t uses = 0;
  for (int64_t group = task.first; group < task.end; ++group) {
    uses += entries_of(lists, task.head, group, end).count;
  }
  return uses;
}

// What 32-bit words are: adds the product of one, the same for all lanes, with the lanes.
struct FloatWords {
  static SPARSE_ATTN_INLINE_MEMBER Floats add_product(Floats sum, Floats lanes, const void* word) {
    float factor;
    std::memcpy(&factor, word, sizeof factor);
    return sum + lanes * factor;
  }
};

// The products of every entry's row with the lanes [words][LANES]: visit(entry, [LANES]).
template <class Word = FloatWords, class Visit>
SPARSE_ATTN_INLINE void products(const float* lanes, int64_t words, Rows rows, const Entries& list, Visit visit) {
  for (int64_t first = 0; first < list.count; first += ENTRIES) {
    const int64_t count = std::min<int64_t>(ENTRIES, list.count - first);
    const char* row[ENTRIES];
    Floats sum[ENTRIES];
    for (int i = 0; i < ENTRIES; ++i) {
      row[i] = rows.at(list.rows[first + (i < count ? i : 0)]);
      sum[i] = splat(0.0f);
    }
    // `offset` is common to all rows, or, where an instruction both reads and multiplies, part of each row's address.
    int64_t offset = 0;
    for (const float *lane = lanes, *end = lanes + words * LANES; lane < end; lane += LANES * LANES) {
#pragma GCC unroll 16
      for (int word = 0; word < LANES; ++word) {
        const Floats factors = load(lane + word * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ENTRIES; ++i) {
          sum[i] = Word::add_product(sum[i], factors, row[i] + (LANES == 16 ? 0 : offset) + 4 * word);
        }
      }
      if constexpr (LANES == 16) {
#pragma GCC unroll 8
        for (int i = 0; i < ENTRIES; ++i) {
          row[i] += 4 * LANES;
          keep_in_register(row[i]);
        }
      }
      offset += 4 * LANES;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ENTRIES; ++i) {
      if (i < count) {
        visit(first + i, sum[i]);
      }
    }
  }
}

// For each of LANES_AT_ONCE lanes the sum of `count` rows from `word` on, VECTORS vectors of them, with weights, added
// to `starts`.
template <class Word, int LANES_AT_ONCE, int VECTORS, class RowAt>
SPARSE_ATTN_INLINE void weighted_words(
    const float* weights,
    int first_lane,
    int64_t count,
    int64_t word,
    RowAt row_at,
    const OutputRows& outputs,
    const float* starts,
    int64_t words) {
  Floats sum[LANES_AT_ONCE][VECTORS];
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES_AT_ONCE; ++lane) {
#pragma GCC unroll 2
    for (int vector = 0; vector < VECTORS; ++vector) {
      sum[lane][vector] = starts ? load(starts + (first_lane + lane) * words + word + vector * LANES) : splat(0.0f);
    }
  }
  for (int64_t index = 0; index < count; ++index) {
    const float* words = reinterpret_cast<const float*>(row_at(index)) + word;
    const float* weight = weights + index * LANES + first_lane;
    Floats row[VECTORS];
#pragma GCC unroll 2
    for (int vector = 0; vector < VECTORS; ++vector) {
      row[vector] = load(words + vector * LANES);
    }
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES_AT_ONCE; ++lane) {
#pragma GCC unroll 2
      for (int vector = 0; vector < VECTORS; ++vector) {
        sum[lane][vector] = Word::add_product(sum[lane][vector], row[vector], weight + lane);
      }
    }
  }
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES_AT_ONCE; ++lane) {
#pragma GCC unroll 2
    for (int vector = 0; vector < VECTORS; ++vector) {
      outputs.write(first_lane + lane, word + vector * LANES, sum[lane][vector]);
    }
  }
}

// For each lane the sum of `count` rows of `words` words, row_at(index), with weights [count][LANES]. The weights are
// what is broadcast. As many sums at a time as hide the latency of an FMA: with 16 lanes those of all lanes, so that a
// gathered line is read once; with fewer those of four lanes, so that a broadcast serves two vectors. `starts`
// [LANES][words], if given, is added.
template <class Word = FloatWords, class RowAt>
SPARSE_ATTN_INLINE void weighted_rows(
    const float* weights,
    int64_t count,
    int64_t words,
    RowAt row_at,
    const OutputRows& outputs,
    const float* starts = nullptr) {
  constexpr int VECTORS = LANES == 16 ? 1 : 2, LANES_AT_ONCE = LANES == 16 ? 16 : 4;
  int64_t word = 0;
  for (; word + VECTORS * LANES <= words; word += VECTORS * LANES) {
    for (int lane = 0; lane < LANES; lane += LANES_AT_ONCE) {
      weighted_words<Word, LANES_AT_ONCE, VECTORS>(weights, lane, count, word, row_at, outputs, starts, words);
    }
  }
  if (VECTORS > 1 && word < words) {
    weighted_words<Word, LANES, 1>(weights, 0, count, word, row_at, outputs, starts, words);
  }
}

// sparse_attn.dropout.mix32.
SPARSE_ATTN_INLINE Words mix32(Words word) {
  word = (word ^ (word >> 16)) * 0x7FEB352D;
  word = (word ^ (word >> 15)) * 0x846CA68B;
  return word ^ (word >> 16);
}

// What dropout hashes of query rows, by their numbers.
SPARSE_ATTN_INLINE Words row_words(const Dropout& dropout, Words row_numbers) {
  return mix32(row_numbers * 0x9E3779B1 + dropout.seed);
}

SPARSE_ATTN_INLINE Floats dropout_factors(const Dropout& dropout, Words row_words, Words keys) {
  const Words words = mix32(row_words + keys * 0x85EBCA77);
  return words >= splat_word(dropout.threshold) ? splat(dropout.factor) : splat(0.0f);
}

SPARSE_ATTN_INLINE Words counting_from(uint32_t first) {
  return Words{SPARSE_ATTN_COUNT} + first;
}

// The counter of a query row: see sparse_attn.dropout. The next row's is `step` further.
struct RowNumbers {
  uint32_t first, step;

  RowNumbers(const Call& call, const Sequence& sequence, int64_t batch, int64_t head)
      : first(
            static_cast<uint32_t>(
                call.cu_seqlens ? sequence.first_token * call.heads + head
                                : (batch * call.heads + head) * call.query_len)),
        step(call.cu_seqlens ? static_cast<uint32_t>(call.heads) : 1) {
  }
};

// Rounds probabilities to levels. A copy of the call's numbers: those behind a pointer would be read again after each
// store.
class RoundToLevels {
 public:
  explicit RoundToLevels(const Rounding& rounding)
      : count_(rounding.count),
        levels_(rounding.levels),
        log2_threshold_(rounding.log2_threshold),
        step_(rounding.step),
        bins_(1.0f / rounding.step),
        computed_(rounding.mid_points && rounding.count > LANES),
        table_(rounding.count > 0 ? load(rounding.levels) : Floats{}) {
  }

  SPARSE_ATTN_INLINE_MEMBER Floats operator()(Floats log2_p) const {
    const Floats position = log2_p * bins_ + (1.0f - log2_threshold_ * bins_);  // below 1: under the threshold
    const Floats highest = splat(static_cast<float>(count_ - 1));
    const Ints index = __builtin_convertvector(minimum(maximum(position, splat(0.0f)), highest), Ints);  // NaN: 0
    if (computed_) {
      const Floats middle = __builtin_convertvector(index, Floats) - 0.5f;
      const Floats level = exp2_of(middle * step_ + log2_threshold_);
      return index == 0 ? splat(0.0f) : level;
    }
#if !defined(__clang__)
    if (count_ <= LANES) {
      return __builtin_shuffle(table_, index);
    }
#endif
    Floats level;
    for (int lane = 0; lane < LANES; ++lane) {
      level[lane] = levels_[index[lane]];
    }
    return level;
  }

 private:
  int64_t count_;
  const float* levels_;
  float log2_threshold_, step_, bins_;
  bool computed_;  // evenly spaced levels, too many for a table
  Floats table_;
};

// What the rows of one side need: those that lists name, and those that are lanes.
struct SideMemory {
  float* lanes;      // [dims][LANES]
  float* own_lanes;  // [LANES][dims]
  float* rows;       // [length][dims]
};

// A thread's memory for one head at a time, all of it in floats.
struct Workspace {
  SideMemory first, second;
  float *first_scores, *second_scores;  // [entries][LANES]
  int32_t *rows, *kept;                 // [entries], a list that differs from the layout's
  int32_t* own[2];                      // [entries * LANES], likewise

  // Beyond the longest side, and a multiple of what the tile products take at a time.
  static int64_t length(const Call& call) {
    return (std::max(call.query_len, call.key_len) + 2 * GROUP_ROWS) / (2 * GROUP_ROWS) * (2 * GROUP_ROWS);
  }
  static int64_t floats(const Call& call) {
    return 2 * (padded_dim(call.head_dim) * (2 * LANES + length(call)) + 2 * length(call) * LANES + length(call));
  }
  Workspace(const Call& call, float* memory) {
    const auto take = [&memory](int64_t floats) {
      float* start = memory;
      memory += floats;
      return start;
    };
    const int64_t dims = padded_dim(call.head_dim), entries = length(call);
    first.lanes = take(dims * LANES), second.lanes = take(dims * LANES);
    first.own_lanes = take(dims * LANES), second.own_lanes = take(dims * LANES);
    first_scores = take(entries * LANES), second_scores = take(entries * LANES);
    first.rows = take(entries * dims), second.rows = take(entries * dims);
    rows = reinterpret_cast<int32_t*>(take(entries)), kept = reinterpret_cast<int32_t*>(take(entries));
    for (int32_t*& list : own) {
      list = reinterpret_cast<int32_t*>(take(entries * LANES));
    }
  }
};

}  // namespace sparse_attn::SPARSE_ATTN_ISA
