"""Launching the kernels with explicit configurations; what a launch needs is computed here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..dropout import drop_threshold
from ..layout import STOP_KEYS
from ..ops import AttentionCall
from .backward import grad_key_value_kernel, grad_query_kernel
from .configuration import KernelConfig
from .forward import forward_kernel


@dataclass(frozen=True)
class Lists:
    """Column lists as the kernels take them: see `sparse_attn.layout.ColumnLists`."""

    stops: Tensor
    columns: Tensor
    row_bits: Tensor
    full: bool


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


def common_constants(
    head_dim: int,
    config: KernelConfig,
    dtype: torch.dtype,
    *,
    full: bool = False,
    causal: bool = False,
    packed: bool = False,
    query_lengths: bool = False,
    key_lengths: bool = False,
    key_padding: bool = False,
    dropout: bool = False,
) -> dict[str, object]:
    """The compile-time arguments that all kernels share."""
    return dict(
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        ROWS=config.rows,
        COLUMNS=config.columns,
        STOP_KEYS=STOP_KEYS,
        FULL=full,
        CAUSAL=causal,
        PACKED=packed,
        HAS_QUERY_LENGTHS=query_lengths,
        HAS_KEY_LENGTHS=key_lengths,
        HAS_KEY_PADDING=key_padding,
        DROPOUT=dropout,
        # Three tf32 products keep what float32 inputs hold; a single one would cost them three digits.
        PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
    )


def rounding_constants(rounding: Rounding | None) -> dict[str, object]:
    if rounding is None:
        return dict(LEVELS=0, MID_POINTS=True)
    return dict(LEVELS=rounding.levels.numel(), MID_POINTS=rounding.mid_points)


def forward(
    call: AttentionCall, output: Tensor, lse: Tensor, lists: Lists, config: KernelConfig, rounding: Rounding | None
) -> None:
    """Writes `output`, whose last dimension is contiguous, and `lse`, unless it is empty. `lists` are for
    `config.rows` queries."""
    sizes = _Sizes.of(call)
    groups = sizes.query_groups(config.rows)
    if groups == 0 or 0 in (sizes.heads, sizes.batch):
        return
    absent = lists.stops
    forward_kernel[(groups, sizes.heads, sizes.batch)](
        call.query, call.key, call.value, output, lse if lse.numel() else output,
        lists.stops, lists.columns, lists.row_bits, rounding.levels if rounding else absent,
        *_optional(call, absent),
        *_strides(call, call.query), *_strides(call, call.key), *_strides(call, call.value),
        *_strides(call, output)[:3], *_row_strides(call, lse),
        sizes.heads, lists.stops.shape[0] // sizes.heads, lists.stops.shape[1] - 1, sizes.query_len, sizes.key_len,
        call.query_offset, call.query_offset // config.rows,
        call.scale * math.log2(math.e), rounding.log2_threshold if rounding else 0.0,
        rounding.step if rounding else 1.0, drop_threshold(call.dropout), 1.0 / (1.0 - call.dropout),
        **_constants(call, config, lists), **rounding_constants(rounding), STORE_LSE=lse.numel() > 0,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def backward(
    call: AttentionCall,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    lists: Lists,
    transposed: Lists,
    query_config: KernelConfig,
    key_config: KernelConfig,
    rounding: Rounding | None,
) -> None:
    """Writes the gradients of query, key and value, contiguous tensors. `lists` are for `query_config.rows` queries,
    `transposed` for `key_config.rows` keys."""
    sizes = _Sizes.of(call)
    query_groups, key_groups = sizes.query_groups(query_config.rows), -(-sizes.key_len // key_config.rows)
    if 0 in (query_groups, key_groups, sizes.heads, sizes.batch):
        for gradient in gradients:
            gradient.zero_()
        return
    grad_query, grad_key, grad_value = gradients
    delta = torch.empty_like(lse)
    absent = lists.stops
    inputs = (*_strides(call, call.query), *_strides(call, call.key), *_strides(call, call.value))
    scales = (call.scale, call.scale * math.log2(math.e))
    dropout = (drop_threshold(call.dropout), 1.0 / (1.0 - call.dropout))
    grad_query_kernel[(query_groups, sizes.heads, sizes.batch)](
        call.query, call.key, call.value, output, grad_output, grad_query, lse, delta,
        lists.stops, lists.columns, lists.row_bits, *_optional(call, absent),
        *inputs, *_strides(call, output)[:3], *_strides(call, grad_output), *_strides(call, grad_query)[:3],
        *_row_strides(call, lse),
        sizes.heads, lists.stops.shape[0] // sizes.heads, lists.stops.shape[1] - 1, sizes.query_len, sizes.key_len,
        call.query_offset, call.query_offset // query_config.rows, *scales, *dropout,
        **_constants(call, query_config, lists), ROUNDED=rounding is not None,
        num_warps=query_config.num_warps, num_stages=query_config.num_stages,
    )  # fmt: skip
    grad_key_value_kernel[(key_groups, sizes.heads, sizes.batch)](
        call.query, call.key, call.value, grad_output, grad_key, grad_value, lse, delta,
        transposed.stops, transposed.columns, transposed.row_bits, rounding.levels if rounding else absent,
        *_optional(call, absent), *inputs, *_strides(call, grad_output), *_strides(call, grad_key)[:3],
        *_row_strides(call, lse),
        sizes.heads, transposed.stops.shape[0] // sizes.heads, transposed.stops.shape[1] - 1,
        sizes.query_len, sizes.key_len, call.query_offset, *scales,
        rounding.log2_threshold if rounding else 0.0, rounding.step if rounding else 1.0, *dropout,
        **_constants(call, key_config, transposed), **rounding_constants(rounding),
        num_warps=key_config.num_warps, num_stages=key_config.num_stages,
    )  # fmt: skip


@dataclass(frozen=True)
class _Sizes:
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

    def query_groups(self, rows: int) -> int:
        """Row groups of the mask that the queries touch."""
        return -(-(self.query_offset + self.query_len) // rows) - self.query_offset // rows


def _constants(call: AttentionCall, config: KernelConfig, lists: Lists) -> dict[str, object]:
    return common_constants(
        call.query.shape[-1], config, call.query.dtype, full=lists.full, causal=call.causal, packed=call.packed,
        query_lengths=call.query_lengths is not None, key_lengths=call.key_lengths is not None,
        key_padding=call.key_padding is not None, dropout=call.seed is not None,
    )  # fmt: skip


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
