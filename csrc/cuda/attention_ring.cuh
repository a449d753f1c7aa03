// How keys and values come into shared memory: a block takes items, heads of sequences, one after the other; each fills
// a slot of a ring, in jobs that any warp does, while other slots are being read. Include fragments.cuh (or the
// emulator's) before.
#pragma once

#include "attention_schedule.cuh"
#include "attention_steps.cuh"

namespace sparse_attn {

// A slot is filled by a job that lists its groups, as many as this for the keys, then as many for the values.
constexpr int JOBS_OF_A_HALF = 4, JOBS = 1 + 2 * JOBS_OF_A_HALF;
constexpr int COPIES_AT_ONCE = 8;

// 16 queries and their list: `steps` of it can hold keys of the sequence, from `partial` on some of which are hidden,
// and from `masked` on not all rows keep all keys.
struct Group {
  uint32_t packed;
  int first_step;

  SPARSE_ATTN_DEVICE static uint32_t pack(int number, int steps, int partial, int masked) {
    return static_cast<uint32_t>(number | steps << 8 | partial << 16 | masked << 24);
  }
  SPARSE_ATTN_DEVICE int first_row() const {
    return static_cast<int>(packed & 255) * GROUP_ROWS;
  }
  SPARSE_ATTN_DEVICE int steps() const {
    return static_cast<int>(packed >> 8 & 255);
  }
  SPARSE_ATTN_DEVICE int partial() const {
    return static_cast<int>(packed >> 16 & 255);
  }
  SPARSE_ATTN_DEVICE int masked() const {
    return static_cast<int>(packed >> 24);
  }
};

// A slot, and the phase of its barriers: a warp's place in the ring.
struct Seat {
  int slot;
  bool odd;
};

// The ring as one warp sees it, which takes groups of one of the block's items, the `round`th. All warps do the jobs of
// filling slots, in the order of the items, whenever they find a slot free.
template <int ROW_BYTES>
class Ring {
  static constexpr int CHUNKS = ROW_BYTES / 16, ROWS_AT_ONCE = 32 / CHUNKS;
  static constexpr int BLOCK_ROWS = COPIES_AT_ONCE * ROWS_AT_ONCE;
  static constexpr uint32_t NO_JOB = 0xffffffffu;  // jobs are counted over all rounds

  const AttentionCall& call;
  const Schedule schedule;
  int round = -1;

 public:
  Seat seat;

  SPARSE_ATTN_DEVICE explicit Ring(const AttentionCall& call)
      : call(call), schedule(call), seat{call.memory.slots - 1, true} {
  }

  // What all warps do together at first.
  SPARSE_ATTN_DEVICE void start() const {
    const int warps = thread_count() / 32;
    if (thread_number() == 0) {
      for (int number = 0; number < call.memory.slots; ++number) {
        start_barrier(barrier(number, KEYS_ARRIVED), 32 * JOBS_OF_A_HALF + 32);
        start_barrier(barrier(number, VALUES_ARRIVED), 32 * JOBS_OF_A_HALF);
        start_barrier(barrier(number, SLOT_FREE), warps);
      }
      store_shared(jobs_taken(), 0);
    }
    schedule.start();
    block_barrier();
  }

  SPARSE_ATTN_DEVICE void await_values(Seat seat) const {
    await(seat, VALUES_ARRIVED);
  }

  // Leaves the item for the next one, whose slot is free then. Returns false where there is no other item.
  SPARSE_ATTN_DEVICE bool advance() {
    if (round >= 0) {
      leave(seat);
    }
    ++round;
    seat = next_seat();
    if (schedule.item_of(round) >= call.items) {
      return false;
    }
    if (round >= call.memory.slots) {
      await({seat.slot, !seat.odd}, SLOT_FREE);
    }
    return true;
  }

  // Whether there are jobs of the item that no warp has taken.
  SPARSE_ATTN_DEVICE bool has_jobs() const {
    return has_jobs(round);
  }

  SPARSE_ATTN_DEVICE void await_keys() const {
    await(seat, KEYS_ARRIVED);
  }

