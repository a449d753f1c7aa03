// Boolean masks to bits and back: bit i % 8 of byte i / 8 is element i of the flattened mask.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "threads.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BYTES_PER_TASK = 1 << 15;
constexpr uint64_t LOW_BIT_OF_EACH_BYTE = 0x0101010101010101;
constexpr uint64_t LOW_SEVEN_OF_EACH_BYTE = 0x7f7f7f7f7f7f7f7f;

// The first element of eight is the lowest byte of the word, on every machine.
uint64_t swap_on_big_endian(uint64_t word) {
  if constexpr (std::endian::native == std::endian::big) {
    return __builtin_bswap64(word);
  }
  return word;
}

// Turns each byte into 1 where it is not 0: memory viewed as bool may hold other values than 0 and 1.
uint64_t nonzero_bytes(uint64_t word) {
  const uint64_t high_bits = ((word & LOW_SEVEN_OF_EACH_BYTE) + LOW_SEVEN_OF_EACH_BYTE) | word;
  return (high_bits >> 7) & LOW_BIT_OF_EACH_BYTE;
}

uint8_t pack_eight(const uint8_t* elements, int64_t count = 8) {
  uint64_t word = 0;
  std::memcpy(&word, elements, count);
  // The factor moves bit 8 i to bit 56 + i; no two of the products meet, so nothing carries.
  return static_cast<uint8_t>((nonzero_bytes(swap_on_big_endian(word)) * 0x0102040810204080) >> 56);
}

void unpack_eight(uint8_t bits, uint8_t* elements, int64_t count = 8) {
  // Byte i of the product is a copy of `bits`, of which the mask leaves bit i.
  const uint64_t spread = (bits * LOW_BIT_OF_EACH_BYTE) & 0x8040201008040201;
  const uint64_t word = swap_on_big_endian(nonzero_bytes(spread));
  std::memcpy(elements, &word, count);
}

#ifdef __SSE2__
// 64 elements at a time, which is what makes packing as fast as memory.
int64_t pack_blocks(const uint8_t* elements, uint8_t* bytes, int64_t count) {
  const int64_t blocks = count / 8;
  const __m128i zero = _mm_setzero_si128();
  for (int64_t i = 0; i < blocks; ++i) {
    uint64_t is_zero = 0;
    for (int part = 0; part < 4; ++part) {
      const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(elements + 64 * i + 16 * part));
      const auto bits = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(sixteen, zero)));
      is_zero |= static_cast<uint64_t>(bits) << (16 * part);
    }
    const uint64_t packed = ~is_zero;
    std::memcpy(bytes + 8 * i, &packed, 8);
  }
  return 8 * blocks;
}

// 64 elements at a time: each of eight bytes is copied twice, four times, eight times, then tested bit by
// bit.
int64_t unpack_blocks(const uint8_t* bytes, uint8_t* elements, int64_t count) {
  const int64_t blocks = count / 8;
  const __m128i bit_of_byte = _mm_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m128i one = _mm_set1_epi8(1);
  for (int64_t i = 0; i < blocks; ++i) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * i));
    const __m128i twice = _mm_unpacklo_epi8(eight, eight);
    const __m128i low = _mm_unpacklo_epi16(twice, twice);
    const __m128i high = _mm_unpackhi_epi16(twice, twice);
    const __m128i copies[4] = {
        _mm_unpacklo_epi32(low, low),
        _mm_unpackhi_epi32(low, low),
        _mm_unpacklo_epi32(high, high),
        _mm_unpackhi_epi32(high, high)};
    for (int part = 0; part < 4; ++part) {
      const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(copies[part], bit_of_byte), bit_of_byte);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(elements + 64 * i + 16 * part), _mm_and_si128(set, one));
    }
  }
  return 8 * blocks;
}
#else
int64_t pack_blocks(const uint8_t*, uint8_t*, int64_t) {
  return 0;
}

int64_t unpack_blocks(const uint8_t*, uint8_t*, int64_t) {
  return 0;
}
#endif

// count: packed bytes, here and above.
void pack_range(const uint8_t* elements, uint8_t* bytes, int64_t count) {
  for (int64_t i = pack_blocks(elements, bytes, count); i < count; ++i) {
    bytes[i] = pack_eight(elements + 8 * i);
  }
}

void unpack_range(const uint8_t* bytes, uint8_t* elements, int64_t count) {
  for (int64_t i = unpack_blocks(bytes, elements, count); i < count; ++i) {
    unpack_eight(bytes[i], elements + 8 * i);
  }
}

Tensor pack_bits(const Tensor& mask) {
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Bool,
      "mask must be a bool tensor, not dtype code ",
      static_cast<int>(mask.scalar_type()),
      "; compare it with 0 first");
  const Tensor dense = torch::stable::contiguous(mask);
  const int64_t count = dense.numel();
  const int64_t full_bytes = count / 8;
  Tensor packed = torch::stable::new_empty(dense, {(count + 7) / 8}, ScalarType::Byte);
  const auto* elements = static_cast<const uint8_t*>(dense.const_data_ptr());
  auto* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  sparse_attn::in_threads(full_bytes, BYTES_PER_TASK, [=](int64_t begin, int64_t end) {
    pack_range(elements + 8 * begin, bytes + begin, end - begin);
  });
  if (count % 8 != 0) {
    bytes[full_bytes] = pack_eight(elements + 8 * full_bytes, count % 8);
  }
  return packed;
}

Tensor unpack_bits(const Tensor& packed, int64_t count) {
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte,
      "packed must be a uint8 tensor, not dtype code ",
      static_cast<int>(packed.scalar_type()));
  STD_TORCH_CHECK(packed.dim() == 1, "packed must have 1 dimension, not ", packed.dim());
  STD_TORCH_CHECK(count >= 0, "count must not be negative, got ", count);
  STD_TORCH_CHECK(
      packed.numel() == count / 8 + (count % 8 != 0),
      count,
      " bits take ",
      count / 8 + (count % 8 != 0),
      " bytes, but packed has ",
      packed.numel());
  const Tensor dense = torch::stable::contiguous(packed);
  const int64_t full_bytes = count / 8;
  Tensor mask = torch::stable::new_empty(dense, {count}, ScalarType::Bool);
  const auto* bytes = static_cast<const uint8_t*>(dense.const_data_ptr());
  auto* elements = static_cast<uint8_t*>(mask.mutable_data_ptr());
  sparse_attn::in_threads(full_bytes, BYTES_PER_TASK, [=](int64_t begin, int64_t end) {
    unpack_range(bytes + begin, elements + 8 * begin, end - begin);
  });
  if (count % 8 != 0) {
    unpack_eight(bytes[full_bytes], elements + 8 * full_bytes, count % 8);
  }
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, library) {
  library.impl("pack_bits", TORCH_BOX(&pack_bits));
  library.impl("unpack_bits", TORCH_BOX(&unpack_bits));
}
