// What csrc/cpu/tile_unit.h gives the attention kernels, for processors without a matrix unit. A build that includes
// this file first has the kernels for AMX, emulated. Stricter than the real unit: tiles that were released hold NaN.
#pragma once
#define SPARSE_ATTN_TILE_UNIT

#include <cstdint>
#include <cstring>

namespace sparse_attn::tile_unit {

constexpr const char* KERNELS_NAME = "amx_emulated";

struct Tile {
  uint32_t words[16][16];
};

inline Tile& tile_at(int number) {
  static thread_local Tile tiles[8];
  return tiles[number];
}

inline bool usable() {
  return true;
}

class Tiles {
 public:
  Tiles() = default;
  ~Tiles() {
    for (int tile = 0; tile < 8; ++tile) {
      std::memset(&tile_at(tile), 0xff, sizeof(Tile));
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int TILE>
inline void zero() {
  tile_at(TILE) = {};
}

template <int TILE>
inline void load(const void* rows, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(tile_at(TILE).words[row], static_cast<const char*>(rows) + row * stride, 64);
  }
}

template <int TILE>
inline void store(void* rows, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(rows) + row * stride, tile_at(TILE).words[row], 64);
  }
}

// One half of a pair as the unit reads it: a subnormal number counts as zero.
inline float half_of(uint32_t pair, bool second) {
  const uint32_t bits = second ? pair & 0xffff0000 : pair << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return bits & 0x7f800000 ? value : 0.0f;
}

// The products of first and of second halves are summed apart, as TDPBF16PS does.
template <int SUM, int A, int B>
inline void multiply_add() {
  static_assert(SUM != A && A != B && SUM != B, "the three tiles of a product must differ");
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      float sums[2] = {0.0f, 0.0f};
      for (int k = 0; k < 16; ++k) {
        for (bool second : {false, true}) {
          sums[second] += half_of(tile_at(A).words[row][k], second) * half_of(tile_at(B).words[k][column], second);
        }
      }
      float sum;
      std::memcpy(&sum, &tile_at(SUM).words[row][column], sizeof sum);
      sum += sums[0] + sums[1];
      std::memcpy(&tile_at(SUM).words[row][column], &sum, sizeof sum);
    }
  }
}

}  // namespace sparse_attn::tile_unit
