// The products of rows of float32, or of rows converted to it.
#pragma once

#include "attention_own.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

// A head's rows that the entries of a list name, and their two products: with lanes, which are rows of the other side,
// and weighted, summed over the entries.
struct FloatSide {
  static constexpr bool TAKES_OWN_ENTRIES = true;
  int64_t dims;
  float factor;
  float* lanes;
  float* own_lanes;  // [LANES][dims]: lanes as rows for own products, or sums of own entries
  Rows rows;

  // `count`: of rows; `uses`: how often lists name one, all together; `factor`: of the products with lanes.
  FloatSide(const Call&, const Head& head, int64_t count, int64_t uses, float factor, const SideMemory& memory)
      : dims(padded_dim(head.head_dim)),
        factor(factor),
        lanes(memory.lanes),
        own_lanes(memory.own_lanes),
        rows(float_rows_of(head, count, uses, memory.rows)) {
  }

  void set_lanes(const Head& other, int64_t first_row, uint32_t alive) const {
    load_lanes(other, first_row, alive, factor, lanes);
  }

  // visit(entry, [LANES]) for each entry.
  template <class Visit>
  SPARSE_ATTN_INLINE_MEMBER void lane_products(const Entries& list, Visit visit) const {
    products(lanes, dims, rows, list, visit);
  }

  // To scores; lanes are rows of `other`, from first_row on.
  template <Order ORDER>
  void own_products(const Head& other, int64_t first_row, uint32_t alive, const OwnEntries& own, float* scores) const {
    load_rows(other, first_row, alive, own_lanes);
    sparse_attn::SPARSE_ATTN_ISA::own_products<ORDER, FloatRow>(own_lanes, dims, rows, own, factor, scores);
  }

  // Weights [entries][LANES], then those of own entries.
  template <Order ORDER>
  SPARSE_ATTN_INLINE_MEMBER void weighted_sums(
      const float* weights, const Entries& list, const OwnEntries& own, const OutputRows& outputs) const {
    const auto row_of = [&](int64_t entry) __attribute__((always_inline)) { return rows.at(list.rows[entry]); };
    if (own.slots > 0) {
      own_sums<ORDER, FloatRow>(weights + list.count * LANES, dims, rows, own, own_lanes);
    }
    weighted_rows(weights, list.count, dims, row_of, outputs, own.slots > 0 ? own_lanes : nullptr);
  }

  // Weights [entries][LANES].
  SPARSE_ATTN_INLINE_MEMBER void weighted_sums(
      const float* weights, const Entries& list, const OutputRows& outputs) const {
    weighted_sums<Order::Slots>(weights, list, OwnEntries{}, outputs);
  }
};

}  // namespace sparse_attn::SPARSE_ATTN_ISA
