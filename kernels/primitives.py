"""Jitted pieces that kernels share: gathered loads, lists and their bits, softmax steps, rounding, dropout."""

import triton
import triton.language as tl

# Lengths change from call to call: kernels are not compiled again for them.
LENGTHS = [
    "tiles", "first_tile", "first_group", "query_len", "key_len", "query_offset", "stride_lse_batch", "stride_lse_head",
]  # fmt: skip
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, row_ok, stride_row, dims, stride_dim, HEAD_DIM: tl.constexpr):
    """Rows of a [length, head_dim] matrix at `rows`, zeros where `row_ok` is false. -> [rows, dims]"""
    pointers = base + rows[:, None] * stride_row + dims[None, :] * stride_dim
    if dims.shape[0] == HEAD_DIM:
        return tl.load(pointers, mask=row_ok[:, None], other=0.0)
    return tl.load(pointers, mask=row_ok[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def lowest_bits(count):
    """A word whose `count` lowest bits are set, all of them from 32 on."""
    return tl.where(count < 32, (1 << count) - 1, -1)


@triton.jit
def kept_by_rows(step_bits, entry, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which rows of a group keep the entries from `entry` on, of a part with `length` entries whose bits begin at
    `step_bits`; none keeps what is past the end. -> bool [ROWS, COLUMNS]"""
    row, place = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    step_bits += entry // 32 * ROWS + row
    words = tl.load(step_bits)
    if COLUMNS < 32:
        words = words >> entry % 32
    words = (words & lowest_bits(length - entry))[:, None]
    for word in tl.static_range(1, COLUMNS // 32):
        existing = lowest_bits(tl.maximum(length - entry - 32 * word, 0))
        following = tl.load(step_bits + word * ROWS, mask=tl.full([ROWS], existing, tl.int32) != 0, other=0)
        words = tl.where((place // 32 == word)[None, :], (following & existing)[:, None], words)
    return ((words >> (place % 32)[None, :]) & 1) != 0


@triton.jit
def list_scores(
    q, key, stride_key_row, stride_key_dim, columns, step_bits, key_padding, entry, length, mask_rows, dims, scale_log2,
    part: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FULL: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_PADDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 scores of a part's entries from `entry` on, -inf where not kept. All rows keep what is in part 0, if FULL.
    -> [ROWS, COLUMNS], the keys' rows [COLUMNS, HEAD_BLOCK], columns, column_ok"""
    entries = entry + tl.arange(0, COLUMNS)
    column_ok = entries < length
    column = tl.load(columns + entries, mask=column_ok, other=0)
    if HAS_KEY_PADDING:
        column_ok = column_ok & (tl.load(key_padding + column, mask=column_ok, other=0) != 0)
    k = load_rows(key, column, column_ok, stride_key_row, dims, stride_key_dim, HEAD_DIM)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if part > 0 or not FULL:
        kept = kept_by_rows(step_bits, entry, length, ROWS, COLUMNS)
        if HAS_KEY_PADDING:
            kept = kept & column_ok[None, :]
    else:
        kept = column_ok[None, :]
    if CAUSAL:
        kept = kept & (column[None, :] <= mask_rows[:, None])
    return tl.where(kept, scores, float("-inf")), k, column, column_ok


@triton.jit
def softmax_step(scores, row_max, row_sum):
    """One step of the online softmax over base-2 scores [rows, columns], pruned ones -inf.

    -> exponentials relative to the new maximum, the new maximum and sum, and the factor for what was accumulated.
    A row without any kept column keeps the maximum -inf; 0 is subtracted there, so that nothing becomes NaN.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    exponentials = tl.exp2(scores - finite_max[:, None])
    correction = tl.exp2(row_max - finite_max)
    return exponentials, new_max, row_sum * correction + tl.sum(exponentials, 1), correction


@triton.jit
def finite_lse2(row_max, row_sum):
    """Base-2 log-sum-exp of rows, 0 for rows without kept columns (their scores are -inf anyway)."""
    has_keys = row_sum != 0.0  # NaN stays
    return tl.where(has_keys, row_max + tl.log2(tl.where(has_keys, row_sum, 1.0)), 0.0)


@triton.jit
def round_to_levels(scores, lse2, log2_threshold, step, levels, LEVELS: tl.constexpr, MID_POINTS: tl.constexpr):
    """Rounded probabilities straight from base-2 scores: p = 2 ** (score - lse2) falls into a bin of width `step`.

    `lse2` broadcasts against `scores`.

    The value of a bin is its mid-point (MID_POINTS) or comes from `levels` [LEVELS]. It is selected, not loaded by
    index: the compiler would try to pipeline such a load, and some of its versions fail at that.
    """
    position = (scores - lse2) * (1.0 / step) - log2_threshold * (1.0 / step)
    # Bin 0 holds what is below the threshold; the bins above it are counted from 0. NaN is in none, and stays.
    above = tl.floor(tl.minimum(position, LEVELS - 2.0, propagate_nan=tl.PropagateNan.ALL))
    if MID_POINTS:
        return tl.where(above < 0.0, 0.0, tl.exp2(above * step + (log2_threshold + 0.5 * step)))
    rounded = tl.zeros_like(scores)
    for index in tl.static_range(1, LEVELS):
        rounded = tl.where(above == index - 1, tl.load(levels + index), rounded)
    return tl.where(above == above, rounded, above)


@triton.jit
def mix32(word):
    """The hash of `sparse_attn.dropout.mix32` on uint32."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def dropout_factors(seed, row_numbers, keys, threshold, factor):
    """0 where a probability is dropped and `factor` where not, as `sparse_attn.dropout` says.

    `row_numbers` and `keys` broadcast against each other to the shape of the result.
    """
    row_words = mix32(row_numbers.to(tl.uint32) * 0x9E3779B1 + seed)
    words = mix32(row_words + keys.to(tl.uint32) * 0x85EBCA77)
    return tl.where(words >= threshold, factor, 0.0)


@triton.jit
def drop(p, seed, row_numbers, keys, threshold, factor, DROPOUT: tl.constexpr):
    """Probabilities [rows, keys] after dropout, if there is any."""
    if DROPOUT:
        return p * dropout_factors(seed, row_numbers[:, None], keys[None, :], threshold, factor)
    return p


@triton.jit
def sequence_bounds(
    batch, cu_seqlens, query_lengths, key_lengths, query_len, key_len,
    PACKED: tl.constexpr, HAS_QUERY_LENGTHS: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Where a sequence lies: its index in padded tensors, its first token in packed ones, the ends of its real rows and
    keys, counted within the sequence, and the ends of what is stored for it."""
    if PACKED:
        first_token = tl.load(cu_seqlens + batch).to(tl.int64)
        length = (tl.load(cu_seqlens + batch + 1) - first_token).to(tl.int32)
        length = tl.minimum(length, query_len)  # a traced call's max_length is not checked: nothing lies beyond
        return tl.zeros([], dtype=tl.int64), first_token, length, length, length, length
    rows_end = query_len
    keys_end = key_len
    if HAS_QUERY_LENGTHS:
        rows_end = tl.minimum(rows_end, tl.load(query_lengths + batch))
    if HAS_KEY_LENGTHS:
        keys_end = tl.minimum(keys_end, tl.load(key_lengths + batch))
    return batch, tl.zeros([], dtype=tl.int64), rows_end, keys_end, query_len, key_len


@triton.jit
def dropout_row_numbers(batch, head, heads, first_token, rows, query_len, PACKED: tl.constexpr):
    """The dropout counters of query rows: their number over batch, heads and rows, or over tokens and heads."""
    if PACKED:
        return (first_token + rows) * heads + head
    return (batch * heads + head) * query_len + rows


@triton.jit
def program_place(order, tiles, first_tile, first_group, heads, groups, ORDERED: tl.constexpr):
    """Which sequence, head and row group a program computes. Programs of a sequence follow each other: it has `tiles`.

    ORDERED: as the entries of `order` from `first_tile` on say; otherwise head by head, from `first_group` on.
    """
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    tile = program % tiles
    if ORDERED:
        list_index = tl.load(order + first_tile + tile)
        return batch, (list_index // groups).to(tl.int64), list_index % groups
    head_tiles = tiles // heads
    return batch, (tile // head_tiles).to(tl.int64), first_group + tile % head_tiles


@triton.jit
def rows_of_group(group, query_offset, rows_end, rows_stored, ROWS: tl.constexpr):
    """A group's rows of the mask and of the sequence, which of these are real, and which are stored. -> each [ROWS]"""
    mask_rows = group * ROWS + tl.arange(0, ROWS)
    rows = mask_rows - query_offset
    return mask_rows, rows, (rows >= 0) & (rows < rows_end), (rows >= 0) & (rows < rows_stored)


@triton.jit
def list_of_group(
    stops, columns, step_bits, head, groups, group, part, blocks, end, not_empty,
    ROWS: tl.constexpr, PARTS: tl.constexpr, STOP_KEYS: tl.constexpr,
):  # fmt: skip
    """A part of a group's list up to position `end`: where its columns and step bits begin, and its entries."""
    part += (head * groups + group) * PARTS
    stops += part * (blocks + 1)
    last_stop = tl.where(not_empty, (end + STOP_KEYS - 1) // STOP_KEYS, 0)
    start, stop = tl.load(stops), tl.load(stops + last_stop)
    # The stop is at most STOP_KEYS - 1 positions too far: the columns between are the last ones before it.
    tail = stop - STOP_KEYS + tl.arange(0, STOP_KEYS)
    in_list = tail >= tl.where(end % STOP_KEYS == 0, stop, start)
    position = tl.load(columns + tail, mask=in_list, other=0)
    beyond = tl.sum((in_list & (position >= end)).to(tl.int32), 0)
    return columns + start, step_bits + (start // 32 + part) * ROWS, stop - start - beyond
