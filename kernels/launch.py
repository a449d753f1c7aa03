"""Launching the kernels with an explicit configuration; what a launch needs is computed here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .configuration import ForwardConfig
from .forward import forward_kernel


@dataclass(frozen=True)
class Rounding:
    """A quantiser as the kernels take it.

    Attributes:
        levels: float32 [2 ** bits] on the device.
        mid_points: whether the levels are the mid-points of their bins, as published; computing those is cheaper.
        log2_threshold: log2 of the smallest probability that is not pruned.
        step: width of a bin in log2(p).
    """

    levels: Tensor
    mid_points: bool
    log2_threshold: float
    step: float


def forward_constants(
    head_dim: int,
    config: ForwardConfig,
    dtype: torch.dtype,
    *,
    levels: int = 0,
    mid_points: bool = True,
    full: bool = False,
    causal: bool = False,
    packed: bool = False,
    query_lengths: bool = False,
    key_lengths: bool = False,
    key_padding: bool = False,
    dropout: bool = False,
    store_lse: bool = False,
    stop_keys: int = 32,
) -> dict[str, object]:
    """The forward kernel's compile-time arguments."""
    return dict(
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        ROWS=config.rows,
        COLUMNS=config.columns,
        STOP_KEYS=stop_keys,
        LEVELS=levels,
        MID_POINTS=mid_points,
        FULL=full,
        CAUSAL=causal,
        PACKED=packed,
        HAS_QUERY_LENGTHS=query_lengths,
        HAS_KEY_LENGTHS=key_lengths,
        HAS_KEY_PADDING=key_padding,
        DROPOUT=dropout,
        STORE_LSE=store_lse,
        # Three tf32 products keep what float32 inputs hold; a single one would cost them three digits.
        PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    stops: Tensor,
    columns: Tensor,
    row_bits: Tensor,
    config: ForwardConfig,
    *,
    stop_keys: int,
    full: bool,
    scale: float,
    rounding: Rounding | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    key_padding: Tensor | None,
    cu_seqlens: Tensor | None,
    max_length: int,
    causal: bool,
    query_offset: int,
    seed: Tensor | None,
    dropout: float,
    dropout_threshold: int,
) -> None:
    """Writes `output` (and `lse`, unless empty). Shapes are those of `sparse_attn.ops.AttentionCall`; the last
    dimension of `output` is contiguous; stops, columns and row_bits are ColumnLists for `config.rows`."""
    packed = cu_seqlens is not None
    if packed:
        batch, heads, head_dim = cu_seqlens.numel() - 1, query.shape[1], query.shape[2]
        query_len = key_len = max_length
        strides = [(0, t.stride(1), t.stride(0), t.stride(2)) for t in (query, key, value, output)]
        lse_strides = (0, lse.stride(0) if lse.numel() else 0)
    else:
        batch, heads, query_len, head_dim = query.shape
        key_len = key.shape[2]
        strides = [t.stride() for t in (query, key, value, output)]
        lse_strides = (lse.stride(0), lse.stride(1)) if lse.numel() else (0, 0)
    first_group = query_offset // config.rows
    last_group = -(-(query_offset + query_len) // config.rows)
    grid = (last_group - first_group, heads, batch)
    if 0 in grid:
        return
    constants = forward_constants(
        head_dim, config, query.dtype,
        levels=rounding.levels.numel() if rounding else 0, mid_points=rounding is None or rounding.mid_points,
        full=full, causal=causal, packed=packed,
        query_lengths=query_lengths is not None, key_lengths=key_lengths is not None,
        key_padding=key_padding is not None, dropout=seed is not None, store_lse=lse.numel() > 0, stop_keys=stop_keys,
    )  # fmt: skip
    absent = stops  # stands in for pointers that the kernel does not read
    forward_kernel[grid](
        query, key, value, output, lse if lse.numel() else output, stops, columns, row_bits,
        rounding.levels if rounding else absent,
        absent if query_lengths is None else query_lengths,
        absent if key_lengths is None else key_lengths,
        absent if key_padding is None else key_padding.view(torch.uint8),
        absent if cu_seqlens is None else cu_seqlens,
        absent if seed is None else seed,
        *strides[0], *strides[1], *strides[2], *strides[3][:3], *lse_strides,
        heads, stops.shape[0] // heads, stops.shape[1] - 1, query_len, key_len, query_offset, first_group,
        scale * math.log2(math.e),
        rounding.log2_threshold if rounding else 0.0, rounding.step if rounding else 1.0,
        dropout_threshold, 1.0 / (1.0 - dropout),
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
