// The products of rows of bfloat16, in pairs and summed in float32: AVX512-BF16's dot products take two elements at a
// time, so both factors lie in pairs. Lanes are rows of the other side, as in the float32 kernels.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <initializer_list>

#include "attention_own.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

constexpr int64_t PAIRED_DIMS = 2 * LANES;  // what a register of pairs holds

// Adds the products of pairs of bfloat16.
SPARSE_ATTN_INLINE Floats add_products_of_pairs(Floats sum, Floats a, Floats b) {
  return reinterpret_cast<Floats>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

// Words that are pairs of bfloat16, like `FloatWords`: both products are added.
struct PairWords {
  static SPARSE_ATTN_INLINE_MEMBER Floats add_product(Floats sum, Floats lanes, const void* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    return add_products_of_pairs(sum, lanes, reinterpret_cast<Floats>(Ints{} + bits));
  }
};

// Two weights as a pair of bfloat16 in each lane; halves are rounded away from zero.
SPARSE_ATTN_INLINE Floats weight_pair(Floats first, Floats second) {
  const Words low = (reinterpret_cast<Words>(first) + 0x8000) >> 16;
  const Words high = (reinterpret_cast<Words>(second) + 0x8000) & 0xffff0000;
  return reinterpret_cast<Floats>(low | high);
}

// Rows from `first` on as pairs, transposed to [head_dim / 2][16]; zeros in lanes that are not alive.
inline void load_pair_lanes(const Head& head, int64_t first, uint32_t alive, float* lanes) {
  for (int64_t dim = 0; dim < head.head_dim; dim += PAIRED_DIMS) {
    Floats block[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      block[lane] = alive >> lane & 1 ? load(reinterpret_cast<const float*>(head.at(first + lane, dim))) : splat(0.0f);
    }
    transpose(block);
    for (int i = 0; i < LANES; ++i) {
      store(lanes + (dim / 2 + i) * LANES, block[i]);
    }
  }
}

// PAIRED_DIMS elements of two rows as pairs of one element from each.
SPARSE_ATTN_INLINE void interleave(const void* first, const void* second, float* pairs) {
  using Halves = uint16_t __attribute__((vector_size(64)));
  Halves a, b;
  std::memcpy(&a, first, sizeof a);
  std::memcpy(&b, second, sizeof b);
  // clang-format off
  const Halves low = __builtin_shufflevector(
      a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14,
      46, 15, 47);
  const Halves high = __builtin_shufflevector(
      a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29,
      61, 30, 62, 31, 63);
  // clang-format on
  store(pairs, reinterpret_cast<Floats>(low));
  store(pairs + LANES, reinterpret_cast<Floats>(high));
}

// The same within quarters of a register, which takes half the time: the first register has elements 0 to 3, 8 to 11,
// 16 to 19 and 24 to 27, the second the others.
SPARSE_ATTN_INLINE void interleave_quarters(const void* first, const void* second, float* pairs) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_storeu_si512(pairs, _mm512_unpacklo_epi16(a, b));
  _mm512_storeu_si512(pairs + LANES, _mm512_unpackhi_epi16(a, b));
}

// PAIRED_DIMS elements in the order of `interleave_quarters` as bfloat16 in natural order.
SPARSE_ATTN_INLINE void store_quarters(void* to, Floats first, Floats second) {
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  using EighthParts = int64_t __attribute__((vector_size(64)));
  const EighthParts parts = reinterpret_cast<EighthParts>(both);
  const EighthParts in_order = __builtin_shufflevector(parts, parts, 0, 4, 1, 5, 2, 6, 3, 7);
  std::memcpy(to, &in_order, sizeof in_order);
}

// Rows in pairs as they are, [LANES][head_dim / 2]; zeros in lanes that are not alive.
inline void load_pair_rows(const Head& head, int64_t first, uint32_t alive, float* rows) {
  for (int lane = 0; lane < LANES; ++lane) {
    for (int64_t dim = 0; dim < head.head_dim; dim += PAIRED_DIMS, rows += LANES) {
      store(rows, alive >> lane & 1 ? load(reinterpret_cast<const float*>(head.at(first + lane, dim))) : splat(0.0f));
    }
  }
}

// What `FloatRow` is, for rows of bfloat16.
struct PairRow {
  static constexpr int LEAST_VECTORS = 2;

  static SPARSE_ATTN_INLINE_MEMBER Floats add_products(Floats sum, Floats a, Floats b) {
    return add_products_of_pairs(sum, a, b);
  }

