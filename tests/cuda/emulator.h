// What csrc/cuda/fragments.cuh gives the attention kernel, for a CPU: stricter than a GPU where that finds mistakes.
// Lanes must agree on which warp-wide function they call, asynchronous copies arrive only when they are awaited, shared
// memory starts as NaN.
#pragma once

#include "emulated_block.h"

#define SPARSE_ATTN_DEVICE inline

namespace sparse_attn {

using std::max;
using std::min;

enum class Element { Float16, BFloat16 };

namespace emulator {

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return half;
}

inline float as_float(uint32_t bits) {
  return load<float>(&bits);
}

template <Element ELEMENT>
float element(uint32_t word, int half) {
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  return ELEMENT == Element::Float16 ? half_to_float(bits) : as_float(static_cast<uint32_t>(bits) << 16);
}

}  // namespace emulator

SPARSE_ATTN_DEVICE int thread_number() {
  return emulator::block->current;
}

SPARSE_ATTN_DEVICE int thread_count() {
  return emulator::block->threads;
}

SPARSE_ATTN_DEVICE int block_number() {
  return emulator::block->number;
}

SPARSE_ATTN_DEVICE int block_count() {
  return emulator::block->count;
}

SPARSE_ATTN_DEVICE uint32_t shared_memory() {
  return emulator::SHARED_START;
}

SPARSE_ATTN_DEVICE void block_barrier() {
  emulator::Block& block = *emulator::block;
  const unsigned generation = block.barrier_generation;
  if (++block.at_barrier == block.threads) {
    block.at_barrier = 0;
    ++block.barrier_generation;
    ++block.progress;
  } else {
    emulator::wait_until([&] { return block.barrier_generation != generation; });
  }
}

SPARSE_ATTN_DEVICE int computed_here(int number) {
  return number;
}

SPARSE_ATTN_DEVICE void copy_async(uint32_t to, const void* from, bool zeros) {
  if (reinterpret_cast<uintptr_t>(from) % 16) {
    emulator::fail("a copy starts at a misaligned address");
  }
  emulator::block->fibers[emulator::block->current].groups.back().push_back({to, zeros ? nullptr : from});
}

SPARSE_ATTN_DEVICE void prefetch(const void*) {
}

SPARSE_ATTN_DEVICE void commit_copies() {
  emulator::block->fibers[emulator::block->current].groups.emplace_back();
}

template <int PENDING>
SPARSE_ATTN_DEVICE void await_copies() {
  auto& groups = emulator::block->fibers[emulator::block->current].groups;
  while (groups.size() > PENDING + 1) {
    for (const emulator::Copy& copy : groups.front()) {
      emulator::complete(copy);
    }
    groups.erase(groups.begin());
  }
}

SPARSE_ATTN_DEVICE void start_barrier(uint32_t barrier, int arrivals) {
  emulator::shared_at(barrier, 8);
  emulator::block->barriers[barrier] = {arrivals, arrivals};
}

SPARSE_ATTN_DEVICE void arrive(uint32_t barrier) {
  emulator::Barrier& own = emulator::next_arrival(barrier);
  --own.missing;
  emulator::end_phase_if_complete(own);
}

SPARSE_ATTN_DEVICE void arrive_when_copied(uint32_t barrier) {
  auto& copies = emulator::block->fibers[emulator::block->current].groups.back();
  emulator::Barrier& own = emulator::next_arrival(barrier);
  own.copies.insert(own.copies.end(), copies.begin(), copies.end());
  copies.clear();
  ++own.copying;
}

SPARSE_ATTN_DEVICE bool has_passed(uint32_t barrier, bool odd) {
  emulator::Barrier& own = emulator::block->barriers.at(barrier);
  if (own.odd == odd && own.copying > 0) {
    emulator::complete_copies(own);
  }
  return own.odd != odd;
}

SPARSE_ATTN_DEVICE bool await_a_while(uint32_t barrier, bool odd) {
  emulator::Block& block = *emulator::block;
  if (!has_passed(barrier, odd)) {
    block.idle_polls = block.progress == block.polled_progress ? block.idle_polls + 1 : 0;
    block.polled_progress = block.progress;
    if (block.idle_polls > 8 * block.threads) {
      emulator::fail("threads poll a barrier forever");
    }
    emulator::switch_to_next();
  }
  if (!block.error.empty()) {
    throw std::runtime_error(block.error);
  }
  return has_passed(barrier, odd);
}

