// Float lanes, one for each query row, in the compiler's own vectors. The including file chooses the instructions,
// names them in SPARSE_ATTN_ISA, so that code for different processors never shares a symbol, and says how many lanes
// fill a register: SPARSE_ATTN_LANES, 4, 8 or 16. With 8 and 16 it also includes <immintrin.h>, before it chooses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sparse_attn::SPARSE_ATTN_ISA {

constexpr int LANES = SPARSE_ATTN_LANES;

using Floats = float __attribute__((vector_size(4 * SPARSE_ATTN_LANES)));
using Ints = int32_t __attribute__((vector_size(4 * SPARSE_ATTN_LANES)));
using Words = uint32_t __attribute__((vector_size(4 * SPARSE_ATTN_LANES)));
using Shorts = uint16_t __attribute__((vector_size(2 * SPARSE_ATTN_LANES)));

#if SPARSE_ATTN_LANES == 16
#define SPARSE_ATTN_COUNT 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define SPARSE_ATTN_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SPARSE_ATTN_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif SPARSE_ATTN_LANES == 8
#define SPARSE_ATTN_COUNT 0, 1, 2, 3, 4, 5, 6, 7
#define SPARSE_ATTN_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define SPARSE_ATTN_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define SPARSE_ATTN_COUNT 0, 1, 2, 3
#define SPARSE_ATTN_LOW 0, 4, 1, 5
#define SPARSE_ATTN_HIGH 2, 6, 3, 7
#endif

#define SPARSE_ATTN_INLINE_MEMBER inline __attribute__((always_inline))
#define SPARSE_ATTN_INLINE static SPARSE_ATTN_INLINE_MEMBER

SPARSE_ATTN_INLINE Floats splat(float value) {
  return Floats{} + value;
}

SPARSE_ATTN_INLINE Words splat_word(uint32_t value) {
  return Words{} + value;
}

SPARSE_ATTN_INLINE Floats load(const float* from) {
  Floats lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

SPARSE_ATTN_INLINE Words load_words(const int32_t* from) {
  Words lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

SPARSE_ATTN_INLINE void store(float* to, Floats lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

// The compiler keeps an address in a register of its own instead of a sum of two, which costs a multiplication that
// reads there a second instruction inside the processor.
SPARSE_ATTN_INLINE void keep_in_register(const char*& address) {
  __asm__("" : "+r"(address));
}

SPARSE_ATTN_INLINE Floats maximum(Floats a, Floats b) {
  return a > b ? a : b;
}

SPARSE_ATTN_INLINE Floats minimum(Floats a, Floats b) {
  return a < b ? a : b;
}

// Lanes whose bit is set keep their value, the others become `otherwise`.
SPARSE_ATTN_INLINE Floats select(uint32_t bits, Floats lanes, Floats otherwise) {
  const Ints lane_bit = (Ints{} + 1) << Ints{SPARSE_ATTN_COUNT};
  return ((Ints{} + static_cast<int32_t>(bits)) & lane_bit) != 0 ? lanes : otherwise;
}

// The nearest integer of |x| < 2^22, as a float and in the low bits of the float x + 1.5 * 2^23.
struct Rounded {
  Floats value;
  Ints bits;
};

SPARSE_ATTN_INLINE Rounded nearest(Floats x) {
  const Floats shifted = x + 12582912.0f;
  return {shifted - 12582912.0f, reinterpret_cast<Ints>(shifted)};
}

// 2^f for |f| <= 0.5.
SPARSE_ATTN_INLINE Floats exp2_of_fraction(Floats f) {
  Floats p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f + 1.0f;
}

// 2^x to 2 units in the last place for x <= 127; 0 below 2^-126, NaN for NaN.
SPARSE_ATTN_INLINE Floats exp2_of(Floats x) {
  const Floats lowest = splat(-126.0f);
#if SPARSE_ATTN_LANES == 16
  const __m512 all = reinterpret_cast<__m512>(x);
  const Floats f = reinterpret_cast<Floats>(_mm512_reduce_ps(all, _MM_FROUND_TO_NEAREST_INT));
  const __mmask16 not_below = _mm512_cmp_ps_mask(all, reinterpret_cast<__m512>(lowest), _CMP_NLT_UQ);
  return reinterpret_cast<Floats>(_mm512_maskz_scalef_ps(
      not_below, reinterpret_cast<__m512>(exp2_of_fraction(f)), reinterpret_cast<__m512>(x - f)));
#else
  const Floats clamped = maximum(x, lowest);
  const Rounded whole = nearest(clamped);
  const Floats p = exp2_of_fraction(clamped - whole.value);
  const Floats scaled = reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + (whole.bits << 23));
  return x < lowest ? splat(0.0f) : scaled + x * 0.0f;
#endif
}

// The binary logarithm of normal x to 2 units in the last place, NaN for NaN.
SPARSE_ATTN_INLINE Floats log2_of(Floats x) {
  const Ints exponent = (reinterpret_cast<Ints>(x) - 0x3f3504f3) >> 23;  // of x / sqrt(0.5)
  const Floats f = reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) - (exponent << 23)) - 1.0f;
  // log(1 + f) = 2 artanh(f / (2 + f)), a series in s^2 <= 0.03.
  const Floats s = f / (f + 2.0f), square = s * s;
  const Floats series = (((square * (1.0f / 9) + 1.0f / 7) * square + 1.0f / 5) * square + 1.0f / 3) * square + 1.0f;
  return __builtin_convertvector(exponent, Floats) + s * series * 2.885390081777927f + x * 0.0f;
}

