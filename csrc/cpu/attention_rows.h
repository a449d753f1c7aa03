// Where a sequence and a head's rows lie in a tensor, and how rows come from there to the kernels and back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "vector.h"

namespace sparse_attn::SPARSE_ATTN_ISA {

SPARSE_ATTN_INLINE int64_t padded_dim(int64_t head_dim) {
  return (head_dim + LANES - 1) / LANES * LANES;
}

// Where a sequence lies, as `sequence_bounds` of the Triton kernels says.
struct Sequence {
  int64_t index, first_token, rows_end, keys_end, rows_stored, keys_stored;
};

inline Sequence sequence_of(const Call& call, int64_t batch) {
  if (call.cu_seqlens) {
    const int64_t first = call.cu_seqlens[batch], length = call.cu_seqlens[batch + 1] - first;
    return {0, first, length, length, length, length};
  }
  const auto end = [](const int32_t* lengths, int64_t at, int64_t stored) {
    return lengths ? std::clamp<int64_t>(lengths[at], 0, stored) : stored;
  };
  return {
      batch,
      0,
      end(call.query_lengths, batch, call.query_len),
      end(call.key_lengths, batch, call.key_len),
      call.query_len,
      call.key_len};
}

// A head's rows of a tensor: element (row, dim) lies at data + (row * row_stride + dim * dim_stride) elements.
struct Head {
  Element element;
  char* data;
  int64_t row_stride, dim_stride, head_dim;
  bool plain;  // float32 rows that fill whole registers

  int64_t bytes() const {
    return element == Element::Float32 ? 4 : 2;
  }
  char* at(int64_t row, int64_t dim) const {
    return data + (row * row_stride + dim * dim_stride) * bytes();
  }
};

inline Head head_of(const Call& call, const Matrix& matrix, const Sequence& sequence, int64_t head) {
  const bool plain = call.element == Element::Float32 && matrix.dim == 1 && call.head_dim % LANES == 0;
  Head found{call.element, nullptr, matrix.row, matrix.dim, call.head_dim, plain};
  const int64_t first = sequence.index * matrix.batch + head * matrix.head + sequence.first_token * matrix.row;
  found.data = static_cast<char*>(matrix.data) + first * found.bytes();
  return found;
}

SPARSE_ATTN_INLINE Floats load_element(Element element, const void* from) {
  const auto* halves = static_cast<const uint16_t*>(from);
  return element == Element::Float32    ? load(static_cast<const float*>(from))
         : element == Element::BFloat16 ? load_bfloat16(halves)
                                        : load_float16(halves);
}

SPARSE_ATTN_INLINE void store_element(Element element, void* to, Floats lanes) {
  if (element == Element::Float32) {
    store(static_cast<float*>(to), lanes);
  } else if (element == Element::BFloat16) {
    store_bfloat16(static_cast<uint16_t*>(to), lanes);
  } else {
    store_float16(static_cast<uint16_t*>(to), lanes);
  }
}

// LANES elements of a row from `dim` on, zeros past head_dim.
SPARSE_ATTN_INLINE Floats load_dims(const Head& head, int64_t row, int64_t dim) {
  if (head.plain) {
    return load(reinterpret_cast<const float*>(head.data) + row * head.row_stride + dim);
  }
  if (head.dim_stride == 1 && dim + LANES <= head.head_dim) {
    return load_element(head.element, head.at(row, dim));
  }
  alignas(64) char elements[4 * LANES] = {};
  for (int64_t i = 0; i < std::min<int64_t>(LANES, head.head_dim - dim); ++i) {
    std::memcpy(elements + i * head.bytes(), head.at(row, dim + i), head.bytes());
  }
  return load_element(head.element, elements);
}

SPARSE_ATTN_INLINE void store_dims(const Head& head, int64_t row, int64_t dim, Floats lanes) {
  if (head.plain) {
    store(reinterpret_cast<float*>(head.data) + row * head.row_stride + dim, lanes);
    return;
  }
  if (head.dim_stride == 1 && dim + LANES <= head.head_dim) {
    store_element(head.element, head.at(row, dim), lanes);
    return;
  }
  alignas(64) char elements[4 * LANES];
  store_element(head.element, elements, lanes);
  for (int64_t i = 0; i < std::min<int64_t>(LANES, head.head_dim - dim); ++i) {
    std::memcpy(head.at(row, dim + i), elements + i * head.bytes(), head.bytes());
  }
}

// Rows [first, end) come into the L2 cache. Inlined by force, as all prefetches: as a function of its own, one that
// does nothing else counts as without effect.
SPARSE_ATTN_INLINE void prefetch_rows(const Head& head, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row) {
    for (int64_t byte = 0; byte < head.head_dim * head.bytes(); byte += 64) {
      __builtin_prefetch(head.at(row, 0) + byte, 0, 2);
    }
  }
}

