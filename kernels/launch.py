"""Launching the kernels with explicit configurations; what a launch needs is computed here and nowhere else."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dropout import drop_threshold
from ..layout import STOP_KEYS, order_of
from ..ops import AttentionCall
from ..quantization import QuantizationTable
from ..step_lists import StepLists
from .backward import grad_key_value_kernel, grad_query_kernel
from .configuration import KernelConfig
from .forward import forward_kernel


def common_constants(
    head_dim: int,
    config: KernelConfig,
    dtype: torch.dtype,
    *,
    parts: int = 1,
    full: bool = False,
    ordered: bool = True,
    causal: bool = False,
    packed: bool = False,
    query_lengths: bool = False,
    key_lengths: bool = False,
    key_padding: bool = False,
    dropout: bool = False,
    amd: bool = False,
) -> dict[str, object]:
    """The compile-time arguments that all kernels share."""
    # Three tf32 products keep what float32 inputs hold; a single one would cost them three digits.
    precision = "ieee" if amd else "tf32x3" if dtype == torch.float32 else "tf32"
    return dict(
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        ROWS=config.rows,
        COLUMNS=config.columns,
        STOP_KEYS=STOP_KEYS,
        PARTS=parts,
        FULL=full,
        ORDERED=ordered,
        CAUSAL=causal,
        PACKED=packed,
        HAS_QUERY_LENGTHS=query_lengths,
        HAS_KEY_LENGTHS=key_lengths,
        HAS_KEY_PADDING=key_padding,
        DROPOUT=dropout,
        PRECISION=precision,
    )


def compile_options(config: KernelConfig) -> dict[str, int | bool]:
    """What Triton's compiler is told about a kernel. Multiply-adds are asked for: Triton's default for them changes."""
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)


def forward(call: AttentionCall, output: Tensor, lse: Tensor, lists: StepLists, config: KernelConfig) -> None:
    """Writes `output`, whose last dimension is contiguous, and `lse`, unless it is empty. `lists` are for
    `config.rows` queries."""
    sizes = _Sizes.of(call)
    tiles = _Tiles.of(lists, sizes.heads, *sizes.query_groups(config.rows))
    if tiles.count == 0 or sizes.batch == 0:
        return
    absent = lists.stops
    forward_kernel[(sizes.batch * tiles.count,)](
        call.query, call.key, call.value, output, lse if lse.numel() else output,
        *lists.tensors(), _levels(call, absent),
        *_optional(call, absent),
        *_strides(call, call.query), *_strides(call, call.key), *_strides(call, call.value),
        *_strides(call, output)[:3], *_row_strides(call, lse),
        tiles.count, tiles.first, tiles.first_group, sizes.heads, tiles.groups, tiles.blocks,
        sizes.query_len, sizes.key_len, call.query_offset,
        call.scale * math.log2(math.e), *_bins(call.table), *_dropout(call),
        **_constants(call, config, lists, tiles), **_rounding_constants(call.table),
        HELD=config.held, STORE_LSE=lse.numel() > 0, **compile_options(config),
    )  # fmt: skip


def backward_query(
    call: AttentionCall, output: Tensor, lse: Tensor, delta: Tensor, grad_output: Tensor, grad_query: Tensor,
    lists: StepLists, config: KernelConfig,
) -> None:  # fmt: skip
    """Writes the gradient of the query, and `delta`, like lse, which `backward_key_value` reads."""
    sizes = _Sizes.of(call)
    tiles = _Tiles.of(lists, sizes.heads, *sizes.query_groups(config.rows))
    if tiles.count == 0 or sizes.batch == 0:
        return
    grad_query_kernel[(sizes.batch * tiles.count,)](
        call.query, call.key, call.value, output, grad_output, grad_query, lse, delta,
        *lists.tensors(), *_optional(call, lists.stops),
        *_strides(call, call.query), *_strides(call, call.key), *_strides(call, call.value),
        *_strides(call, output)[:3], *_strides(call, grad_output), *_strides(call, grad_query)[:3],
        *_row_strides(call, lse),
        tiles.count, tiles.first, tiles.first_group, sizes.heads, tiles.groups, tiles.blocks,
        sizes.query_len, sizes.key_len, call.query_offset,
        call.scale, call.scale * math.log2(math.e), *_dropout(call),
        **_constants(call, config, lists, tiles), ROUNDED=call.table is not None,
        **compile_options(config),
    )  # fmt: skip


def backward_key_value(
    call: AttentionCall, lse: Tensor, delta: Tensor, grad_output: Tensor, gradients: tuple[Tensor, Tensor],
    transposed: StepLists, config: KernelConfig,
) -> None:  # fmt: skip
    """Writes the gradients of key and value. `transposed` are the lists of the transposed mask."""
    sizes = _Sizes.of(call)
    tiles = _Tiles.of(transposed, sizes.heads, 0, -(-sizes.key_len // config.rows))
    if tiles.count == 0 or sizes.batch == 0:
        return
    grad_key, grad_value = gradients
    grad_key_value_kernel[(sizes.batch * tiles.count,)](
        call.query, call.key, call.value, grad_output, grad_key, grad_value, lse, delta,
        *transposed.tensors(), _levels(call, transposed.stops), *_optional(call, transposed.stops),
        *_strides(call, call.query), *_strides(call, call.key), *_strides(call, call.value),
        *_strides(call, grad_output), *_strides(call, grad_key)[:3], *_row_strides(call, lse),
        tiles.count, tiles.first, sizes.heads, tiles.groups, tiles.blocks,
        sizes.query_len, sizes.key_len, call.query_offset,
        call.scale, call.scale * math.log2(math.e), *_bins(call.table), *_dropout(call),
        **_constants(call, config, transposed, tiles), **_rounding_constants(call.table),
        **compile_options(config),
    )  # fmt: skip


class _Sizes(NamedTuple):
    batch: int
    heads: int
    query_len: int
    key_len: int
    query_offset: int

    @classmethod
    def of(cls, call: AttentionCall) -> _Sizes:
        heads = call.query.shape[1]
        if call.packed:
            return cls(call.cu_seqlens.numel() - 1, heads, call.max_length, call.max_length, call.query_offset)
        return cls(call.query.shape[0], heads, call.query.shape[2], call.key.shape[2], call.query_offset)

    def query_groups(self, rows: int) -> tuple[int, int]:
        """The first of the mask's row groups that the queries touch, and the end of them."""
        return self.query_offset // rows, -(-(self.query_offset + self.query_len) // rows)