  template <int VECTORS, int64_t STEP>
  static SPARSE_ATTN_INLINE_MEMBER void sum(
      const float* weights, int64_t dim, Rows rows, const int32_t* names, int64_t count, float* sums) {
    Floats sum[VECTORS];
#pragma GCC unroll 4
    for (int vector = 0; vector < VECTORS; ++vector) {
      sum[vector] = splat(0.0f);
    }
    for (int64_t index = 0; index < count; index += 2) {
      const int64_t next = std::min(index + 1, count - 1);
      const char *row = rows.at(names[index]) + 2 * dim, *next_row = rows.at(names[next]) + 2 * dim;
      const Floats next_weight = splat(next > index ? weights[next * STEP] : 0.0f);
      const Floats weight = weight_pair(splat(weights[index * STEP]), next_weight);
#pragma GCC unroll 2
      for (int vector = 0; vector < VECTORS; vector += 2) {
        float pairs[PAIRED_DIMS];
        interleave(row + 2 * vector * LANES, next_row + 2 * vector * LANES, pairs);
        sum[vector] = add_products(sum[vector], weight, load(pairs));
        sum[vector + 1] = add_products(sum[vector + 1], weight, load(pairs + LANES));
      }
    }
#pragma GCC unroll 4
    for (int vector = 0; vector < VECTORS; ++vector) {
      store(sums + vector * LANES, sum[vector]);
    }
  }
};

// Whether a call's rows are bfloat16 that fill registers of pairs.
inline bool rows_are_pairs(const Call& call, std::initializer_list<Matrix> matrices) {
  return call.element == Element::BFloat16 && call.head_dim % PAIRED_DIMS == 0 &&
         std::all_of(matrices.begin(), matrices.end(), [](const Matrix& matrix) { return matrix.dim == 1; });
}

inline bool rows_are_pairs(const Forward& call) {
  return rows_are_pairs(call, {call.query, call.key, call.value, call.output});
}

inline bool rows_are_pairs(const Backward& call) {
  return rows_are_pairs(
      call, {call.query, call.key, call.value, call.grad_output, call.grad_query, call.grad_key, call.grad_value});
}

// What `FloatSide` (attention_floats.h) is for rows of float32, for rows in pairs.
struct BFloat16Side {
  static constexpr bool TAKES_OWN_ENTRIES = true;
  int64_t dims;
  float factor;
  Head head;
  Rows rows;
  float *lanes, *own_lanes, *weight_pairs, *row_pairs;

  BFloat16Side(const Call& call, const Head& head, int64_t, int64_t, float factor, const SideMemory& memory)
      : dims(head.head_dim),
        factor(factor),
        head(head),
        rows{head.data, 2 * head.row_stride},
        lanes(memory.lanes),
        own_lanes(memory.own_lanes),
        weight_pairs(memory.rows),
        row_pairs(memory.rows + Workspace::length(call) / 2 * LANES) {
  }

  void set_lanes(const Head& other, int64_t first_row, uint32_t alive) const {
    load_pair_lanes(other, first_row, alive, lanes);
  }

  template <class Visit>
  SPARSE_ATTN_INLINE_MEMBER void lane_products(const Entries& list, Visit visit) const {
    products<PairWords>(lanes, dims / 2, rows, list, [&](int64_t entry, Floats sum) __attribute__((always_inline)) {
      visit(entry, sum * factor);
    });
  }

  template <Order ORDER>
  void own_products(const Head& other, int64_t first_row, uint32_t alive, const OwnEntries& own, float* scores) const {
    load_pair_rows(other, first_row, alive, own_lanes);
    sparse_attn::SPARSE_ATTN_ISA::own_products<ORDER, PairRow>(own_lanes, dims / 2, rows, own, factor, scores);
  }

  template <Order ORDER>
  SPARSE_ATTN_INLINE_MEMBER void weighted_sums(
      const float* weights, const Entries& list, const OwnEntries& own, const OutputRows& outputs) const {
    if (own.slots > 0) {
      own_sums<ORDER, PairRow>(weights + list.count * LANES, dims, rows, own, own_lanes);
    }
    const int64_t pairs = (list.count + 1) / 2;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t first = 2 * pair, second = std::min(first + 1, list.count - 1);
      const Floats second_weight = second > first ? load(weights + second * LANES) : splat(0.0f);
      store(weight_pairs + pair * LANES, weight_pair(load(weights + first * LANES), second_weight));
      for (int64_t dim = 0; dim < dims; dim += PAIRED_DIMS) {
        interleave(head.at(list.rows[first], dim), head.at(list.rows[second], dim), row_pairs + pair * dims + dim);
      }
    }
    const auto pair_row = [&](int64_t pair) __attribute__((always_inline)) { return row_pairs + pair * dims; };
    weighted_rows<PairWords>(weight_pairs, pairs, dims, pair_row, outputs, own.slots > 0 ? own_lanes : nullptr);
  }

  SPARSE_ATTN_INLINE_MEMBER void weighted_sums(
      const float* weights, const Entries& list, const OutputRows& outputs) const {
    weighted_sums<Order::Slots>(weights, list, OwnEntries{}, outputs);
  }
};

}  // namespace sparse_attn::SPARSE_ATTN_ISA
