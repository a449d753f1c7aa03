// The two products of the forward pass on the processor's matrix unit. A tile gathers nothing, so a slice of the list
// at a time is brought into the order of tiles and then multiplied.
#pragma once

#include <utility>

#include "attention_bfloat16.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

constexpr int64_t TILE_BYTES = 64;  // of a row; a tile has 16
constexpr int64_t SLICE_KEYS = 32;  // two tiles of keys, one of weights
constexpr int OPERAND = 4;          // the tile that all products of a step share; 0 to 3 are their sums
constexpr int OTHER_OPERANDS[] = {5, 6, 7, 5};

struct TileProducts : BFloat16Products {
  float *sums, *scratch;  // sums: [entries up to a multiple of SLICE_KEYS][16]
  tile_unit::Tiles tiles;

  static bool fit(const Forward& call) {
    return BFloat16Products::fit(call) && call.output.dim == 1;
  }
  TileProducts(const Forward& call, const Sequence& sequence, const Task& task, const Workspace& space)
      : BFloat16Products(call, sequence, task, space), sums(space.first_scores), scratch(space.first_rows) {
  }

  // Keys [16][dims] times queries [dims / 2][16][2] are scores [16][16].
  template <class Visit>
  SPARSE_ATTN_INLINE_MEMBER void scores(const Entries& list, Visit visit) const {
    for (int64_t first = 0; first < list.count; first += SLICE_KEYS) {
      const int64_t count = std::min(SLICE_KEYS, list.count - first);
      if (count > LANES) {
        score_tiles<2>(list.rows + first, count, sums + first * LANES);
      } else {
        score_tiles<1>(list.rows + first, count, sums + first * LANES);
      }
      for (int64_t entry = first; entry < first + count; ++entry) {
        visit(entry, load(sums + entry * LANES) * factor);
      }
    }
  }

  // Weights [entries][16], writable up to a multiple of SLICE_KEYS.
  void outputs(float* weights, const Entries& list, const OutputRows& rows) const {
    for (int64_t entry = list.count; entry % SLICE_KEYS != 0; ++entry) {
      store(weights + entry * LANES, splat(0.0f));
    }
    for (int64_t first = 0; first < list.count; first += SLICE_KEYS) {
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
      outputs_from<4>(dim, list, rows);
    }
    if (dim < dims) {
      outputs_from<2>(dim, list, rows);
    }
  }

 private:
  // `head.at` of a row, bfloat16 and contiguous.
  static SPARSE_ATTN_INLINE_MEMBER const char* row_of(const Head& head, int64_t row) {
    return head.data + 2 * row * head.row_stride;
  }

  // 16 keys at equal distances, the first `count` of them real; those that do not follow each other are copied to the
  // place of tile `tile`.
  SPARSE_ATTN_INLINE_MEMBER Rows rows_in_turn(const int32_t* numbers, int64_t count, int64_t tile) const {
    if (count == LANES && numbers[count - 1] - numbers[0] == count - 1) {
      return {row_of(keys, numbers[0]), 2 * keys.row_stride};
    }
    const int64_t stride = 2 * dims;
    char* copies = reinterpret_cast<char*>(scratch) + tile * LANES * stride;
    for (int64_t i = 0; i < count; ++i) {
      const char* row = row_of(keys, numbers[i]);
      for (int64_t byte = 0; byte < stride; byte += TILE_BYTES) {
        std::memcpy(copies + i * stride + byte, row + byte, TILE_BYTES);
      }
    }
    return {copies, stride};
  }

  // The scores of the next `count` keys, in COUNT tiles.
  template <int COUNT>
  SPARSE_ATTN_INLINE_MEMBER void score_tiles(const int32_t* numbers, int64_t count, float* to) const {
    Rows tile_rows[COUNT];
    for (int64_t tile = 0; tile < COUNT; ++tile) {
      tile_rows[tile] = rows_in_turn(numbers + tile * LANES, std::min<int64_t>(LANES, count - tile * LANES), tile);
    }
    for_each_tile<COUNT>([](auto tile) { tile_unit::zero<tile.value>(); });
    for (int64_t dim = 0; dim < dims; dim += PAIRED_DIMS) {
      tile_unit::load<OPERAND>(lanes + dim / 2 * LANES, TILE_BYTES);
      for_each_tile<COUNT>([&](auto tile) {
        constexpr int KEYS = OTHER_OPERANDS[tile.value];
        tile_unit::load<KEYS>(tile_rows[tile.value].data + 2 * dim, tile_rows[tile.value].stride);
        tile_unit::multiply_add<tile.value, KEYS, OPERAND>();
      });
    }
    for_each_tile<COUNT>([&](auto tile) { tile_unit::store<tile.value>(to + tile.value * LANES * LANES, TILE_BYTES); });
  }

  // Values of the slice from `first` on as pairs [16][WIDTH][2] of two keys each.
  template <int64_t WIDTH>
  SPARSE_ATTN_INLINE_MEMBER void interleave_slice(const Entries& list, int64_t first, int64_t dim) const {
    const int32_t* numbers = list.rows + first;
    const int64_t count = list.count - first;
    int32_t last_numbers[SLICE_KEYS];
    if (count < SLICE_KEYS) {  // weights beyond the end are zero, whatever the value
      std::fill(std::copy(numbers, numbers + count, last_numbers), last_numbers + SLICE_KEYS, numbers[count - 1]);
      numbers = last_numbers;
    }
    for (int64_t key = 0; key < SLICE_KEYS; key += 2) {
      const char *even = row_of(values, numbers[key]) + 2 * dim, *odd = row_of(values, numbers[key + 1]) + 2 * dim;
      for (int64_t i = 0; i < WIDTH; i += PAIRED_DIMS) {
        interleave_quarters(even + 2 * i, odd + 2 * i, value_pairs + key / 2 * WIDTH + i);
      }
    }
  }

  // Weights [16][keys] times values [keys / 2][16 COUNT][2] are the outputs of 16 COUNT dimensions.
  template <int COUNT>
  void outputs_from(int64_t dim, const Entries& list, const OutputRows& rows) const {
    constexpr int64_t WIDTH = COUNT * LANES;
    for_each_tile<COUNT>([](auto tile) { tile_unit::zero<tile.value>(); });
    for (int64_t first = 0; first < list.count; first += SLICE_KEYS) {
      interleave_slice<WIDTH>(list, first, dim);
      tile_unit::load<OPERAND>(weight_pairs + first / 2 * LANES, TILE_BYTES);
      for_each_tile<COUNT>([&](auto tile) {
        constexpr int VALUES = OTHER_OPERANDS[tile.value];
        tile_unit::load<VALUES>(value_pairs + tile.value * LANES, 4 * WIDTH);
        tile_unit::multiply_add<tile.value, OPERAND, VALUES>();
      });
    }
    for_each_tile<COUNT>([&](auto tile) { tile_unit::store<tile.value>(scratch + tile.value * LANES, 4 * WIDTH); });
    for (int lane = 0; lane < LANES; ++lane) {
      if (rows.stored >> lane & 1) {
        const float* from = scratch + lane * WIDTH;
        char* to = rows.head.data + 2 * ((rows.first + lane) * rows.head.row_stride + dim);
        for (int64_t i = 0; i < WIDTH; i += PAIRED_DIMS) {
          store_quarters(to + 2 * i, load(from + i) * rows.factors[lane], load(from + i + LANES) * rows.factors[lane]);
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