  // Goes on to the next item, if that has arrived, without leaving this one; says whether it did.
  SPARSE_ATTN_DEVICE bool advance_at_once() {
    const Seat next = next_seat();
    if (next.slot == seat.slot || schedule.item_of(round + 1) >= call.items || has_jobs(round + 1) ||
        ballot(!has_passed(barrier(next.slot, KEYS_ARRIVED), next.odd))) {
      return false;
    }
    ++round;
    seat = next;
    return true;
  }

  // A slot is free when all warps have left it, and what it is filled with has arrived: where an item has no groups,
  // nobody else waits for its values.
  SPARSE_ATTN_DEVICE void leave(Seat seat) const {
    await_values(seat);
    warp_barrier();
    if (lane_number() == 0) {
      arrive(barrier(seat.slot, SLOT_FREE));
    }
  }

  // Does the next job whose item is known and whose slot is free, if there is one: `own_alone`, or else also of a later
  // item, which shall not delay the warp's own.
  SPARSE_ATTN_DEVICE void help(bool own_alone) const {
    const uint32_t job = uniform(load_shared_relaxed(jobs_taken()));
    const int wanted = static_cast<int>(job / JOBS);
    if (wanted > (own_alone ? round : round + call.memory.slots - 1)) {
      return;
    }
    const int item = schedule.item_of(wanted);
    if (item == Schedule::UNKNOWN || item >= call.items) {
      return;
    }
    uint32_t own = NO_JOB;
    if (lane_number() == 0 && is_free_for(wanted) && replace_shared(jobs_taken(), job, job + 1)) {
      own = job;  // no other warp was faster
    }
    own = uniform(own);
    if (own != NO_JOB) {
      fill(wanted, own % JOBS, item);
    }
  }

  SPARSE_ATTN_DEVICE uint32_t keys(Seat seat) const {
    return shared_memory() + seat.slot * call.memory.slot;
  }

  SPARSE_ATTN_DEVICE int fact(Seat seat, Fact name) const {
    return static_cast<int>(load_shared(fact_at(seat.slot, name)));
  }

  template <class T>
  SPARSE_ATTN_DEVICE T* pointer(Seat seat, Fact name) const {
    return static_cast<T*>(load_shared_pointer(fact_at(seat.slot, name)));
  }

  // The number of a group of the item that no warp has taken yet, or -1.
  SPARSE_ATTN_DEVICE int take_turn() const {
    uint32_t turn = 0;
    if (lane_number() == 0) {
      turn = add_shared(fact_at(seat.slot, GROUPS_TAKEN), 1);
    }
    turn = uniform(turn);
    return turn < static_cast<uint32_t>(uniform(fact(seat, GROUPS))) ? static_cast<int>(turn) : -1;
  }

  SPARSE_ATTN_DEVICE Group group_of(int turn) const {
    const uint32_t entry = info(seat.slot) + 8 * turn;
    return {uniform(load_shared(entry)), static_cast<int>(uniform(load_shared(entry + 4)))};
  }

 private:
  // Registers are scarce: what follows from the thread's number is computed anew.
  SPARSE_ATTN_DEVICE static int lane_number() {
    return static_cast<unsigned>(computed_here(thread_number())) % 32;
  }

  SPARSE_ATTN_DEVICE void await(Seat seat, Barrier name) const {
    while (!await_a_while(barrier(seat.slot, name), seat.odd)) {
    }
  }

  SPARSE_ATTN_DEVICE Seat next_seat() const {
    return seat.slot + 1 < call.memory.slots ? Seat{seat.slot + 1, seat.odd} : Seat{0, !seat.odd};
  }

  SPARSE_ATTN_DEVICE bool has_jobs(int round) const {
    return uniform(load_shared_relaxed(jobs_taken())) < static_cast<uint32_t>((round + 1) * JOBS);
  }

  SPARSE_ATTN_DEVICE uint32_t info(int slot) const {
    return shared_memory() + call.memory.infos + slot * INFO_BYTES;
  }