SPARSE_ATTN_DEVICE void warp_barrier() {
  emulator::exchange("warp_barrier", 0);
}

SPARSE_ATTN_DEVICE void store_shared(uint32_t to, uint32_t word) {
  std::memcpy(emulator::shared_at(to, 4), &word, 4);
}

SPARSE_ATTN_DEVICE uint32_t load_shared(uint32_t from) {
  return emulator::load<uint32_t>(emulator::shared_at(from, 4));
}

SPARSE_ATTN_DEVICE uint32_t load_shared_relaxed(uint32_t from) {
  return load_shared(from);
}

SPARSE_ATTN_DEVICE void store_shared_relaxed(uint32_t to, uint32_t word) {
  store_shared(to, word);
}

SPARSE_ATTN_DEVICE void load_shared_words(uint32_t (&word)[4], uint32_t from) {
  std::memcpy(word, emulator::shared_at(from, 16), 16);
}

SPARSE_ATTN_DEVICE void store_shared_pointer(uint32_t to, const void* pointer) {
  std::memcpy(emulator::shared_at(to, 8), &pointer, 8);
}

SPARSE_ATTN_DEVICE void* load_shared_pointer(uint32_t from) {
  return emulator::load<void*>(emulator::shared_at(from, 8));
}

SPARSE_ATTN_DEVICE uint32_t load_shared_half(uint32_t from) {
  return emulator::load<uint16_t>(emulator::shared_at(from, 2));
}

SPARSE_ATTN_DEVICE uint32_t add_shared(uint32_t to, uint32_t word) {
  const uint32_t before = load_shared(to);
  store_shared(to, before + word);
  return before;
}

SPARSE_ATTN_DEVICE bool replace_shared(uint32_t to, uint32_t known, uint32_t word) {
  if (load_shared(to) != known) {
    return false;
  }
  store_shared(to, word);
  ++emulator::block->progress;
  return true;
}

SPARSE_ATTN_DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t last) {
  const uint32_t own = *counter;
  *counter = own >= last ? 0 : own + 1;
  return own;
}

SPARSE_ATTN_DEVICE void load_words(uint32_t (&word)[4], const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) {
    emulator::fail("a load of 16 bytes is misaligned");
  }
  std::memcpy(word, from, 16);
}

SPARSE_ATTN_DEVICE void store_words(void* to, const uint32_t (&word)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16) {
    emulator::fail("a store of 16 bytes is misaligned");
  }
  std::memcpy(to, word, 16);
}

SPARSE_ATTN_DEVICE void load_pair(const float* from, float& first, float& second) {
  if (reinterpret_cast<uintptr_t>(from) % 8) {
    emulator::fail("a load of 8 bytes is misaligned");
  }
  first = from[0], second = from[1];
}

SPARSE_ATTN_DEVICE void store_pair(float* to, float first, float second) {
  if (reinterpret_cast<uintptr_t>(to) % 8) {
    emulator::fail("a store of 8 bytes is misaligned");
  }
  to[0] = first, to[1] = second;
}

SPARSE_ATTN_DEVICE void load_matrices(uint32_t (&word)[4], uint32_t row) {
  const auto rows = emulator::exchange("load_matrices", row);
  const int lane = emulator::lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto* from = emulator::shared_at(rows.of[8 * matrix + lane / 4], 16);
    word[matrix] = emulator::load<uint32_t>(from + 4 * (lane % 4));
  }
}

SPARSE_ATTN_DEVICE void load_matrices_transposed(uint32_t (&word)[4], uint32_t row) {
  const auto rows = emulator::exchange("load_matrices_transposed", row);
  const int lane = emulator::lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    word[matrix] = 0;
    for (int half = 0; half < 2; ++half) {
      const auto* from = emulator::shared_at(rows.of[8 * matrix + 2 * (lane % 4) + half], 16);
      word[matrix] |= static_cast<uint32_t>(emulator::load<uint16_t>(from + 2 * (lane / 4))) << (16 * half);
    }
  }
}

