// Attention over column lists for groups of 16 query rows (or keys), as many at a time as a vector has lanes: a row in
// each. Scores lie as [entry][lane], so a softmax is vertical, a row bit is a lane's mask, and gathering a key costs
// nothing: its elements are broadcast. Compiled once for each instruction set.
#pragma once

#include "attention_own.h"

#if defined(SPARSE_ATTN_TILE_PRODUCTS)
#include "attention_tiles.h"
#elif defined(SPARSE_ATTN_BFLOAT16_PRODUCTS)
#include "attention_bfloat16.h"
#else
#include "attention_floats.h"
#endif

namespace sparse_attn::SPARSE_ATTN_ISA {

#if defined(SPARSE_ATTN_TILE_PRODUCTS)
using Side = TileSide;
#elif defined(SPARSE_ATTN_BFLOAT16_PRODUCTS)
using Side = BFloat16Side;
#else
using Side = FloatSide;
#endif

// Where a part of a group begins: with lane 0 in row `shift` of the group.
constexpr int shift_of(int64_t part) {
  return static_cast<int>(part % PARTS) * LANES;
}

// The keys that a part of a group of queries meets, with a bit for each lane that keeps them. Keys that padding or
// causality hides are left out.
inline Entries keys_of_part(
    const Call& call, const Lists& lists, const Task& task, int64_t part, int64_t keys_end, Workspace& space) {
  const int64_t group = part / PARTS, first_row = group * GROUP_ROWS;
  const Entries list =
      entries_of(lists, task.head, group, call.causal ? std::min(keys_end, first_row + GROUP_ROWS) : keys_end);
  if (!call.causal && !call.key_padding && (PARTS == 1 || !list.kept)) {
    return list;
  }
  const uint8_t* padding = call.key_padding ? call.key_padding + task.batch * call.key_len : nullptr;
  int64_t count = 0;
  for (int64_t entry = 0; entry < list.count; ++entry) {
    const int32_t key = list.rows[entry];
    const uint32_t visible = call.causal ? bits_between(first_row, GROUP_ROWS, key, first_row + GROUP_ROWS) : ALL_ROWS;
    const uint32_t kept = visible & (list.kept ? list.kept[entry] : ALL_ROWS);
    space.rows[count] = key;
    space.kept[count] = static_cast<int32_t>(kept >> shift_of(part) & ALL_LANES);
    count += space.kept[count] != 0 && (!padding || padding[key]);
  }
  return {space.rows, space.kept, count};
}

// The queries that the lanes `alive` of a part of a group of keys meet, as rows of the sequence, likewise.
inline Entries queries_of_part(
    const Call& call,
    const Lists& lists,
    const Task& task,
    int64_t part,
    uint32_t alive,
    int64_t rows_end,
    Workspace& space) {
  const int64_t group = part / PARTS, first_key = group * GROUP_ROWS;
  const Entries list = entries_of(lists, task.head, group, rows_end + call.query_offset);
  int64_t count = 0;
  for (int64_t entry = 0; entry < list.count; ++entry) {
    const int64_t position = list.rows[entry];
    const uint32_t visible = call.causal ? bits_between(first_key, GROUP_ROWS, first_key, position + 1) : ALL_ROWS;
    const uint32_t kept = visible & (list.kept ? list.kept[entry] : ALL_ROWS);
    space.rows[count] = static_cast<int32_t>(position - call.query_offset);
    space.kept[count] = static_cast<int32_t>(kept >> shift_of(part) & alive);
    count += space.kept[count] != 0 && position >= call.query_offset;
  }
  return {space.rows, space.kept, count};
}

// Lanes that keep an entry; the others become `otherwise`.
SPARSE_ATTN_INLINE Floats kept_or(const Entries& list, int64_t entry, Floats lanes, float otherwise) {
  return list.kept ? select(list.kept[entry], lanes, splat(otherwise)) : lanes;
}

SPARSE_ATTN_INLINE void prefetch_list(const Lists& lists, int64_t head, int64_t group) {
  if (group >= lists.groups) {
    return;
  }
  const int32_t* stops = lists.stops + (head * lists.groups + group) * (lists.blocks + 1);
  for (int64_t entry = stops[0]; entry < stops[lists.blocks]; entry += 16) {
    __builtin_prefetch(lists.columns + entry);
    if (!lists.full) {
      __builtin_prefetch(lists.row_bits + entry);
    }
  }
}

// While the rows from `first` on are computed, the next ones of the inputs, as far as `end`, and the lines of the
// outputs, as far as `stored_end`, come into the cache.
template <size_t INPUTS, size_t OUTPUTS>
SPARSE_ATTN_INLINE void prefetch_around(
    int64_t first,
    const Head* const (&inputs)[INPUTS],
    int64_t end,
    const Head* const (&outputs)[OUTPUTS],
    int64_t stored_end) {
  const int64_t next = first + LANES;
  for (const Head* input : inputs) {
    prefetch_rows(*input, std::max<int64_t>(next, 0), std::min(next + LANES, end));
  }
  for (const Head* output : outputs) {
    prefetch_rows(*output, std::max<int64_t>(first, 0), std::min(next, stored_end));
  }
}

// Products and sums of own entries, of sides that take them; others are given none.
template <Order ORDER, class Side>
SPARSE_ATTN_INLINE void own_products_of(
    const Side& side, const Head& other, int64_t first_row, uint32_t alive, const OwnEntries& own, float* scores) {
  if constexpr (Side::TAKES_OWN_ENTRIES) {
    if (own.slots > 0) {
      side.template own_products<ORDER>(other, first_row, alive, own, scores);
    }
  }
}

template <Order ORDER, class Side>
SPARSE_ATTN_INLINE void weighted_sums_of(
    const Side& side, float* weights, const Entries& list, const OwnEntries& own, const OutputRows& outputs) {
  if constexpr (Side::TAKES_OWN_ENTRIES) {
    side.template weighted_sums<ORDER>(weights, list, own, outputs);
  } else {
    side.weighted_sums(weights, list, outputs);
  }
}

inline void forward(const Forward& call, const Task& task, float* memory) {
  Workspace space(call, memory);
  const Sequence sequence = sequence_of(call, task.batch);
  const Head query = head_of(call, call.query, sequence, task.head);
  const Head output = head_of(call, call.output, sequence, task.head);
  const int64_t key_count = sequence.keys_end;
  const bool divided = Side::TAKES_OWN_ENTRIES && divided_are_faster(call.divided, key_count);
  const Lists& lists = divided ? call.divided : call.lists;
  const int64_t uses = uses_of(lists, task, key_count) + (divided ? own_uses_of(call.divided, task) : 0);
  const Side keys(
      call, head_of(call, call.key, sequence, task.head), key_count, uses, call.scale * LOG2_E, space.first);
  const Side values(call, head_of(call, call.value, sequence, task.head), key_count, uses, 1.0f, space.second);
  const RowNumbers numbers(call, sequence, task.batch, task.head);
  const bool rounds = call.rounding.count > 0;
  const RoundToLevels round_to_levels(call.rounding);
  const Floats minus_infinity = splat(-std::numeric_limits<float>::infinity());
  float* scores = space.first_scores;

  for (int64_t part = task.first * PARTS; part < task.end * PARTS; ++part) {
    const int64_t first_row = part * LANES - call.query_offset;
    const uint32_t alive = bits_between(first_row, LANES, 0, sequence.rows_end);
    const uint32_t stored = bits_between(first_row, LANES, 0, sequence.rows_stored);
    Entries list{nullptr, nullptr, 0};
    OwnEntries own{};
    if (alive) {
      list = keys_of_part(call, lists, task, part, sequence.keys_end, space);
      keys.set_lanes(query, first_row, alive);
      if (divided) {
        own = own_entries_of_part(call, call.divided, task, part, sequence.keys_end, space.own);
      }
    }
    prefetch_list(lists, task.head, part / PARTS + 1);
    prefetch_around(first_row, {&query}, sequence.rows_end, {&output}, sequence.rows_stored);

    Floats highest = minus_infinity;
    keys.lane_products(list, [&](int64_t entry, Floats score) __attribute__((always_inline)) {
      score = kept_or(list, entry, score, -std::numeric_limits<float>::infinity());
      highest = maximum(score, highest);
      store(scores + entry * LANES, score);
    });
    own_products_of<Order::Slots>(keys, query, first_row, alive, own, scores + list.count * LANES);
    const int64_t count = list.count + own.slots;
    for (int64_t slot = list.count; slot < count; ++slot) {
      highest = maximum(load(scores + slot * LANES), highest);
    }
    highest = highest == minus_infinity ? splat(0.0f) : highest;  // a row without keys: nothing becomes NaN
    Floats sum = splat(0.0f);
    for (int64_t entry = 0; entry < count; ++entry) {
      const Floats p = exp2_of(load(scores + entry * LANES) - highest);
      sum += p;
      if (!rounds) {
        store(scores + entry * LANES, p);
      }
    }
    const Floats real = sum == 0.0f ? splat(1.0f) : sum;  // NaN stays
    Floats normaliser = 1.0f / real;
    if (rounds || call.lse) {
      const Floats lse2 = highest + log2_of(real);
      if (call.lse) {
        float* lse = call.lse + sequence.index * call.lse_batch + task.head * call.lse_head + sequence.first_token;
        const Floats natural = select(alive, sum == 0.0f ? minus_infinity : lse2 * LN_2, minus_infinity);
        for (int lane = 0; lane < LANES; ++lane) {
          if (stored >> lane & 1) {
            lse[first_row + lane] = natural[lane];
          }
        }
      }
      if (rounds) {
        normaliser = 1.0f + real * 0.0f;  // levels know no NaN
        for (int64_t entry = 0; entry < count; ++entry) {
          store(scores + entry * LANES, round_to_levels(load(scores + entry * LANES) - lse2));
        }
      }
    }
    if (call.dropout.threshold > 0) {
      const Words words = row_words(
          call.dropout, counting_from(0) * numbers.step + (numbers.first + numbers.step * uint32_t(first_row)));
      for (int64_t entry = 0; entry < list.count; ++entry) {
        const Floats factors = dropout_factors(call.dropout, words, splat_word(uint32_t(list.rows[entry])));
        store(scores + entry * LANES, load(scores + entry * LANES) * factors);
      }
      drop_own(call.dropout, words, own, scores + list.count * LANES);
    }
    normaliser = select(alive, normaliser, splat(0.0f));  // padding rows yield zeros
    const OutputRows outputs(output, first_row, stored, normaliser);
    weighted_sums_of<Order::Slots>(values, scores, list, own, outputs);
  }
}

// dq of a group of queries, and delta = rowsum(p * dp) of its rows for `backward_key_value`.
inline void backward_query(const Backward& call, const Task& task, float* memory) {
  Workspace space(call, memory);
  const Sequence sequence = sequence_of(call, task.batch);
  const Head query = head_of(call, call.query, sequence, task.head);
  const Head grad_output = head_of(call, call.grad_output, sequence, task.head);
  const Head grad_query = head_of(call, call.grad_query, sequence, task.head);
  const int64_t key_count = sequence.keys_end, uses = uses_of(call.lists, task, key_count);
  const Side keys(
      call, head_of(call, call.key, sequence, task.head), key_count, uses, call.scale * LOG2_E, space.first);
  const Side values(call, head_of(call, call.value, sequence, task.head), key_count, uses, 1.0f, space.second);
  const RowNumbers numbers(call, sequence, task.batch, task.head);
  const int64_t row_start = sequence.index * call.lse_batch + task.head * call.lse_head + sequence.first_token;
  float *probabilities = space.first_scores, *grad_probabilities = space.second_scores;

  for (int64_t part = task.first * PARTS; part < task.end * PARTS; ++part) {
    const int64_t first_row = part * LANES - call.query_offset;
    const uint32_t alive = bits_between(first_row, LANES, 0, sequence.rows_end);
    const uint32_t stored = bits_between(first_row, LANES, 0, sequence.rows_stored);
    Entries list{nullptr, nullptr, 0};
    Floats lse2 = splat(0.0f);
    if (alive) {
      list = keys_of_part(call, call.lists, task, part, sequence.keys_end, space);
      keys.set_lanes(query, first_row, alive);
      values.set_lanes(grad_output, first_row, alive);
      for (int lane = 0; lane < LANES; ++lane) {
        const float lse = alive >> lane & 1 ? call.lse[row_start + first_row + lane] : 0.0f;
        lse2[lane] = std::isinf(lse) ? 0.0f : lse * LOG2_E;
      }
    }
    prefetch_list(call.lists, task.head, part / PARTS + 1);
    prefetch_around(first_row, {&query, &grad_output}, sequence.rows_end, {&grad_query}, sequence.rows_stored);
    keys.lane_products(list, [&](int64_t entry, Floats score) __attribute__((always_inline)) {
      store(probabilities + entry * LANES, kept_or(list, entry, exp2_of(score - lse2), 0.0f));
    });
    const Words words =
        row_words(call.dropout, counting_from(0) * numbers.step + (numbers.first + numbers.step * uint32_t(first_row)));
    Floats delta = splat(0.0f);
    values.lane_products(list, [&](int64_t entry, Floats dp) __attribute__((always_inline)) {
      if (call.dropout.threshold > 0) {
        dp *= dropout_factors(call.dropout, words, splat_word(uint32_t(list.rows[entry])));
      }
      delta += load(probabilities + entry * LANES) * dp;
      store(grad_probabilities + entry * LANES, dp);
    });
    for (int64_t entry = 0; entry < list.count; ++entry) {
      const Floats dp = load(grad_probabilities + entry * LANES);
      store(probabilities + entry * LANES, load(probabilities + entry * LANES) * (dp - delta));
    }
    for (int lane = 0; lane < LANES; ++lane) {
      if (stored >> lane & 1) {
        call.delta[row_start + first_row + lane] = delta[lane];
      }
    }
    keys.weighted_sums(probabilities, list, {grad_query, first_row, stored, splat(call.scale)});
  }
}

// dk and dv of a group of keys: lanes are keys, entries are queries.
inline void backward_key_value(const Backward& call, const Task& task, float* memory) {
  Workspace space(call, memory);
  const Sequence sequence = sequence_of(call, task.batch);
  const Head key = head_of(call, call.key, sequence, task.head);
  const Head value = head_of(call, call.value, sequence, task.head);
  const Head grad_key = head_of(call, call.grad_key, sequence, task.head);
  const Head grad_value = head_of(call, call.grad_value, sequence, task.head);
  const int64_t row_count = sequence.rows_end;
  const bool divided = Side::TAKES_OWN_ENTRIES && divided_are_faster(call.divided, row_count) && !call.causal &&
                       !call.key_padding && call.query_offset == 0;
  const int64_t uses = divided ? uses_of(call.divided, task, row_count) + own_uses_of(call.divided, task)
                               : uses_of(call.transposed, task, row_count + call.query_offset);
  const Side queries(
      call, head_of(call, call.query, sequence, task.head), row_count, uses, call.scale * LOG2_E, space.first);
  const Side grads(call, head_of(call, call.grad_output, sequence, task.head), row_count, uses, 1.0f, space.second);
  const RowNumbers numbers(call, sequence, task.batch, task.head);
  const RoundToLevels round_to_levels(call.rounding);
  const int64_t row_start = sequence.index * call.lse_batch + task.head * call.lse_head + sequence.first_token;
  const uint8_t* padding = call.key_padding ? call.key_padding + task.batch * call.key_len : nullptr;
  float *used = space.first_scores, *grad_scores = space.second_scores;
  const auto lse2_of = [&](int32_t row) __attribute__((always_inline)) {
    const float lse = call.lse[row_start + row];
    return std::isinf(lse) ? 0.0f : lse * LOG2_E;
  };
  const auto delta_of = [&](int32_t row) __attribute__((always_inline)) { return call.delta[row_start + row]; };

  for (int64_t part = task.first * PARTS; part < task.end * PARTS; ++part) {
    const int64_t first_key = part * LANES;
    const uint32_t stored = bits_between(first_key, LANES, 0, sequence.keys_stored);
    uint32_t alive = bits_between(first_key, LANES, 0, sequence.keys_end);
    for (int lane = 0; padding && lane < LANES; ++lane) {
      if (alive >> lane & 1 && !padding[first_key + lane]) {
        alive &= ~(1u << lane);
      }
    }
    Entries list{nullptr, nullptr, 0};
    OwnEntries own{};
    const bool divided_here = divided && alive == ALL_LANES;
    const Lists& lists = divided_here ? call.divided : call.transposed;
    if (alive) {
      list = queries_of_part(call, lists, task, part, alive, sequence.rows_end, space);
      if (divided_here) {
        own = own_entries_of_part(call, call.divided, task, part, sequence.rows_end, space.own);
      }
      queries.set_lanes(key, first_key, alive);
      grads.set_lanes(value, first_key, alive);
    }
    prefetch_list(lists, task.head, part / PARTS + 1);
    prefetch_around(first_key, {&key, &value}, sequence.keys_end, {&grad_key, &grad_value}, sequence.keys_stored);
    queries.lane_products(list, [&](int64_t entry, Floats score) __attribute__((always_inline)) {
      const Floats log2_p = score - lse2_of(list.rows[entry]);
      const Floats p = exp2_of(log2_p);
      store(grad_scores + entry * LANES, kept_or(list, entry, p, 0.0f));
      if (call.rounding.count > 0) {
        // Levels know no NaN.
        store(used + entry * LANES, kept_or(list, entry, round_to_levels(log2_p) + p * 0.0f, 0.0f));
      }
    });
    grads.lane_products(list, [&](int64_t entry, Floats dp) __attribute__((always_inline)) {
      const int32_t row = list.rows[entry];
      const Floats p = load(grad_scores + entry * LANES);
      Floats weight = call.rounding.count > 0 ? load(used + entry * LANES) : p;
      if (call.dropout.threshold > 0) {
        const Words words = row_words(call.dropout, splat_word(numbers.first + numbers.step * uint32_t(row)));
        const Floats factors = dropout_factors(call.dropout, words, counting_from(uint32_t(first_key)));
        weight *= factors;
        dp *= factors;
      }
      store(used + entry * LANES, weight);
      store(grad_scores + entry * LANES, p * (dp - delta_of(row)));
    });
    float *own_used = used + list.count * LANES, *own_grads = grad_scores + list.count * LANES;
    own_products_of<Order::Lanes>(queries, key, first_key, alive, own, own_used);
    own_products_of<Order::Lanes>(grads, value, first_key, alive, own, own_grads);
    visit_own(own, [&](int lane, const Names& rows, int64_t at, uint32_t which) __attribute__((always_inline)) {
      const Floats log2_p = load(own_used + at) - gathered(rows, lse2_of);
      const Floats p = exp2_of(log2_p);
      Floats weight = call.rounding.count > 0 ? round_to_levels(log2_p) + p * 0.0f : p;
      Floats dp = load(own_grads + at);
      if (call.dropout.threshold > 0) {
        const Words words = row_words(call.dropout, load_words(rows) * numbers.step + numbers.first);
        const Floats factors = dropout_factors(call.dropout, words, splat_word(uint32_t(first_key + lane)));
        weight *= factors;
        dp *= factors;
      }
      store_some(own_used + at, which, weight);
      store_some(own_grads + at, which, p * (dp - gathered(rows, delta_of)));
    });
    weighted_sums_of<Order::Lanes>(grads, used, list, own, {grad_value, first_key, stored, splat(1.0f)});
    weighted_sums_of<Order::Lanes>(queries, grad_scores, list, own, {grad_key, first_key, stored, splat(call.scale)});
  }
}

#if defined(SPARSE_ATTN_TILE_PRODUCTS) || defined(SPARSE_ATTN_BFLOAT16_PRODUCTS)
// Rows that are no pairs of bfloat16 are left to the kernels for AVX-512, which such processors have too.
inline void forward_any(const Forward& call, const Task& task, float* memory) {
  (rows_are_pairs(call) ? forward : AVX512_KERNELS.forward)(call, task, memory);
}

inline void backward_query_any(const Backward& call, const Task& task, float* memory) {
  (rows_are_pairs(call) ? backward_query : AVX512_KERNELS.backward_query)(call, task, memory);
}

inline void backward_key_value_any(const Backward& call, const Task& task, float* memory) {
  (rows_are_pairs(call) ? backward_key_value : AVX512_KERNELS.backward_key_value)(call, task, memory);
}
#endif

}  // namespace sparse_attn::SPARSE_ATTN_ISA
