"""The backward kernels: dQ over the column lists, dK and dV over those of the transposed mask.

    u = Q(p) * dropout, p = exp(s - lse)      s and lse as in the forward pass
    dv = u^T do
    dp = (do v^T) * dropout                   the gradient passes straight through the rounding
    ds = p * (dp - delta), delta = rowsum(p * dp)
    dq = ds k * scale, dk = ds^T q * scale

Every element is summed by one program in a fixed order: no atomics, the same bits on every run.
"""

import triton
import triton.language as tl

from .primitives import (
    LENGTHS,
    LN_2,
    drop,
    dropout_factors,
    dropout_row_numbers,
    kept_by_rows,
    list_of_group,
    list_scores,
    load_rows,
    program_place,
    round_to_levels,
    rows_of_group,
    sequence_bounds,
)


@triton.jit
def load_lse2(lse, rows, row_ok):
    """Base-2 log-sum-exp of rows: 0 for rows without kept columns, whose scores are -inf anyway, and infinite where
    `row_ok` is false, which makes all probabilities 0."""
    row_lse = tl.load(lse + rows, mask=row_ok, other=float("inf"))
    return tl.where(row_lse == float("-inf"), 0.0, row_lse) / LN_2


@triton.jit(do_not_specialize=LENGTHS)
def grad_query_kernel(
    query, key, value, output, grad_output, grad_query, lse, delta, stops, columns, step_bits, order,
    query_lengths, key_lengths, key_padding, cu_seqlens, seed,
    stride_query_batch, stride_query_head, stride_query_row, stride_query_dim,
    stride_key_batch, stride_key_head, stride_key_row, stride_key_dim,
    stride_value_batch, stride_value_head, stride_value_row, stride_value_dim,
    stride_output_batch, stride_output_head, stride_output_row,
    stride_grad_output_batch, stride_grad_output_head, stride_grad_output_row, stride_grad_output_dim,
    stride_grad_query_batch, stride_grad_query_head, stride_grad_query_row,
    stride_lse_batch, stride_lse_head,
    tiles, first_tile, first_group, heads, groups, key_blocks, query_len, key_len, query_offset,
    scale, scale_log2, dropout_threshold, dropout_factor,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STOP_KEYS: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr, ORDERED: tl.constexpr,
    ROUNDED: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_QUERY_LENGTHS: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr, HAS_KEY_PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one row group, and delta of its rows for the other kernel. Grid: sequences * tiles.

    Without rounding delta is rowsum(o * do); with it the output was made from other probabilities, so delta needs a
    pass over the list of its own.
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
    grad_output += (
        sequence * stride_grad_output_batch + head * stride_grad_output_head + first_token * stride_grad_output_row
    )
    grad_query += (
        sequence * stride_grad_query_batch + head * stride_grad_query_head + first_token * stride_grad_query_row
    )
    lse += sequence * stride_lse_batch + head * stride_lse_head + first_token
    delta += sequence * stride_lse_batch + head * stride_lse_head + first_token
    key_padding += batch * key_len
    row_numbers = dropout_row_numbers(batch, head, heads, first_token, rows, query_len, PACKED)
    seed_word = tl.zeros([], dtype=tl.uint32)
    if DROPOUT:
        seed_word = tl.load(seed).to(tl.uint32)

    if CAUSAL:
        keys_end = tl.minimum(keys_end, (group + 1) * ROWS)
    any_row = (group * ROWS - query_offset < rows_end) & (keys_end > 0)
    part_columns, part_bits, length = list_of_group(
        stops, columns, step_bits, head, groups, group, 0, key_blocks, keys_end, any_row, ROWS, PARTS, STOP_KEYS
    )

    q = load_rows(query, rows, row_ok, stride_query_row, dims, stride_query_dim, HEAD_DIM)
    do = load_rows(grad_output, rows, row_ok, stride_grad_output_row, dims, stride_grad_output_dim, HEAD_DIM)
    lse2 = load_lse2(lse, rows, row_ok)
    row_delta = tl.zeros([ROWS], tl.float32)
    if ROUNDED:
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
                v = load_rows(value, column, column_ok, stride_value_row, dims, stride_value_dim, HEAD_DIM)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                dp = drop(dp, seed_word, row_numbers, column, dropout_threshold, dropout_factor, DROPOUT)
                row_delta += tl.sum(tl.exp2(scores - lse2[:, None]) * dp, 1)
    else:
        o = load_rows(output, rows, row_ok, stride_output_row, dims, 1, HEAD_DIM)
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + rows, row_delta, mask=row_stored)

    accumulator = tl.zeros([ROWS, HEAD_BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        if PARTS > 1:
            part_columns, part_bits, length = list_of_group(
                stops, columns, step_bits, head, groups, group, part, key_blocks, keys_end, any_row, ROWS, PARTS,
                STOP_KEYS,
            )  # fmt: skip
        for entry in tl.range(0, length, COLUMNS):
            scores, k, column, column_ok = list_scores(
                q, key, stride_key_row, stride_key_dim, part_columns, part_bits, key_padding, entry, length, mask_rows,
                dims, scale_log2, part, HEAD_DIM, ROWS, COLUMNS, FULL, CAUSAL, HAS_KEY_PADDING, PRECISION,
            )  # fmt: skip
            v = load_rows(value, column, column_ok, stride_value_row, dims, stride_value_dim, HEAD_DIM)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            dp = drop(dp, seed_word, row_numbers, column, dropout_threshold, dropout_factor, DROPOUT)
            ds = tl.exp2(scores - lse2[:, None]) * (dp - row_delta[:, None])
            accumulator = tl.dot(ds.to(k.dtype), k, accumulator, input_precision=PRECISION)
    accumulator = tl.where(row_ok[:, None], accumulator * scale, 0.0)
    pointers = grad_query + rows[:, None] * stride_grad_query_row + dims[None, :]
    stored = row_stored[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, accumulator.to(grad_query.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=LENGTHS)
def grad_key_value_kernel(
    query, key, value, grad_output, grad_key, grad_value, lse, delta, stops, columns, step_bits, order, levels,
    query_lengths, key_lengths, key_padding, cu_seqlens, seed,
    stride_query_batch, stride_query_head, stride_query_row, stride_query_dim,
    stride_key_batch, stride_key_head, stride_key_row, stride_key_dim,
    stride_value_batch, stride_value_head, stride_value_row, stride_value_dim,
    stride_grad_output_batch, stride_grad_output_head, stride_grad_output_row, stride_grad_output_dim,
    stride_grad_key_batch, stride_grad_key_head, stride_grad_key_row,
    stride_lse_batch, stride_lse_head,
    tiles, first_tile, heads, groups, query_blocks, query_len, key_len, query_offset,
    scale, scale_log2, log2_threshold, step, dropout_threshold, dropout_factor,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STOP_KEYS: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr, ORDERED: tl.constexpr,
    LEVELS: tl.constexpr, MID_POINTS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_QUERY_LENGTHS: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr, HAS_KEY_PADDING: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one group of ROWS keys: walks the queries that keep any of them. Grid: sequences * tiles.

    stops, columns and step_bits belong to the transposed mask: rows are keys and columns are absolute query positions.
    """
    batch, head, group = program_place(order, tiles, first_tile, 0, heads, groups, ORDERED)
    sequence, first_token, rows_end, keys_end, rows_stored, keys_stored = sequence_bounds(
        batch, cu_seqlens, query_lengths, key_lengths, query_len, key_len, PACKED, HAS_QUERY_LENGTHS, HAS_KEY_LENGTHS
    )
    keys = group * ROWS + tl.arange(0, ROWS)
    key_ok = keys < keys_end
    dims = tl.arange(0, HEAD_BLOCK)

    query += sequence * stride_query_batch + head * stride_query_head + first_token * stride_query_row
    key += sequence * stride_key_batch + head * stride_key_head + first_token * stride_key_row
    value += sequence * stride_value_batch + head * stride_value_head + first_token * stride_value_row
    grad_output += (
        sequence * stride_grad_output_batch + head * stride_grad_output_head + first_token * stride_grad_output_row
    )
    grad_offset = sequence * stride_grad_key_batch + head * stride_grad_key_head + first_token * stride_grad_key_row
    lse += sequence * stride_lse_batch + head * stride_lse_head + first_token
    delta += sequence * stride_lse_batch + head * stride_lse_head + first_token
    if HAS_KEY_PADDING:
        key_ok = key_ok & (tl.load(key_padding + batch * key_len + keys, mask=key_ok, other=0) != 0)
    seed_word = tl.zeros([], dtype=tl.uint32)
    if DROPOUT:
        seed_word = tl.load(seed).to(tl.uint32)

    # The list of this group, up to the last real query. No real key: an empty list.
    queries_end = rows_end + query_offset
    any_key = (group * ROWS < keys_end) & (rows_end > 0)

    k = load_rows(key, keys, key_ok, stride_key_row, dims, stride_key_dim, HEAD_DIM)
    v = load_rows(value, keys, key_ok, stride_value_row, dims, stride_value_dim, HEAD_DIM)
    dk = tl.zeros([ROWS, HEAD_BLOCK], tl.float32)
    dv = tl.zeros([ROWS, HEAD_BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        part_columns, part_bits, length = list_of_group(
            stops, columns, step_bits, head, groups, group, part, query_blocks, queries_end, any_key, ROWS, PARTS,
            STOP_KEYS,
        )  # fmt: skip
        for entry in tl.range(0, length, COLUMNS):
            entries = entry + tl.arange(0, COLUMNS)
            in_list = entries < length
            position = tl.load(part_columns + entries, mask=in_list, other=0)
            rows = position - query_offset
            row_ok = in_list & (rows >= 0)
            q = load_rows(query, rows, row_ok, stride_query_row, dims, stride_query_dim, HEAD_DIM)
            do = load_rows(grad_output, rows, row_ok, stride_grad_output_row, dims, stride_grad_output_dim, HEAD_DIM)
            lse2 = load_lse2(lse, rows, row_ok)[None, :]
            row_delta = tl.load(delta + rows, mask=row_ok, other=0.0)[None, :]
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [ROWS keys, COLUMNS queries]
            if part > 0 or not FULL:
                kept = row_ok[None, :] & kept_by_rows(part_bits, entry, length, ROWS, COLUMNS)
                scores = tl.where(kept, scores, float("-inf"))
            if CAUSAL:
                scores = tl.where(keys[:, None] <= position[None, :], scores, float("-inf"))
            p = tl.exp2(scores - lse2)
            used = p
            if LEVELS > 0:
                used = round_to_levels(scores, lse2, log2_threshold, step, levels, LEVELS, MID_POINTS)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            if DROPOUT:
                row_numbers = dropout_row_numbers(batch, head, heads, first_token, rows, query_len, PACKED)
                factors = dropout_factors(
                    seed_word, row_numbers[None, :], keys[:, None], dropout_threshold, dropout_factor
                )
                used *= factors
                dp *= factors
            dv = tl.dot(used.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (dp - row_delta)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    dk, dv = tl.where(key_ok[:, None], dk * scale, 0.0), tl.where(key_ok[:, None], dv, 0.0)
    offsets = grad_offset + keys[:, None] * stride_grad_key_row + dims[None, :]
    stored = (keys < keys_stored)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(grad_key + offsets, dk.to(grad_key.dtype.element_ty), mask=stored)
    tl.store(grad_value + offsets, dv.to(grad_value.dtype.element_ty), mask=stored)
