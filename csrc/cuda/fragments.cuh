// What the attention kernel wants of the machine: asynchronous copies, fragments of matrices, the matrix unit, and what
// lanes of a warp tell each other. tests/cuda/emulator.h has the same functions for a CPU.
//
// Fragments of a warp, lane l: of an accumulator [16][8] the elements (l / 4, 2 * (l % 4) + {0, 1}) and the same of row
// l / 4 + 8; of a left factor [16][16] four words: columns 2 * (l % 4) + {0, 1} of rows l / 4 and l / 4 + 8, then of
// the same rows 8 columns on; of a right factor [16][8] two words: rows 2 * (l % 4) + {0, 1} of column l / 4, then the
// rows 8 further.
#pragma once

#include <cstdint>

#define SPARSE_ATTN_DEVICE __device__ __forceinline__

namespace sparse_attn {

enum class Element { Float16, BFloat16 };

constexpr uint32_t ALL_LANES = 0xffffffffu;

SPARSE_ATTN_DEVICE int thread_number() {
  return static_cast<int>(threadIdx.x);
}

SPARSE_ATTN_DEVICE int thread_count() {
  return static_cast<int>(blockDim.x);
}

SPARSE_ATTN_DEVICE int block_number() {
  return static_cast<int>(blockIdx.x);
}

SPARSE_ATTN_DEVICE int block_count() {
  return static_cast<int>(gridDim.x);
}

// The first byte of the block's shared memory. Shared memory is addressed by 32-bit numbers throughout.
SPARSE_ATTN_DEVICE uint32_t shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// All warps of a block meet here.
SPARSE_ATTN_DEVICE void block_barrier() {
  asm volatile("bar.sync 0;" ::: "memory");
}

// The same number, of which the compiler knows nothing: what follows from it is computed where it is needed instead of
// being kept in registers from before a loop.
SPARSE_ATTN_DEVICE int computed_here(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// 16 bytes from global to shared memory, or zeros that are read from nowhere. Complete after `await_copies`, or for
// others by `arrive_when_copied`.
SPARSE_ATTN_DEVICE void copy_async(uint32_t to, const void* from, bool zeros) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(zeros ? 0 : 16)
               : "memory");
}

// Brings the cache line of an address closer.
SPARSE_ATTN_DEVICE void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

SPARSE_ATTN_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's copies, but for the last `PENDING` groups that it committed.
template <int PENDING>
SPARSE_ATTN_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Barriers are 8 bytes of shared memory that count arrivals. Each time the expected number of them has come, one phase
// ends and the next begins; phases are even and odd in turn, the first one is even.
SPARSE_ATTN_DEVICE void start_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What the thread wrote before is seen by threads that have seen the phase's end.
SPARSE_ATTN_DEVICE void arrive(uint32_t barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
}

// An arrival that happens when all copies that this thread has begun are complete.
SPARSE_ATTN_DEVICE void arrive_when_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Whether the current phase of a barrier is not the `odd` (or even) one any more.
SPARSE_ATTN_DEVICE bool has_passed(uint32_t barrier, bool odd) {
  uint32_t passed;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(passed)
               : "r"(barrier), "r"(static_cast<uint32_t>(odd))
               : "memory");
  return passed;
}

// The same, after a wait that keeps the processor free for others.
SPARSE_ATTN_DEVICE bool await_a_while(uint32_t barrier, bool odd) {
#if __CUDA_ARCH__ >= 900
  uint32_t passed;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(passed)
               : "r"(barrier), "r"(static_cast<uint32_t>(odd))
               : "memory");
  return passed;
#else
  const bool passed = has_passed(barrier, odd);
  if (!passed) {
    __nanosleep(50);
  }
  return passed;
#endif
}

// Lanes of a warp see what its other lanes have written before.
SPARSE_ATTN_DEVICE void warp_barrier() {
  __syncwarp();
}

SPARSE_ATTN_DEVICE void store_shared(uint32_t to, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

SPARSE_ATTN_DEVICE uint32_t load_shared(uint32_t from) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from));
  return word;
}

// A word that other warps may write, or read, at this moment. It says by itself whether it is the one wanted: nothing
// else is ordered by it.
SPARSE_ATTN_DEVICE uint32_t load_shared_relaxed(uint32_t from) {
  uint32_t word;
  asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}

SPARSE_ATTN_DEVICE void store_shared_relaxed(uint32_t to, uint32_t word) {
  asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

SPARSE_ATTN_DEVICE void load_shared_words(uint32_t (&word)[4], uint32_t from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(from));
}

SPARSE_ATTN_DEVICE void store_shared_pointer(uint32_t to, const void* pointer) {
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(to), "l"(pointer) : "memory");
}

SPARSE_ATTN_DEVICE void* load_shared_pointer(uint32_t from) {
  void* pointer;
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(pointer) : "r"(from));
  return pointer;
}

SPARSE_ATTN_DEVICE uint32_t load_shared_half(uint32_t from) {
  uint16_t half;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(from));
  return half;
}

SPARSE_ATTN_DEVICE uint32_t add_shared(uint32_t to, uint32_t word) {
  uint32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(to), "r"(word) : "memory");
  return before;
}

