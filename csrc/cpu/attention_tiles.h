// The products of rows of bfloat16 on the processor's matrix unit. A tile gathers nothing, so a slice of the list at a
// time is brought into the order of tiles and then multiplied.
#pragma once

#include <utility>

#include "attention_bfloat16.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

constexpr int64_t TILE_BYTES = 64;  // of a row; a tile has 16
constexpr int64_t SLICE = 32;       // entries: two tiles of rows, one of weights
constexpr int OPERAND = 4;          // the tile that all products of a step share; 0 to 3 are their sums
constexpr int OTHER_OPERANDS[] = {5, 6, 7, 5};

// `BFloat16Side` with products of tiles.
struct TileSide : BFloat16Side {
  static constexpr bool TAKES_OWN_ENTRIES = false;
  float *copies, *tile_sums;  // where the pairs of `weighted_sums` lie at other times
  tile_unit::Tiles tiles;

  TileSide(const Call& call, const Head& head, int64_t, int64_t, float factor, const SideMemory& memory)
      : BFloat16Side(call, head, 0, 0, factor, memory),
        copies(memory.rows),
        tile_sums(memory.rows + SLICE / 2 * head.head_dim) {
  }

  // Rows [16][dims] times lanes [dims / 2][16][2] are [16][16].
  template <class Visit>
  SPARSE_ATTN_INLINE_MEMBER void lane_products(const Entries& list, Visit visit) const {
    for (int64_t first = 0; first < list.count; first += SLICE) {
      const int64_t count = std::min(SLICE, list.count - first);
      if (count > LANES) {
        product_tiles<2>(list.rows + first, count);
      } else {
        product_tiles<1>(list.rows + first, count);
      }
      for (int64_t i = 0; i < count; ++i) {
        visit(first + i, load(tile_sums + i * LANES) * factor);
      }
    }
  }

  // Weights [entries][16], writable up to a multiple of SLICE.
  void weighted_sums(float* weights, const Entries& list, const OutputRows& outputs) const {
    for (int64_t entry = list.count; entry % SLICE != 0; ++entry) {
      store(weights + entry * LANES, splat(0.0f));
    }
    for (int64_t first = 0; first < list.count; first += SLICE) {
      Floats block[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        const float* pair = weights + (first + 2 * i) * LANES;
        block[i] = weight_pair(load(pair), load(pair + LANES));
      }
      transpose(block);
      for (int64_t row = 0; row < LANES; ++row) {
        store(weight_pairs + (first / 2 + row) * LANES, block[row]);
      }
    }
    int64_t dim = 0;
    for (; dim + 2 * PAIRED_DIMS <= dims; dim += 2 * PAIRED_DIMS) {
      sums_from<4>(dim, list, outputs);
    }
    if (dim < dims) {
      sums_from<2>(dim, list, outputs);
    }
  }

 private:
  // `head.at` of a row, bfloat16 and contiguous.
  SPARSE_ATTN_INLINE_MEMBER const char* row_of(int64_t row) const {
    return head.data + 2 * row * head.row_stride;
  }

  // 16 rows at equal distances, the first `count` of them real; those that do not follow each other are copied, each
  // tile's to a place of its own.
  SPARSE_ATTN_INLINE_MEMBER Rows rows_in_turn(const int32_t* numbers, int64_t count, int64_t tile) const {
    if (count == LANES && numbers[count - 1] - numbers[0] == count - 1) {
      return {row_of(numbers[0]), 2 * head.row_stride};
    }
    const int64_t stride = 2 * dims;
    char* first_copy = reinterpret_cast<char*>(copies) + tile * LANES * stride;
    for (int64_t i = 0; i < count; ++i) {
      const char* row = row_of(numbers[i]);
      for (int64_t byte = 0; byte < stride; byte += TILE_BYTES) {
        std::memcpy(first_copy + i * stride + byte, row + byte, TILE_BYTES);
      }
    }
    return {first_copy, stride};
  }

