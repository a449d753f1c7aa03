// The two products of the forward pass on the processor's matrix unit, 32 keys at a time. Their operands are those of
// the products on pairs; a tile gathers nothing, so rows of keys that do not follow each other are copied first.
#pragma once

#include <utility>

#include "attention_bfloat16.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

constexpr int64_t TILE_KEYS = 32, TILE_BYTES = 64;

struct TileProducts : BFloat16Products {
  float* scratch;  // at least [16][dims]
  tile_unit::Tiles tiles;

  TileProducts(const Forward& call, const Sequence& sequence, const Task& task, const Workspace& space)
      : BFloat16Products(call, sequence, task, space), scratch(space.first_rows) {
  }

  // Keys [32][dims] times queries [dims / 2][16][2] are scores [32][16].
  template <class Visit>
  SPARSE_ATTN_INLINE_MEMBER void scores(const Entries& list, Visit visit) const {
    float* sums = value_pairs;  // free until `outputs`
    for (int64_t first = 0; first < list.count; first += TILE_KEYS) {
      const int64_t count = std::min(TILE_KEYS, list.count - first);
      const auto [rows, stride] = rows_in_turn(list.rows + first, count);
      const char* second_rows = rows + GROUP_ROWS * stride;
      tile_unit::zero<0>();
      tile_unit::zero<1>();
      for (int64_t dim = 0; dim < dims; dim += PAIRED_DIMS) {
        tile_unit::load<2>(lanes + dim / 2 * LANES, TILE_BYTES);
        tile_unit::load<3>(rows + 2 * dim, stride);
        tile_unit::multiply_add<0, 3, 2>();
        if (count > GROUP_ROWS) {
          tile_unit::load<4>(second_rows + 2 * dim, stride);
          tile_unit::multiply_add<1, 4, 2>();
        }
      }
      tile_unit::store<0>(sums, TILE_BYTES);
      tile_unit::store<1>(sums + GROUP_ROWS * LANES, TILE_BYTES);
      for (int64_t i = 0; i < count; ++i) {
        visit(first + i, load(sums + i * LANES) * factor);
      }
    }
  }

  void outputs(const float* weights, const Entries& list, const OutputRows& rows) const {
    for (int64_t first = 0; first < list.count; first += TILE_KEYS) {
      Floats block[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        const int64_t entry = first + 2 * i;
        block[i] = weight_pair(weight_or_zero(weights, list, entry), weight_or_zero(weights, list, entry + 1));
      }
      transpose(block);
      for (int64_t row = 0; row < LANES; ++row) {
        store(weight_pairs + (first / 2 + row) * LANES, block[row]);
      }
    }
    int64_t dim = 0;
    for (; dim + 2 * PAIRED_DIMS <= dims; dim += 2 * PAIRED_DIMS) {
      outputs_from<4>(dim, list, rows);
    }
    if (dim < dims) {
      outputs_from<2>(dim, list, rows);
    }
  }

 private:
  struct Bytes {
    const char* data;
    int64_t stride;
  };

  // 32 keys, `count` of them real, at equal distances.
  SPARSE_ATTN_INLINE_MEMBER Bytes rows_in_turn(const int32_t* numbers, int64_t count) const {
    if (count == TILE_KEYS && numbers[count - 1] - numbers[0] == count - 1) {
      return {keys.at(numbers[0], 0), 2 * keys.row_stride};
    }
    char* copies = reinterpret_cast<char*>(scratch);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t dim = 0; dim < dims; dim += PAIRED_DIMS) {
        std::memcpy(copies + 2 * (i * dims + dim), keys.at(numbers[i], dim), TILE_BYTES);
      }
    }
    return {copies, 2 * dims};
  }

  static SPARSE_ATTN_INLINE_MEMBER Floats weight_or_zero(const float* weights, const Entries& list, int64_t entry) {
    return entry < list.count ? load(weights + entry * LANES) : splat(0.0f);
  }

  // Weights [16][keys] times values [keys / 2][16 COUNT][2] are the outputs of 16 COUNT dimensions.
  template <int COUNT>
  void outputs_from(int64_t dim, const Entries& list, const OutputRows& rows) const {
    constexpr int64_t WIDTH = COUNT * LANES;
    for_each_tile<COUNT>([](auto tile) { tile_unit::zero<tile.value>(); });
    for (int64_t first = 0; first < list.count; first += TILE_KEYS) {
      for (int64_t pair = 0; pair < TILE_KEYS / 2; ++pair) {
        // Past the end of the list weights are zero, whatever the value; the last one's is as good as any.
        const int32_t a = list.rows[std::min(first + 2 * pair, list.count - 1)];
        const int32_t b = list.rows[std::min(first + 2 * pair + 1, list.count - 1)];
        for (int64_t i = 0; i < WIDTH; i += PAIRED_DIMS) {
          interleave(values.at(a, dim + i), values.at(b, dim + i), value_pairs + pair * WIDTH + i);
        }
      }
      tile_unit::load<4>(weight_pairs + first / 2 * LANES, TILE_BYTES);
      for_each_tile<COUNT>([&](auto tile) {
        tile_unit::load<5>(value_pairs + tile.value * LANES, 4 * WIDTH);
        tile_unit::multiply_add<tile.value, 4, 5>();
      });
    }
    for_each_tile<COUNT>([&](auto tile) { tile_unit::store<tile.value>(scratch + tile.value * LANES, 4 * WIDTH); });
    for (int lane = 0; lane < LANES; ++lane) {
      for (int64_t i = 0; i < WIDTH; i += LANES) {
        rows.row(lane, dim + i, load(scratch + lane * WIDTH + i));
      }
    }
  }

  template <int COUNT, class Visit>
  static SPARSE_ATTN_INLINE_MEMBER void for_each_tile(Visit visit) {
    [&]<int... TILE>(std::integer_sequence<int, TILE...>) {
      (visit(std::integral_constant<int, TILE>{}), ...);
    }(std::make_integer_sequence<int, COUNT>{});
  }
};

}  // namespace sparse_attn::SPARSE_ATTN_ISA
