// The matrix unit of a processor with Intel AMX: tiles 0 to 7 of 16 rows of 64 bytes. In assembly, since compilers'
// own functions for it let other accesses to memory move past them (GCC 12).
#pragma once

#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace sparse_attn::tile_unit {

constexpr const char* KERNELS_NAME = "amx";

// Whether the processor multiplies tiles of bfloat16 and the system lets this process use them.
inline bool usable() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr uint32_t BFLOAT16_TILES = 1u << 22 | 1u << 24, SAVES_STATES = 1u << 27, TILE_STATES = 3u << 17;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & SAVES_STATES)) {
    return false;
  }
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & BFLOAT16_TILES) != BFLOAT16_TILES) {
    return false;
  }
  uint32_t saved, upper;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  return (saved & TILE_STATES) == TILE_STATES && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
  return false;
#endif
}

// Makes the tiles usable as long as it lives, on the thread that made it.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t shape[64] = {1};  // palette 1; bytes of a row from 16 on, rows from 48 on
    for (int tile = 0; tile < 8; ++tile) {
      shape[16 + 2 * tile] = 64;
      shape[48 + tile] = 16;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  }
  ~Tiles() {
    __asm__ volatile("tilerelease" : : : "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int TILE>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// 16 rows of 64 bytes, `stride` bytes apart.
template <int TILE>
inline void load(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(rows), "r"(stride) : "memory");
}

template <int TILE>
inline void store(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(TILE), "r"(rows), "r"(stride) : "memory");
}

// SUM [16, 16] of float32 += A [16, 32] B [32, 16] of bfloat16, where B's rows lie in pairs: [16][16][2].
template <int SUM, int A, int B>
inline void multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}

}  // namespace sparse_attn::tile_unit