// Rows of 32-bit words (floats, or pairs of bfloat16), as many as fill whole registers, `stride` bytes apart.
struct Rows {
  const char* data;
  int64_t stride;

  const char* at(int64_t row) const {
    return data + row * stride;
  }
};

// A head's rows as floats: the tensor's own where they have that form, else copies in `buffer`. `uses` says how often
// they are met, all together. Rows that are met often are fetched first, as fast as memory yields them, since in the
// order of lists they would come one by one; and copied if they lie apart: between other heads' they share few cache
// sets and fill many pages.
inline Rows float_rows_of(const Head& head, int64_t count, int64_t uses, float* buffer) {
  constexpr int64_t ROWS_AHEAD = 16;
  const int64_t dims = padded_dim(head.head_dim);
  const bool met_often = uses >= 2 * count;
  if (head.plain && (head.row_stride == dims || !met_often)) {
    if (met_often) {
      prefetch_rows(head, 0, count);
    }
    return {head.data, head.row_stride * 4};
  }
  for (int64_t row = 0; row < count; ++row) {
    prefetch_rows(head, row + ROWS_AHEAD, std::min(row + ROWS_AHEAD + 1, count));
    for (int64_t dim = 0; dim < dims; dim += LANES) {
      store(buffer + row * dims + dim, load_dims(head, row, dim));
    }
  }
  return {reinterpret_cast<const char*>(buffer), dims * 4};
}

// Rows from `first` on times a factor, transposed to [dims][LANES]; zeros in lanes that are not alive.
inline void load_lanes(const Head& head, int64_t first, uint32_t alive, float factor, float* lanes) {
  for (int64_t dim = 0; dim < padded_dim(head.head_dim); dim += LANES) {
    Floats block[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      block[lane] = alive >> lane & 1 ? load_dims(head, first + lane, dim) * factor : splat(0.0f);
    }
    transpose(block);
    for (int i = 0; i < LANES; ++i) {
      store(lanes + (dim + i) * LANES, block[i]);
    }
  }
}

// Rows from `first` on as floats, [LANES][dims]; zeros in lanes that are not alive.
inline void load_rows(const Head& head, int64_t first, uint32_t alive, float* rows) {
  const int64_t dims = padded_dim(head.head_dim);
  for (int lane = 0; lane < LANES; ++lane) {
    for (int64_t dim = 0; dim < dims; dim += LANES) {
      store(rows + lane * dims + dim, alive >> lane & 1 ? load_dims(head, first + lane, dim) : splat(0.0f));
    }
  }
}

// Where a group's outputs go: rows from `first` on of a tensor, those whose lane is stored, each times its lane's
// factor.
struct OutputRows {
  const Head& head;
  int64_t first;
  uint32_t stored;
  alignas(64) float factors[LANES];

  OutputRows(const Head& head, int64_t first, uint32_t stored, Floats lane_factors)
      : head(head), first(first), stored(stored) {
    store(factors, lane_factors);
  }
  SPARSE_ATTN_INLINE_MEMBER void write(int lane, int64_t dim, Floats sum) const {
    if (stored >> lane & 1) {
      store_dims(head, first + lane, dim, sum * factors[lane]);
    }
  }
};

}  // namespace sparse_attn::SPARSE_ATTN_ISA