class _Tiles(NamedTuple):
    """The programs of one sequence: see `primitives.program_place`."""

    count: int
    first: int
    first_group: int
    groups: int
    blocks: int
    ordered: bool

    @classmethod
    def of(cls, lists: StepLists, heads: int, first_group: int, groups_end: int) -> _Tiles:
        all_lists, _, stops = lists.stops.shape
        groups, wanted = all_lists // heads if heads else 0, groups_end - first_group
        if first_group > 0 or heads * wanted == 0:  # decoding: few groups, far from the first
            return cls(heads * wanted, 0, first_group, groups, stops - 1, ordered=False)
        start, count = order_of(heads, groups, wanted)
        return cls(count, start, 0, groups, stops - 1, ordered=True)


def _constants(call: AttentionCall, config: KernelConfig, lists: StepLists, tiles: _Tiles) -> dict[str, object]:
    return _same_constants(
        call.query.shape[-1], config, call.query.dtype, parts=lists.stops.shape[1], full=lists.full,
        ordered=tiles.ordered, amd=torch.version.hip is not None, causal=call.causal, packed=call.packed,
        query_lengths=call.query_lengths is not None, key_lengths=call.key_lengths is not None,
        key_padding=call.key_padding is not None, dropout=call.seed is not None,
    )  # fmt: skip


_same_constants = cache(common_constants)  # a launch takes longer to prepare than a short input to compute


def _rounding_constants(table: QuantizationTable | None) -> dict[str, object]:
    return dict(LEVELS=len(table.levels) if table else 0, MID_POINTS=table is None or table.mid_points)


def _bins(table: QuantizationTable | None) -> tuple[float, float]:
    """Where the bins begin, in log2(p), and their width."""
    return (math.log2(table.threshold), table.step) if table else (0.0, 1.0)


def _levels(call: AttentionCall, absent: Tensor) -> Tensor:
    """The levels that come last in `call.layout` where they are not the mid-points of their bins."""
    return absent if call.table is None or call.table.mid_points else call.layout[-1]


def _dropout(call: AttentionCall) -> tuple[int, float]:
    """What is dropped lies below the first number; what is not is multiplied by the second."""
    return drop_threshold(call.dropout), 1.0 / (1.0 - call.dropout)


def _optional(call: AttentionCall, absent: Tensor) -> tuple[Tensor, ...]:
    """Pointers that a kernel reads only if its constants say so; `absent` stands in for the others."""
    padding = None if call.key_padding is None else call.key_padding.view(torch.uint8)
    tensors = (call.query_lengths, call.key_lengths, padding, call.cu_seqlens, call.seed)
    return tuple(absent if tensor is None else tensor for tensor in tensors)


def _strides(call: AttentionCall, tensor: Tensor) -> tuple[int, int, int, int]:
    """Strides of (sequence, head, row, dimension)."""
    return (0, tensor.stride(1), tensor.stride(0), tensor.stride(2)) if call.packed else tensor.stride()


def _row_strides(call: AttentionCall, lse: Tensor) -> tuple[int, int]:
    """Strides of (sequence, head) of what has one number a row."""
    if lse.numel() == 0:
        return (0, 0)
    return (0, lse.stride(0)) if call.packed else (lse.stride(0), lse.stride(1))