  SPARSE_ATTN_DEVICE uint32_t fact_at(int slot, Fact name) const {
    return info(slot) + FACTS_AT + 4 * name;
  }

  SPARSE_ATTN_DEVICE uint32_t barrier(int slot, Barrier name) const {
    return info(slot) + BARRIERS_AT + 8 * name;
  }

  SPARSE_ATTN_DEVICE uint32_t jobs_taken() const {
    return info(call.memory.slots);
  }

  SPARSE_ATTN_DEVICE void set(int slot, Fact name, int number) const {
    store_shared(fact_at(slot, name), static_cast<uint32_t>(number));
  }

  SPARSE_ATTN_DEVICE void set_pointer(int slot, Fact name, const void* pointer) const {
    store_shared_pointer(fact_at(slot, name), pointer);
  }

  SPARSE_ATTN_DEVICE int slot_of(int round) const {
    return static_cast<unsigned>(round) % static_cast<unsigned>(call.memory.slots);
  }

  // Whether all warps have left what was in the slot of a round before.
  SPARSE_ATTN_DEVICE bool is_free_for(int round) const {
    const unsigned before = round / static_cast<unsigned>(call.memory.slots) - 1;
    return round < call.memory.slots || has_passed(barrier(slot_of(round), SLOT_FREE), before % 2);
  }

  // A job of filling a slot with the item of a round.
  SPARSE_ATTN_DEVICE void fill(int round, int job, int item) const {
    const Place place = schedule.place_of(item);
    const int slot = slot_of(round);
    warp_barrier();  // the slot is free for all lanes
    if (job == 0) {
      const uint32_t next = lane_number() == 0 ? schedule.take_after(round) : 0;
      list_groups(place, slot);
      if (lane_number() == 0) {
        schedule.tell(round + 1, next);
      }
      arrive(barrier(slot, KEYS_ARRIVED));
      char* queries = first_row_of(call.query, place);
#pragma unroll 1
      for (int row = lane_number(); row < place.rows_end; row += 32) {
        prefetch(row_of(queries, call.query, row));
      }
      return;
    }
    const bool values = job > JOBS_OF_A_HALF;
    const uint32_t to = shared_memory() + slot * call.memory.slot + (values ? call.memory.values : 0);
    copy_rows(values ? call.value : call.key, place, (job - 1) % JOBS_OF_A_HALF, to);
    arrive_when_copied(barrier(slot, values ? VALUES_ARRIVED : KEYS_ARRIVED));
  }

  // Every JOBS_OF_A_HALF-th block of rows. A lane always takes the same piece of a row.
  SPARSE_ATTN_DEVICE void copy_rows(const Rows& rows, const Place& place, int first_block, uint32_t to) const {
    const unsigned lane = lane_number(), chunk = 16 * (lane % CHUNKS);
    const int first_row = first_block * BLOCK_ROWS + lane / CHUNKS;
    const uint32_t stride = ROWS_AT_ONCE * rows.row;
    const char* from = row_of(first_row_of(rows, place), rows, first_row) + chunk;
    const uint16_t* places = call.lists.places + place.head * call.lists.places_of_head +
                             (first_block * ROWS_AT_ONCE + lane / CHUNKS) * COPIES_AT_ONCE;
    constexpr int NEXT_PLACES = JOBS_OF_A_HALF * ROWS_AT_ONCE * COPIES_AT_ONCE;
    uint32_t pairs[COPIES_AT_ONCE / 2], next_pairs[COPIES_AT_ONCE / 2] = {};
    int left = place.keys_end - first_row;
    if (left > -static_cast<int>(lane / CHUNKS)) {
      load_words(next_pairs, places);
    }
#pragma unroll 1
    while (left > -static_cast<int>(lane / CHUNKS)) {
#pragma unroll
      for (int i = 0; i < COPIES_AT_ONCE / 2; ++i) {
        pairs[i] = next_pairs[i];
      }
      const int next_left = left - JOBS_OF_A_HALF * BLOCK_ROWS;
      if (next_left > -static_cast<int>(lane / CHUNKS)) {
        load_words(next_pairs, places + NEXT_PLACES);
      }
      if (call.key_padding) {
        copy_shown_rows(rows, place, place.keys_end - left, from, places, to, chunk);
      } else {
        const char* row = from;
#pragma unroll
        for (int i = 0; i < COPIES_AT_ONCE; ++i) {
          if (i * ROWS_AT_ONCE < left) {
            copy_async(to + ((pairs[i / 2] >> (16 * (i % 2)) & 0xffff) ^ chunk), row, false);
          }
          row += stride;
        }
      }
      from += static_cast<uint32_t>(JOBS_OF_A_HALF * COPIES_AT_ONCE) * stride;
      places += NEXT_PLACES;
      left = next_left;
    }
  }