SPARSE_ATTN_DEVICE void store_matrices(uint32_t row, const uint32_t (&word)[4]) {
  const auto rows = emulator::exchange("store_matrices", row);
  const int lane = emulator::lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::memcpy(emulator::shared_at(rows.of[8 * matrix + lane / 4], 16) + 4 * (lane % 4), &word[matrix], 4);
  }
}

template <Element ELEMENT>
SPARSE_ATTN_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  struct Operands {
    float left[4][2], right[2][2];
  } own;
  for (int half = 0; half < 2; ++half) {
    for (int word = 0; word < 4; ++word) {
      own.left[word][half] = emulator::element<ELEMENT>(left[word], half);
    }
    own.right[0][half] = emulator::element<ELEMENT>(right0, half);
    own.right[1][half] = emulator::element<ELEMENT>(right1, half);
  }
  const auto operands = emulator::exchange("multiply_add", own);
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, upper = i / 2, column = 2 * (lane % 4) + i % 2;
    double total = sum[i];
    for (int k = 0; k < 16; ++k) {
      const int quarter = k % 8 / 2, right = k / 8;
      const float a = operands.of[4 * row + quarter].left[upper + 2 * right][k % 2];
      const float b = operands.of[4 * column + quarter].right[right][k % 2];
      total += static_cast<double>(a) * b;
    }
    sum[i] = static_cast<float>(total);
  }
}

template <Element ELEMENT>
SPARSE_ATTN_DEVICE uint32_t pack(float low, float high) {
  const auto bits = [](float number) -> uint32_t {
    if (ELEMENT == Element::Float16) {
      const auto half = static_cast<_Float16>(number);
      return emulator::load<uint16_t>(&half);
    }
    const auto word = emulator::load<uint32_t>(&number);
    return std::isnan(number) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  };
  return bits(low) | bits(high) << 16;
}

template <Element ELEMENT>
SPARSE_ATTN_DEVICE void unpack(uint32_t word, float (&number)[2]) {
  number[0] = emulator::element<ELEMENT>(word, 0);
  number[1] = emulator::element<ELEMENT>(word, 1);
}

SPARSE_ATTN_DEVICE float exp2_of(float x) {
  return std::exp2(x);
}

SPARSE_ATTN_DEVICE float log2_of(float x) {
  return std::log2(x);
}

SPARSE_ATTN_DEVICE float inverse_of(float x) {
  return 1.0f / x;
}

SPARSE_ATTN_DEVICE float multiply_add_clamped(float a, float b, float c) {
  const float sum = std::fma(a, b, c);
  return std::isnan(sum) ? 0.0f : std::clamp(sum, 0.0f, 1.0f);
}

SPARSE_ATTN_DEVICE uint32_t multiply_add_down(float a, float b, float c) {
  const double exact = static_cast<double>(a) * b + c;
  auto rounded = static_cast<float>(exact);
  if (rounded > exact) {
    rounded = std::nextafter(rounded, -INFINITY);
  }
  return emulator::load<uint32_t>(&rounded);
}

SPARSE_ATTN_DEVICE uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t choice) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = choice >> (4 * i) & 15;
    if (digit > 7) {
      emulator::fail("a byte is chosen by a digit above 7");
    }
    word |= static_cast<uint32_t>(bytes >> (8 * digit) & 255) << (8 * i);
  }
  return word;
}

SPARSE_ATTN_DEVICE uint32_t ballot(bool predicate) {
  const auto all = emulator::exchange("ballot", predicate);
  uint32_t word = 0;
  for (int lane = 0; lane < 32; ++lane) {
    word |= static_cast<uint32_t>(all.of[lane]) << lane;
  }
  return word;
}

template <class T>
SPARSE_ATTN_DEVICE T from_lane(T own, int lane) {
  return emulator::exchange("from_lane", own).of[lane % 32];
}

template <class T>
SPARSE_ATTN_DEVICE T uniform(T number) {
  return emulator::exchange("uniform", number).of[0];
}

template <class T>
SPARSE_ATTN_DEVICE T from_neighbour(T own, int distance) {
  return emulator::exchange("from_neighbour", own).of[emulator::lane() ^ distance];
}

SPARSE_ATTN_DEVICE int count_bits(uint32_t word) {
  return __builtin_popcount(word);
}

}  // namespace sparse_attn