  // The products of the next `count` rows, in COUNT tiles.
  template <int COUNT>
  SPARSE_ATTN_INLINE_MEMBER void product_tiles(const int32_t* numbers, int64_t count) const {
    Rows tile_rows[COUNT];
    for (int64_t tile = 0; tile < COUNT; ++tile) {
      tile_rows[tile] = rows_in_turn(numbers + tile * LANES, std::min<int64_t>(LANES, count - tile * LANES), tile);
    }
    for_each_tile<COUNT>([](auto tile) { tile_unit::zero<tile.value>(); });
    for (int64_t dim = 0; dim < dims; dim += PAIRED_DIMS) {
      tile_unit::load<OPERAND>(lanes + dim / 2 * LANES, TILE_BYTES);
      for_each_tile<COUNT>([&](auto tile) {
        constexpr int ROWS = OTHER_OPERANDS[tile.value];
        tile_unit::load<ROWS>(tile_rows[tile.value].data + 2 * dim, tile_rows[tile.value].stride);
        tile_unit::multiply_add<tile.value, ROWS, OPERAND>();
      });
    }
    for_each_tile<COUNT>(
        [&](auto tile) { tile_unit::store<tile.value>(tile_sums + tile.value * LANES * LANES, TILE_BYTES); });
  }

  // Rows of the slice from `first` on as pairs [16][WIDTH][2] of two entries each.
  template <int64_t WIDTH>
  SPARSE_ATTN_INLINE_MEMBER void interleave_slice(const Entries& list, int64_t first, int64_t dim) const {
    const int32_t* numbers = list.rows + first;
    const int64_t count = list.count - first;
    int32_t last_numbers[SLICE];
    if (count < SLICE) {  // weights beyond the end are zero, whatever the row
      std::fill(std::copy(numbers, numbers + count, last_numbers), last_numbers + SLICE, numbers[count - 1]);
      numbers = last_numbers;
    }
    for (int64_t entry = 0; entry < SLICE; entry += 2) {
      const char *even = row_of(numbers[entry]) + 2 * dim, *odd = row_of(numbers[entry + 1]) + 2 * dim;
      for (int64_t i = 0; i < WIDTH; i += PAIRED_DIMS) {
        interleave_quarters(even + 2 * i, odd + 2 * i, row_pairs + entry / 2 * WIDTH + i);
      }
    }
  }

  // Weights [16][entries] times rows [entries / 2][16 COUNT][2] are the sums of 16 COUNT dimensions.
  template <int COUNT>
  void sums_from(int64_t dim, const Entries& list, const OutputRows& outputs) const {
    constexpr int64_t WIDTH = COUNT * LANES;
    for_each_tile<COUNT>([](auto tile) { tile_unit::zero<tile.value>(); });
    for (int64_t first = 0; first < list.count; first += SLICE) {
      interleave_slice<WIDTH>(list, first, dim);
      tile_unit::load<OPERAND>(weight_pairs + first / 2 * LANES, TILE_BYTES);
      for_each_tile<COUNT>([&](auto tile) {
        constexpr int ROWS = OTHER_OPERANDS[tile.value];
        tile_unit::load<ROWS>(row_pairs + tile.value * LANES, 4 * WIDTH);
        tile_unit::multiply_add<tile.value, OPERAND, ROWS>();
      });
    }
    float* sums = row_pairs;  // whose last slice is multiplied
    for_each_tile<COUNT>([&](auto tile) { tile_unit::store<tile.value>(sums + tile.value * LANES, 4 * WIDTH); });
    for (int lane = 0; lane < LANES; ++lane) {
      if (outputs.stored >> lane & 1) {
        const float* from = sums + lane * WIDTH;
        const float lane_factor = outputs.factors[lane];
        char* to = outputs.head.data + 2 * ((outputs.first + lane) * outputs.head.row_stride + dim);
        for (int64_t i = 0; i < WIDTH; i += PAIRED_DIMS) {
          store_quarters(to + 2 * i, load(from + i) * lane_factor, load(from + i + LANES) * lane_factor);
        }
      }
    }
  }

  template <int COUNT, class Visit>
  static SPARSE_ATTN_INLINE_MEMBER void for_each_tile(Visit visit) {
    [&]<int... TILE>(std::integer_sequence<int, TILE...>) __attribute__((always_inline)) {
      (visit(std::integral_constant<int, TILE>{}), ...);
    }(std::make_integer_sequence<int, COUNT>{});
  }
};

}  // namespace sparse_attn::SPARSE_ATTN_ISA
