"""Attention by the Triton kernels over column lists: NVIDIA and AMD GPUs, and the CPU under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..dropout import drop_threshold
from ..kernels.configuration import MAX_HEAD_DIM, forward_config
from ..layout import STOP_KEYS, SparseLayout
from ..ops import AttentionCall, empty_output, lse_shape, register_backend
from ..quantization import QuantizationTable, log_table

NAME = "triton"
BACKWARD_USES_LSE = True

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_OFFSET = 2**31 - 1  # offsets within one head are 32-bit


def unsupported(call: AttentionCall, training: bool) -> list[str]:
    """Why the kernels cannot compute `call`; empty if they can."""
    reasons = []
    if not triton_installed():
        reasons.append("Triton is not installed; install sparse-attn[gpu]")
    elif call.query.device.type != "cuda" and not interpreting():
        reasons.append(
            f"the query is on {call.query.device}, not on a GPU; on a CPU only Triton's interpreter runs the kernels, "
            "chosen by TRITON_INTERPRET=1 before they are imported"
        )
    elif interpreting() and call.query.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 there")
    if call.query.dtype not in _DTYPES:
        reasons.append(f"{call.query.dtype}; the kernels take float16, bfloat16 and float32")
    if call.query.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head_dim {call.query.shape[-1]} is larger than {MAX_HEAD_DIM}")
    if training:
        reasons.append("gradients are wanted and there is no backward kernel")
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        reach = sum((size - 1) * abs(stride) for size, stride in _within_a_head(tensor, call.packed))
        if reach > _MAX_OFFSET:
            reasons.append(f"one head of the {name} spans {reach} elements, more than 32 bits can address")
    return reasons


def _within_a_head(tensor: Tensor, packed: bool) -> list[tuple[int, int]]:
    rows, dims = (0, 2) if packed else (2, 3)
    return [(tensor.shape[rows], tensor.stride(rows)), (tensor.shape[dims], tensor.stride(dims))]


@cache
def triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module
        return False


@cache
def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, which it decides once, at its import."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def layout_arguments(layout: SparseLayout, head_dim: int, dtype: torch.dtype) -> tuple[list[Tensor], tuple[int, ...]]:
    config = forward_config(head_dim, dtype.itemsize)
    lists = layout.lists(config.rows)
    return [lists.stops, lists.columns, lists.row_bits], (int(lists.full),)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from ..kernels import launch

    output = empty_output(call.query, call.packed)
    lse_size = lse_shape(call.query, call.packed) if call.need_lse else (0,)
    lse = torch.empty(lse_size, dtype=torch.float32, device=call.query.device)
    (full,) = call.layout_sizes
    rounding = None
    if call.table is not None:
        table = call.table
        levels = _device_levels(table, call.query.device)
        mid_points = table == log_table(table.bits, table.threshold)
        rounding = launch.Rounding(levels, mid_points, math.log2(table.threshold), table.step)
    launch.forward(
        call.query, call.key, call.value, output, lse, *call.layout,
        forward_config(call.query.shape[-1], call.query.dtype.itemsize),
        stop_keys=STOP_KEYS, full=bool(full), scale=call.scale, rounding=rounding,
        query_lengths=call.query_lengths, key_lengths=call.key_lengths, key_padding=call.key_padding,
        cu_seqlens=call.cu_seqlens, max_length=call.max_length, causal=call.causal, query_offset=call.query_offset,
        seed=call.seed, dropout=call.dropout, dropout_threshold=drop_threshold(call.dropout),
    )  # fmt: skip
    return output, lse


@lru_cache(maxsize=64)
def _device_levels(table: QuantizationTable, device: torch.device) -> Tensor:
    return torch.tensor(table.levels, dtype=torch.float32, device=device)


register_backend(NAME, forward)
