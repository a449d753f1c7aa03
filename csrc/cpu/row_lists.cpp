// Divides the column lists of groups of 16 rows: see sparse_attn.backends.row_lists.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <vector>

#include "attention.h"
#include "list_tensors.h"
#include "threads.h"

namespace sparse_attn {
namespace {

using torch::stable::Tensor;
using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t GROUPS_PER_TASK = 64;

template <class Visit>
void for_each_group(int64_t groups, const Visit& visit) {
  in_threads(groups, GROUPS_PER_TASK, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      visit(group);
    }
  });
}

// Of the entries [begin, end): shared(entry) for one that more than `few_rows` rows keep, else own(entry, row) for each
// row that keeps it.
template <class Shared, class Own>
void visit_entries(
    const int32_t* row_bits, int64_t begin, int64_t end, int64_t few_rows, const Shared& shared, const Own& own) {
  for (int64_t entry = begin; entry < end; ++entry) {
    auto rows = static_cast<uint32_t>(row_bits[entry]);
    if (std::popcount(rows) > few_rows) {
      shared(entry);
      continue;
    }
    for (; rows != 0; rows &= rows - 1) {
      own(entry, std::countr_zero(rows));
    }
  }
}

int32_t* writable(const Tensor& tensor) {
  return static_cast<int32_t*>(tensor.mutable_data_ptr());
}

// What more than `few_rows` rows of a group keep stays in its list, the rest goes to lists of its rows. Seven empty
// tensors where fewer than `least_moved` entries would go there, or rows would have more than `most_entries`.
SevenTensors divide_lists(
    const Tensor& stops,
    const Tensor& columns,
    const Tensor& row_bits,
    int64_t few_rows,
    int64_t least_moved,
    int64_t most_entries) {
  STD_TORCH_CHECK(row_bits.numel() == columns.numel(), "row_bits must be [entries, 1]");
  const int32_t *stop = stops_of(stops), *column = list_of(columns), *bits = list_of(row_bits);
  const int64_t groups = stops.size(0), blocks = stops.size(2) - 1;

  // Where the lists begin; at first their lengths, each in the place after its own.
  std::vector<int64_t> shared_starts(groups + 1), row_starts(groups * GROUP_ROWS + 1);
  for_each_group(groups, [&](int64_t group) {
    int64_t *shared_length = &shared_starts[group + 1], *row_lengths = &row_starts[group * GROUP_ROWS + 1];
    const int32_t* own_stops = stop + group * (blocks + 1);
    visit_entries(
        bits,
        own_stops[0],
        own_stops[blocks],
        few_rows,
        [=](int64_t) { ++*shared_length; },
        [=](int64_t, int row) { ++row_lengths[row]; });
  });
  std::partial_sum(shared_starts.begin(), shared_starts.end(), shared_starts.begin());
  std::partial_sum(row_starts.begin(), row_starts.end(), row_starts.begin());

  const auto new_list = [&](int64_t size) { return torch::stable::new_empty(columns, {size}); };
  const int64_t moved = columns.numel() - shared_starts.back(), own_count = row_starts.back();
  if (moved < std::max<int64_t>(1, least_moved) || own_count > most_entries) {
    return {new_list(0), new_list(0), new_list(0), new_list(0), new_list(0), new_list(0), new_list(0)};
  }
  const Tensor shared_stops = torch::stable::new_empty(stops, stops.sizes());
  const Tensor shared_columns = new_list(shared_starts.back()), shared_bits = new_list(shared_starts.back());
  const Tensor row_stops = new_list(groups * GROUP_ROWS + 1), row_columns = new_list(own_count);
  const Tensor sorted_columns = new_list(own_count), sorted_places = new_list(own_count);
  int32_t *to_stops = writable(shared_stops), *to_columns = writable(shared_columns), *to_bits = writable(shared_bits);
  int32_t *to_rows = writable(row_columns), *to_sorted = writable(sorted_columns), *to_places = writable(sorted_places);
  std::copy(row_starts.begin(), row_starts.end(), writable(row_stops));
  for_each_group(groups, [&](int64_t group) {
    const int64_t* starts = &row_starts[group * GROUP_ROWS];
    int64_t shared = shared_starts[group], lengths[GROUP_ROWS] = {}, sorted[GROUP_ROWS / SORTED_ROWS];
    for (int quarter = 0; quarter < GROUP_ROWS / SORTED_ROWS; ++quarter) {
      sorted[quarter] = starts[quarter * SORTED_ROWS];
    }
    for (int64_t block = group * (blocks + 1), last = block + blocks; block <= last; ++block) {
      to_stops[block] = static_cast<int32_t>(shared);
      visit_entries(
          bits,
          stop[block],
          block < last ? stop[block + 1] : stop[block],
          few_rows,
          [&](int64_t entry) {
            to_columns[shared] = column[entry];
            to_bits[shared++] = bits[entry];
          },
          [&](int64_t entry, int row) {
            const int64_t number = lengths[row]++, place = sorted[row / SORTED_ROWS]++;
            to_rows[starts[row] + number] = to_sorted[place] = column[entry];
            to_places[place] = static_cast<int32_t>(number * GROUP_ROWS + row);
          });
    }
  });
  return {shared_stops, shared_columns, shared_bits, row_stops, row_columns, sorted_columns, sorted_places};
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_IMPL(sparse_attn, CPU, library) {
  library.impl("divide_lists", TORCH_BOX(&sparse_attn::divide_lists));
}