// Turns LANES vectors into the columns of the matrix whose rows they were.
SPARSE_ATTN_INLINE void transpose(Floats* rows) {
  Floats others[LANES];
  const auto interleave = [](const Floats* from, Floats* to) __attribute__((always_inline)) {
    for (int i = 0; i < LANES / 2; ++i) {
      to[2 * i] = __builtin_shufflevector(from[i], from[i + LANES / 2], SPARSE_ATTN_LOW);
      to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + LANES / 2], SPARSE_ATTN_HIGH);
    }
  };
  interleave(rows, others);
  interleave(others, rows);
  if constexpr (LANES > 4) {
    interleave(rows, others);
    if constexpr (LANES > 8) {
      interleave(others, rows);
    } else {
      std::copy(others, others + LANES, rows);
    }
  }
}

// LANES elements of any supported type as floats, and back.
SPARSE_ATTN_INLINE Floats load_bfloat16(const uint16_t* from) {
  Shorts shorts;
  std::memcpy(&shorts, from, sizeof shorts);
  return reinterpret_cast<Floats>(__builtin_convertvector(shorts, Words) << 16);
}

SPARSE_ATTN_INLINE void store_bfloat16(uint16_t* to, Floats lanes) {
  const Words bits = reinterpret_cast<Words>(lanes);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  const Shorts shorts = __builtin_convertvector(lanes == lanes ? rounded : quiet, Shorts);
  std::memcpy(to, &shorts, sizeof shorts);
}

#if SPARSE_ATTN_LANES == 8
// AVX-512 is as fast without the processor's own conversions.
SPARSE_ATTN_INLINE Floats load_float16(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

SPARSE_ATTN_INLINE void store_float16(uint16_t* to, Floats lanes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
}
#else
SPARSE_ATTN_INLINE Floats load_float16(const uint16_t* from) {
  Shorts shorts;
  std::memcpy(&shorts, from, sizeof shorts);
  const Words half = __builtin_convertvector(shorts, Words);
  const Words sign = (half & 0x8000) << 16;
  const Words magnitude = (half & 0x7fff) << 13;
  // Moves the exponent's bias from 15 to 127; subnormal halves become normal floats on the way.
  Words bits = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) * 0x1p112f);
  bits = (half & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits;
  return reinterpret_cast<Floats>(bits | sign);
}

SPARSE_ATTN_INLINE void store_float16(uint16_t* to, Floats lanes) {
  const Words bits = reinterpret_cast<Words>(lanes);
  const Words sign = (bits >> 16) & 0x8000;
  const Words magnitude = bits & 0x7fffffff;
  // Below 2^-14 a half is a multiple of 2^-24, which adding 0.5 rounds to: its float is a multiple of 2^-24 too.
  const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - splat_word(0x3f000000);
  const Words normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Words half = magnitude < splat_word(0x38800000) ? subnormal : normal;
  half = magnitude >= splat_word(0x477ff000) ? splat_word(0x7c00) : half;  // rounds to 65536 or more
  half = magnitude > splat_word(0x7f800000) ? splat_word(0x7e00) : half;
  const Shorts shorts = __builtin_convertvector(half | sign, Shorts);
  std::memcpy(to, &shorts, sizeof shorts);
}
#endif

}  // namespace sparse_attn::SPARSE_ATTN_ISA