// Writes a word in place of `known`, if that is what is there; says whether it was.
SPARSE_ATTN_DEVICE bool replace_shared(uint32_t to, uint32_t known, uint32_t word) {
  uint32_t before;
  asm volatile("atom.shared.cas.b32 %0, [%1], %2, %3;" : "=r"(before) : "r"(to), "r"(known), "r"(word) : "memory");
  return before == known;
}

// The number in global memory, which becomes the next one, after `last` 0.
SPARSE_ATTN_DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t last) {
  return atomicInc(counter, last);
}

// 16 bytes from global memory that no kernel writes meanwhile.
SPARSE_ATTN_DEVICE void load_words(uint32_t (&word)[4], const void* from) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "l"(from));
}

SPARSE_ATTN_DEVICE void store_words(void* to, const uint32_t (&word)[4]) {
  asm volatile(
      "st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
      : "memory");
}

// Two floats from global memory that no kernel writes meanwhile, and to it.
SPARSE_ATTN_DEVICE void load_pair(const float* from, float& first, float& second) {
  asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(first), "=f"(second) : "l"(from));
}

SPARSE_ATTN_DEVICE void store_pair(float* to, float first, float second) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(first), "f"(second) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane l says where row l % 8 of matrix l / 8 lies. Lane l gets of each matrix
// word l % 4 of row l / 4.
SPARSE_ATTN_DEVICE void load_matrices(uint32_t (&word)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(row));
}

// The same, transposed: lane l gets elements 2 * (l % 4) + {0, 1} of column l / 4.
SPARSE_ATTN_DEVICE void load_matrices_transposed(uint32_t (&word)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(row));
}

SPARSE_ATTN_DEVICE uint32_t from_lane(uint32_t word, int lane);

// The opposite of load_matrices.
SPARSE_ATTN_DEVICE void store_matrices(uint32_t row, const uint32_t (&word)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(word[0]),
               "r"(word[1]),
               "r"(word[2]),
               "r"(word[3])
               : "memory");
#else
  const int lane = thread_number() % 32;
#pragma unroll
  for (int matrix = 0; matrix < 4; ++matrix) {
    store_shared(from_lane(row, 8 * matrix + lane / 4) + 4 * (lane % 4), word[matrix]);
  }
#endif
}

// sum + left [16][16] . right [16][8] -> sum
template <Element ELEMENT>
SPARSE_ATTN_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  if constexpr (ELEMENT == Element::Float16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
}

// Two numbers rounded to nearest, the first one in the lower half.
template <Element ELEMENT>
SPARSE_ATTN_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (ELEMENT == Element::Float16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

template <Element ELEMENT>
SPARSE_ATTN_DEVICE void unpack(uint32_t word, float (&number)[2]) {
  if constexpr (ELEMENT == Element::Float16) {
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(number[0]), "=f"(number[1])
        : "r"(word));
  } else {
    number[0] = __uint_as_float(word << 16);
    number[1] = __uint_as_float(word & 0xffff0000u);
  }
}

// 2 ** x, off by at most 2 units in the last place.
SPARSE_ATTN_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 of a number from 1 on, off by at most 2 ** -22 of it.
SPARSE_ATTN_DEVICE float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, off by at most 1 unit in the last place.
SPARSE_ATTN_DEVICE float inverse_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a * b + c, clamped to [0, 1]; NaN becomes 0.
SPARSE_ATTN_DEVICE float multiply_add_clamped(float a, float b, float c) {
  return __saturatef(__fmaf_rn(a, b, c));
}

// The bits of a * b + c, rounded down.
SPARSE_ATTN_DEVICE uint32_t multiply_add_down(float a, float b, float c) {
  return __float_as_uint(__fmaf_rd(a, b, c));
}

// Four bytes of the eight of low and high, chosen by the four lowest hexadecimal digits of `choice`, 0 to 7 each.
SPARSE_ATTN_DEVICE uint32_t choose_bytes(uint32_t low, uint32_t high, uint32_t choice) {
  uint32_t word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(low), "r"(high), "r"(choice));
  return word;
}

SPARSE_ATTN_DEVICE uint32_t ballot(bool predicate) {
  return __ballot_sync(ALL_LANES, predicate);
}

SPARSE_ATTN_DEVICE uint32_t from_lane(uint32_t word, int lane) {
  return __shfl_sync(ALL_LANES, word, lane);
}

SPARSE_ATTN_DEVICE float from_lane(float number, int lane) {
  return __shfl_sync(ALL_LANES, number, lane);
}

// The same number in all lanes, which the compiler then knows.
template <class T>
SPARSE_ATTN_DEVICE T uniform(T number) {
  return __shfl_sync(ALL_LANES, number, 0);
}

SPARSE_ATTN_DEVICE uint32_t from_neighbour(uint32_t word, int distance) {
  return __shfl_xor_sync(ALL_LANES, word, distance);
}

SPARSE_ATTN_DEVICE float from_neighbour(float number, int distance) {
  return __shfl_xor_sync(ALL_LANES, number, distance);
}

SPARSE_ATTN_DEVICE int count_bits(uint32_t word) {
  return __popc(word);
}

}  // namespace sparse_attn
