"""The forward kernel: a program owns one group of query rows of one head and walks the group's column list."""

import triton
import triton.language as tl

from .primitives import (
    LENGTHS,
    LN_2,
    drop,
    dropout_row_numbers,
    finite_lse2,
    list_of_group,
    list_scores,
    load_rows,
    program_place,
    round_to_levels,
    rows_of_group,
    sequence_bounds,
    softmax_step,
)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    query, key, value, output, lse, stops, columns, step_bits, order, levels,
    query_lengths, key_lengths, key_padding, cu_seqlens, seed,
    stride_query_batch, stride_query_head, stride_query_row, stride_query_dim,
    stride_key_batch, stride_key_head, stride_key_row, stride_key_dim,
    stride_value_batch, stride_value_head, stride_value_row, stride_value_dim,
    stride_output_batch, stride_output_head, stride_output_row,
    stride_lse_batch, stride_lse_head,
    tiles, first_tile, first_group, heads, groups, key_blocks, query_len, key_len, query_offset,
    scale_log2, log2_threshold, step, dropout_threshold, dropout_factor,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
    STOP_KEYS: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr, ORDERED: tl.constexpr,
    LEVELS: tl.constexpr, MID_POINTS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_QUERY_LENGTHS: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr, HAS_KEY_PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, STORE_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = Q(softmax(q k^T * scale over kept keys)) v for one row group. Grid: sequences * tiles.

    A list of at most HELD entries is taken at once. A longer one goes in steps of COLUMNS: one pass of online softmax
    without rounding (LEVELS == 0); with it the normaliser must be known first, so a pass computes that and a second
    one rounds straight from the scores.
    """
    batch, head, group = program_place(order, tiles, first_tile, first_group, heads, groups, ORDERED)
    sequence, first_token, rows_end, keys_end, rows_stored, keys_stored = sequence_bounds(
        batch, cu_seqlens, query_lengths, key_lengths, query_len, key_len, PACKED, HAS_QUERY_LENGTHS, HAS_KEY_LENGTHS
    )
    mask_rows, rows, row_ok, row_stored = rows_of_group(group, query_offset, rows_end, rows_stored, ROWS)
    dims = tl.arange(0, HEAD_BLOCK)

    query += sequence * stride_query_batch + head * stride_query_head + first_token * stride_query_row
    key += sequence * stride_key_batch + head * stride_key_head + first_token * stride_key_row
    value += sequence * stride_value_batch + head * stride_value_head + first_token * stride_value_row
    output += sequence * stride_output_batch + head * stride_output_head + first_token * stride_output_row
    key_padding += batch * key_len
    row_numbers = dropout_row_numbers(batch, head, heads, first_token, rows, query_len, PACKED)
    seed_word = tl.zeros([], dtype=tl.uint32)
    if DROPOUT:
        seed_word = tl.load(seed).to(tl.uint32)

    # The list of this group, up to the last key that any of its rows can see. No real row: an empty list.
    if CAUSAL:
        keys_end = tl.minimum(keys_end, (group + 1) * ROWS)
    any_row = (group * ROWS - query_offset < rows_end) & (keys_end > 0)
    part_columns, part_bits, length = list_of_group(
        stops, columns, step_bits, head, groups, group, 0, key_blocks, keys_end, any_row, ROWS, PARTS, STOP_KEYS
    )
    MAY_HOLD: tl.constexpr = HELD > 0 and PARTS == 1
    in_steps = True
    if MAY_HOLD:
        in_steps = length > HELD

    q = load_rows(query, rows, row_ok, stride_query_row, dims, stride_query_dim, HEAD_DIM)  # [ROWS, HEAD_BLOCK]
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, HEAD_BLOCK], tl.float32)
    if in_steps:
        for part in tl.static_range(PARTS):
            if PARTS > 1:
                part_columns, part_bits, length = list_of_group(
                    stops, columns, step_bits, head, groups, group, part, key_blocks, keys_end, any_row, ROWS, PARTS,
                    STOP_KEYS,
                )  # fmt: skip
            for entry in tl.range(0, length, COLUMNS):
                scores, k, column, column_ok = list_scores(
                    q, key, stride_key_row, stride_key_dim, part_columns, part_bits, key_padding, entry, length,
                    mask_rows, dims, scale_log2, part, HEAD_DIM, ROWS, COLUMNS, FULL, CAUSAL, HAS_KEY_PADDING,
                    PRECISION,
                )  # fmt: skip
                p, row_max, row_sum, correction = softmax_step(scores, row_max, row_sum)
                if LEVELS == 0:
                    p = drop(p, seed_word, row_numbers, column, dropout_threshold, dropout_factor, DROPOUT)
                    v = load_rows(value, column, column_ok, stride_value_row, dims, stride_value_dim, HEAD_DIM)
                    accumulator = accumulator * correction[:, None]
                    accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision=PRECISION)
        if LEVELS > 0:
            lse2 = (finite_lse2(row_max, row_sum) * LN_2 / LN_2)[:, None]  # as the backward pass will see it
            for part in tl.static_range(PARTS):
                if PARTS > 1:
                    part_columns, part_bits, length = list_of_group(
                        stops, columns, step_bits, head, groups, group, part, key_blocks, keys_end, any_row, ROWS,
                        PARTS, STOP_KEYS,
                    )  # fmt: skip
                for entry in tl.range(0, length, COLUMNS):
                    scores, k, column, column_ok = list_scores(
                        q, key, stride_key_row, stride_key_dim, part_columns, part_bits, key_padding, entry, length,
                        mask_rows, dims, scale_log2, part, HEAD_DIM, ROWS, COLUMNS, FULL, CAUSAL, HAS_KEY_PADDING,
                        PRECISION,
                    )  # fmt: skip
                    p = round_to_levels(scores, lse2, log2_threshold, step, levels, LEVELS, MID_POINTS)
                    p = drop(p, seed_word, row_numbers, column, dropout_threshold, dropout_factor, DROPOUT)
                    v = load_rows(value, column, column_ok, stride_value_row, dims, stride_value_dim, HEAD_DIM)
                    accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision=PRECISION)
    elif MAY_HOLD:
        scores, k, column, column_ok = list_scores(
            q, key, stride_key_row, stride_key_dim, part_columns, part_bits, key_padding, 0, length, mask_rows, dims,
            scale_log2, 0, HEAD_DIM, ROWS, HELD, FULL, CAUSAL, HAS_KEY_PADDING, PRECISION,
        )  # fmt: skip
        # Loaded before the softmax, so that the values are on their way meanwhile.
        v = load_rows(value, column, column_ok, stride_value_row, dims, stride_value_dim, HEAD_DIM)
        p, row_max, row_sum, correction = softmax_step(scores, row_max, row_sum)
        if LEVELS > 0:
            lse2 = (finite_lse2(row_max, row_sum) * LN_2 / LN_2)[:, None]  # as the backward pass will see it
            p = round_to_levels(scores, lse2, log2_threshold, step, levels, LEVELS, MID_POINTS)
        p = drop(p, seed_word, row_numbers, column, dropout_threshold, dropout_factor, DROPOUT)
        accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision=PRECISION)
    if LEVELS == 0:
        accumulator = accumulator / tl.where(row_sum != 0.0, row_sum, 1.0)[:, None]

    # Rows past the sequence's end may have seen a full list: they yield zeros and -inf like any row without keys.
    accumulator = tl.where(row_ok[:, None], accumulator, 0.0)
    pointers = output + rows[:, None] * stride_output_row + dims[None, :]
    stored = row_stored[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, accumulator.to(output.dtype.element_ty), mask=stored)
    if STORE_LSE:
        row_lse = tl.where(row_ok & (row_sum != 0.0), finite_lse2(row_max, row_sum) * LN_2, float("-inf"))
        lse += sequence * stride_lse_batch + head * stride_lse_head + first_token
        tl.store(lse + rows, row_lse, mask=row_stored)
