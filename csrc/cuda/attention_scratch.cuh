// How the rows of a warp's group come into its registers, and its results out. Include fragments.cuh (or the
// emulator's) before.
#pragma once

#include "attention_schedule.cuh"
#include "attention_steps.cuh"

namespace sparse_attn {

// An area of a warp's own in shared memory: 16 rows of a group on their way in, and then of its results on their way
// out. Pieces of 16 bytes are permuted so that 8 of them that are written or read together lie in different banks.
template <int ROW_BYTES>
class WarpScratch {
  static constexpr unsigned CHUNKS = ROW_BYTES / 16;

  uint32_t start;
  unsigned lane;

  SPARSE_ATTN_DEVICE uint32_t address(unsigned row, unsigned chunk) const {
    return start + row * ROW_BYTES + 16 * (chunk ^ row * CHUNKS / 8 % CHUNKS);
  }

 public:
  static constexpr int TURNS = GROUP_ROWS * CHUNKS / 32;  // 512 bytes at a time

  SPARSE_ATTN_DEVICE WarpScratch(const AttentionCall& call, unsigned thread, int area = 0)
      : start(
            shared_memory() + call.memory.scratch +
            (thread / 32 + area * (thread_count() / 32)) * (GROUP_ROWS * ROW_BYTES)),
        lane(thread % 32) {
  }

  // The piece that a lane copies in a turn: its row, its first byte in the row, and where it lies.
  SPARSE_ATTN_DEVICE int row(int turn) const {
    return lane / CHUNKS + 32 / CHUNKS * turn;
  }
  SPARSE_ATTN_DEVICE unsigned byte() const {
    return 16 * (lane % CHUNKS);
  }
  SPARSE_ATTN_DEVICE uint32_t piece(int turn) const {
    return (address(lane / CHUNKS, lane % CHUNKS) ^ (CHUNKS == 8 ? turn % 2 * 64 : 0)) + 512 * turn;
  }

  // What a lane points at: to load a left factor of the matrix unit; to store columns 32 * block + (0 to 31) of 8 rows.
  SPARSE_ATTN_DEVICE uint32_t left_factor(int part) const {
    return address(lane % 16, lane / 16) ^ (32 * part);
  }
  SPARSE_ATTN_DEVICE uint32_t matrix_row(int half, int block) const {
    return (address(lane % 8, lane / 8) ^ (64 * block)) + 8 * ROW_BYTES * half;
  }

  // Sends for rows from `first_row` of the group on, with zeros for those that are not real; `first` is the head's
  // first.
  SPARSE_ATTN_DEVICE void send_for(char* first, const Rows& rows, int first_row, int rows_end) const {
    first += byte();
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      const int own = first_row + row(turn);
      copy_async(piece(turn), row_of(first, rows, own), own >= rows_end);
    }
  }

  // The rows as a left factor.
  template <int PARTS>
  SPARSE_ATTN_DEVICE void take(uint32_t (&factor)[PARTS][4]) const {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      load_matrices(factor[part], left_factor(part));
    }
  }

  // Writes the group's results to the rows that are stored. Through shared memory: there lanes put what they have of a
  // row, and take 16 bytes of one.
  template <Element ELEMENT, int HEAD_DIM>
  SPARSE_ATTN_DEVICE void write(
      const Output<HEAD_DIM>& output, char* first, const Rows& rows, int first_row, int rows_stored) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < HEAD_DIM / 32; ++block) {
        uint32_t chunk[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&values)[4] = output[4 * block + i];
          chunk[i] = pack<ELEMENT>(values[2 * half], values[2 * half + 1]);
        }
        store_matrices(matrix_row(half, block), chunk);
      }
    }
    warp_barrier();
    first += byte();
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      const int own = first_row + row(turn);
      uint32_t words[4];
      load_shared_words(words, piece(turn));
      if (own < rows_stored) {
        store_words(row_of(first, rows, own), words);
      }
    }
    warp_barrier();
  }
};

}  // namespace sparse_attn
