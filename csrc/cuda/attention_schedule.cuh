// Which items a block takes, one a round, and where they lie. An item is a head of a sequence, or a part of its groups.
// Include fragments.cuh (or the emulator's) before.
#pragma once

#include "attention_call.h"

namespace sparse_attn {

// Where an item lies: a head of a sequence, the ends of its real rows and keys, and the end of the rows that are
// stored. `part` is its share of the groups.
struct Place {
  int sequence, first_token, head, part, rows_end, rows_stored, keys_end;
};

// The first row of an item.
SPARSE_ATTN_DEVICE char* first_row_of(const Rows& rows, const Place& place) {
  return rows.data + place.sequence * rows.batch + place.head * rows.head +
         static_cast<int64_t>(place.first_token) * rows.row;
}

// How many floats after `call.lse`'s start an item's first query has its own.
SPARSE_ATTN_DEVICE int64_t first_lse(const AttentionCall& call, const Place& place) {
  return place.sequence * call.lse_batch + place.head * call.lse_head + place.first_token;
}

// A row of a head, from the first one on.
SPARSE_ATTN_DEVICE char* row_of(char* first, const Rows& rows, int row) {
  return first + static_cast<uint64_t>(static_cast<uint32_t>(row)) * rows.row;
}

// Items come with the heaviest first. A block's first one is that of its own number; it takes the following ones from a
// counter that all blocks share, so that those with light items take more of them, or where there is no counter in
// turn. Which item a round has is known when the round before has its keys, and told to all warps in shared memory.
class Schedule {
  const AttentionCall& call;

  // A word for a round: the item, and in the lowest bit whether the round is in an odd lap around these words.
  SPARSE_ATTN_DEVICE uint32_t word_at(int round) const {
    return shared_memory() + call.memory.rounds + round % KNOWN_ROUNDS * 4;
  }

  SPARSE_ATTN_DEVICE static uint32_t lap_is_odd(int round) {
    return round / KNOWN_ROUNDS % 2;
  }

  SPARSE_ATTN_DEVICE uint32_t sequence_at(int rank) const {
    return shared_memory() + call.memory.rounds + 4 * (KNOWN_ROUNDS + rank);
  }

  SPARSE_ATTN_DEVICE uint32_t length_at(int sequence) const {
    return sequence_at(call.memory.sorted + sequence);
  }

  SPARSE_ATTN_DEVICE int rows_of(int sequence) const {
    return call.query_lengths ? min(max(call.query_lengths[sequence], 0), call.query_len) : call.query_len;
  }

  SPARSE_ATTN_DEVICE int keys_of(int sequence) const {
    return call.key_lengths ? min(max(call.key_lengths[sequence], 0), call.key_len) : call.key_len;
  }

  // Sequences by their length, the longest first.
  SPARSE_ATTN_DEVICE void sort() const {
    const int sequences = call.memory.sorted;
    for (int own = thread_number(); own < sequences; own += thread_count()) {
      const int length =
          call.cu_seqlens ? call.cu_seqlens[own + 1] - call.cu_seqlens[own] : rows_of(own) + keys_of(own);
      store_shared(length_at(own), static_cast<uint32_t>(length));
    }
    block_barrier();
    for (int own = thread_number(); own < sequences; own += thread_count()) {
      const auto length = static_cast<int>(load_shared(length_at(own)));
      int rank = 0;
#pragma unroll 4
      for (int other = 0; other < sequences; ++other) {
        const auto its_length = static_cast<int>(load_shared(length_at(other)));
        rank += its_length > length || (its_length == length && other < own);
      }
      store_shared(sequence_at(rank), static_cast<uint32_t>(own));
    }
  }

 public:
  static constexpr int UNKNOWN = -1;

  SPARSE_ATTN_DEVICE explicit Schedule(const AttentionCall& call) : call(call) {
  }

  // What all warps do together at first; they meet afterwards.
  SPARSE_ATTN_DEVICE void start() const {
    if (thread_number() < KNOWN_ROUNDS) {
      const int round = thread_number();
      store_shared(word_at(round), round == 0 ? static_cast<uint32_t>(block_number()) << 1 : 1);
    }
    sort();
  }

  // The item of a round, for all lanes. Beyond the last item there is none, and no further round.
  SPARSE_ATTN_DEVICE int item_of(int round) const {
    const uint32_t word = uniform(load_shared_relaxed(word_at(round)));
    return (word & 1) == lap_is_odd(round) ? static_cast<int>(word >> 1) : UNKNOWN;
  }

  // Takes the item after that of `round`. To be called once for each item.
  SPARSE_ATTN_DEVICE uint32_t take_after(int round) const {
    if (call.ticket) {
      // As many tickets are taken as there are items: the last one leaves 0 for the next call.
      return block_count() + take_ticket(call.ticket, call.items - 1);
    }
    // Every other round goes through the blocks backwards.
    ++round;
    return round * block_count() + (round % 2 ? block_count() - 1 - block_number() : block_number());
  }

  SPARSE_ATTN_DEVICE void tell(int round, uint32_t item) const {
    store_shared_relaxed(word_at(round), item << 1 | lap_is_odd(round));
  }

  SPARSE_ATTN_DEVICE Place place_of(int item) const {
    const unsigned number = item, parts = call.parts, sequences = call.batch, heads = call.heads;
    const unsigned pair = number / parts;
    const auto part = static_cast<int>(number % parts);
    // Long sequences before short ones; where all are as long, heavy heads before light ones.
    const bool sorted = call.memory.sorted > 0;
    const auto rank = static_cast<int>(sorted ? pair % heads : pair / sequences);
    const int head = rank < MAX_ORDERED_HEADS ? call.heaviest[rank] : rank;
    const int batch = static_cast<int>(sorted ? load_shared(sequence_at(pair / heads)) : pair % sequences);
    if (call.cu_seqlens) {
      const int first = call.cu_seqlens[batch];
      // Shared memory has room for the length that the caller promised.
      const int length = min(call.cu_seqlens[batch + 1] - first, call.key_len);
      return {0, first, head, part, length, length, length};
    }
    return {batch, 0, head, part, rows_of(batch), call.query_len, keys_of(batch)};
  }
};

}  // namespace sparse_attn
