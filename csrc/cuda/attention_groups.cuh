// How a warp goes through the groups of its block's items, and reads their lists. Include fragments.cuh (or the
// emulator's) before.
#pragma once

#include "attention_ring.cuh"

namespace sparse_attn {

// Takes groups until there are none left, looking one ahead. A worker is what one warp does with them:
//   ring, seat     the warp's place, and that of the group that is computed
//   Task           a group, `group`, with what is sent for ahead; Result
//   send(task)     sends for what the group of a task needs first, which lies in the item that the ring is at
//   receive(task)  takes it
//   compute(task, result), store(task.group, result)
// Results leave after the next group's rows have been taken: both go through the warp's scratch.
template <class Worker>
SPARSE_ATTN_DEVICE void take_groups(Worker& worker) {
  auto& ring = worker.ring;
  ring.start();
  typename Worker::Task next;
  bool next_exists = false;
  bool arriving = false;  // whether the warp's item is not there yet
  // Each piece of work has one place in this loop. That keeps the code small, which a kernel that starts has to read.
  while (true) {
    const typename Worker::Task task = next;
    const bool exists = next_exists;
    if (!exists && !arriving) {
      if (!ring.advance()) {
        return;
      }
      arriving = true;
    }
    const bool filling = arriving && ring.has_jobs();
    if (arriving && !filling) {
      ring.await_keys();
      arriving = false;
    }
    if (!filling) {
      worker.seat = ring.seat;
      int turn = ring.take_turn();
      if (turn < 0 && ring.advance_at_once()) {
        turn = ring.take_turn();
      }
      next_exists = turn >= 0;
      if (next_exists) {
        next.group = ring.group_of(turn);
        worker.send(next);
      }
      commit_copies();
    }
    if (filling || exists) {
      ring.help(filling);
    }
    commit_copies();
    typename Worker::Result result;
    if (exists) {
      worker.compute(task, result);
    }
    if (!filling) {
      await_copies<1>();  // those that were sent for before the last ones of the ring
      warp_barrier();
      if (next_exists) {
        worker.receive(next);
      }
      warp_barrier();  // the rows of the group after it come to the same place
    }
    if (exists) {
      worker.store(task.group, result);
    }
    if (!filling && ring.seat.slot != worker.seat.slot) {
      ring.leave(worker.seat);
    }
  }
}

// A word of a list without the bits of what lengths, padding and causality hide. Keys past the end are not in shared
// memory: the first row, of which nothing is used then, takes their place.
template <int ROW_BYTES>
SPARSE_ATTN_DEVICE uint32_t
without_hidden(const AttentionCall& call, const Ring<ROW_BYTES>& ring, Seat seat, const Group& group, uint32_t word) {
  const int lane = thread_number() % 32;
  const int key = static_cast<int>((word >> 16) / ROW_BYTES);
  const bool exists = key < ring.fact(seat, KEYS_END);
  bool shown = exists;
  if (call.key_padding && exists) {
    shown = call.key_padding[static_cast<int64_t>(ring.fact(seat, SEQUENCE)) * call.key_len + key];
  }
  uint32_t bits = 0;
  if (call.causal) {
    uint32_t rows = shown ? 0xffffu : 0;
    if (key > group.first_row()) {
      rows = key < group.first_row() + GROUP_ROWS ? rows << (key - group.first_row()) & 0xffffu : 0;
    }
#pragma unroll
    for (int i = 0; i < STEP_KEYS / 4; ++i) {
      const int tile = i / 2, side = i % 2;
      const uint32_t seen = from_lane(rows, 8 * tile + 2 * (lane % 4) + side) >> (lane / 4);
      bits |= (seen & 1) << (4 * tile + side) | (seen >> 8 & 1) << (4 * tile + side + 2);
    }
  } else {
    bits = ballot(shown) >> (2 * (lane % 4)) & 0x03030303u;  // two keys of a tile in each byte
    bits |= bits << 2;                                       // and for both rows
    bits = (bits | bits >> 4) & 0x00ff00ffu;
    bits = bits | bits >> 8;
  }
  return (exists ? word & 0xffff0000u : 0) | (word & bits & 0xffffu);
}

// Sends for the list of a group from step `first` on, a key a lane: in the upper half of a word where its rows lie in
// shared memory.
template <int STEPS>
SPARSE_ATTN_DEVICE void read_words(const AttentionCall& call, const Group& group, int first, uint32_t (&word)[STEPS]) {
  const uint32_t* list =
      call.lists.words + static_cast<int64_t>(group.first_step) * 32 + computed_here(thread_number() % 32);
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    word[i] = first + i < group.steps() ? list[(first + i) * 32] : 0;
  }
}

// Takes the bits of what is hidden from words that have come: it waits for them, as `read_words` does not.
template <int STEPS, int ROW_BYTES>
SPARSE_ATTN_DEVICE void hide(
    const AttentionCall& call,
    const Ring<ROW_BYTES>& ring,
    Seat seat,
    const Group& group,
    int first,
    uint32_t (&word)[STEPS]) {
#pragma unroll 1
  for (int step = max(first, group.partial()); step < min(first + STEPS, group.steps()); ++step) {
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      own = first + i == step ? word[i] : own;
    }
    const uint32_t shown = without_hidden(call, ring, seat, group, own);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      word[i] = first + i == step ? shown : word[i];
    }
  }
}

}  // namespace sparse_attn