  // A lane's rows of a block, from key `key` on. Keys that are padding may hold anything: zeros take their place.
  SPARSE_ATTN_DEVICE void copy_shown_rows(
      const Rows& rows,
      const Place& place,
      int key,
      const char* from,
      const uint16_t* places,
      uint32_t to,
      uint32_t chunk) const {
    const uint8_t* shown = call.key_padding + static_cast<int64_t>(place.sequence) * call.key_len;
#pragma unroll 1
    for (int i = 0; i < COPIES_AT_ONCE && key < place.keys_end; ++i, key += ROWS_AT_ONCE) {
      copy_async(to + (places[i] ^ chunk), from, !shown[key]);
      from += ROWS_AT_ONCE * rows.row;
    }
  }

  // The item's groups, the longest list first. Each lane looks at one group of the head.
  SPARSE_ATTN_DEVICE void list_groups(const Place& place, int slot) const {
    const FragmentLists& lists = call.lists;
    const int lane = lane_number();
    const int group = lists.order[place.head * MAX_GROUPS + lane], first_row = group * GROUP_ROWS;
    const bool stored = group < lists.groups && first_row < place.rows_stored;
    const uint32_t live = ballot(stored);
    const int turn = count_bits(live & ((1u << lane) - 1));
    if (lane == 0) {
      set(slot, GROUPS, (count_bits(live) - place.part + call.parts - 1) / call.parts);
      set(slot, GROUPS_TAKEN, 0);
      set(slot, SEQUENCE, place.sequence);
      set(slot, HEAD, place.head);
      set(slot, FIRST_TOKEN, place.first_token);
      set_pointer(slot, QUERIES, first_row_of(call.query, place));
      set_pointer(slot, OUTPUTS, first_row_of(call.output, place));
      if (call.lse) {
        set_pointer(slot, LSES, call.lse + first_lse(call, place));
      }
      set(slot, ROWS_END, place.rows_end);
      set(slot, ROWS_STORED, place.rows_stored);
      set(slot, KEYS_END, place.keys_end);
    }
    if (!stored || turn % call.parts != place.part) {
      return;
    }
    const int list = place.head * lists.groups + group;
    const int32_t* counts = lists.counts + list * (lists.blocks + 1);
    const int last_key = call.causal ? first_row + GROUP_ROWS : MAX_LENGTH;
    const int first_hidden = call.key_padding ? 0 : call.causal ? first_row + 1 : MAX_LENGTH;
    const int end = min(place.keys_end, last_key), shown = min(place.keys_end, first_hidden);
    const int all_steps = (counts[lists.blocks] + STEP_KEYS - 1) / STEP_KEYS;
    int steps = 0;
    if (first_row < place.rows_end) {
      steps = (counts[min((end + STEP_KEYS - 1) / STEP_KEYS, lists.blocks)] + STEP_KEYS - 1) / STEP_KEYS;
    }
    const int partial = shown >= lists.keys ? all_steps : counts[shown / STEP_KEYS] / STEP_KEYS;
    // The last step of a full list has lanes without a key of their own.
    const int masked = lists.full ? max(min(partial, all_steps - 1), 0) : 0;
    const uint32_t entry = info(slot) + 8 * (turn / call.parts);
    store_shared(entry, Group::pack(group, steps, partial, masked));
    store_shared(entry + 4, lists.first_steps[list]);
  }
};

}  // namespace sparse_attn
