"""Attention by the Triton kernels over column lists: NVIDIA and AMD GPUs, and the CPU under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.configuration import MAX_HEAD_DIM, KernelConfig, config
from ..layout import SparseLayout
from ..ops import AttentionCall, empty_output, lse_shape, register_backend
from ..quantization import QuantizationTable, log_table

if TYPE_CHECKING:  # imports Triton
    from ..kernels.launch import Lists, Rounding

NAME = "triton"
BACKWARD_USES_LSE = True

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_OFFSET = 2**31 - 1  # offsets within one head are 32-bit


def unsupported(call: AttentionCall, training: bool) -> list[str]:
    """Why the kernels cannot compute `call`; empty if they can."""
    reasons = []
    if not TRITON_INSTALLED:
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
    for name, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
        reach = sum((size - 1) * abs(stride) for size, stride in _within_a_head(tensor, call.packed))
        if reach > _MAX_OFFSET:
            reasons.append(f"one head of the {name} spans {reach} elements, more than 32 bits can address")
    return reasons


def _within_a_head(tensor: Tensor, packed: bool) -> list[tuple[int, int]]:
    rows, dims = (0, 2) if packed else (2, 3)
    return [(tensor.shape[rows], tensor.stride(rows)), (tensor.shape[dims], tensor.stride(dims))]


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module
        return False


TRITON_INSTALLED = _installed()


@torch.compiler.assume_constant_result  # torch.compile cannot trace into Triton's settings
def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, which it decides once, at its import."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def layout_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, training: bool
) -> tuple[list[Tensor], tuple[int, ...]]:
    """The lists of the forward kernel; in training also those of the two backward kernels."""
    wanted = [("forward", False)]
    if training:
        wanted += [("grad_query", False), ("grad_key_value", True)]
    all_lists = [layout.lists(config(kernel, head_dim, dtype.itemsize).rows, side) for kernel, side in wanted]
    tensors = [tensor for lists in all_lists for tensor in (lists.stops, lists.columns, lists.row_bits)]
    return tensors, tuple(int(lists.full) for lists in all_lists)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from ..kernels import launch

    output = empty_output(call.query, call.packed)
    lse_size = lse_shape(call.query, call.packed) if call.need_lse else (0,)
    lse = torch.empty(lse_size, dtype=torch.float32, device=call.query.device)
    launch.forward(call, output, lse, _lists(call, 0), _config(call, "forward"), _rounding(call))
    return output, lse


def backward(call: AttentionCall, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import launch

    gradients = tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (call.query, call.key, call.value)
    )
    launch.backward(
        call, output, lse, grad_output, gradients, _lists(call, 1), _lists(call, 2),
        _config(call, "grad_query"), _config(call, "grad_key_value"), _rounding(call),
    )  # fmt: skip
    return gradients


def _config(call: AttentionCall, kernel: str) -> KernelConfig:
    return config(kernel, call.query.shape[-1], call.query.dtype.itemsize)


def _lists(call: AttentionCall, index: int) -> Lists:
    """The lists that `layout_arguments` put at place `index`."""
    from ..kernels.launch import Lists

    return Lists(*call.layout[3 * index : 3 * index + 3], full=bool(call.layout_sizes[index]))


def _rounding(call: AttentionCall) -> Rounding | None:
    from ..kernels.launch import Rounding

    if call.table is None:
        return None
    table = call.table
    mid_points = table == log_table(table.bits, table.threshold)
    return Rounding(_device_levels(table, call.query.device), mid_points, math.log2(table.threshold), table.step)


@lru_cache(maxsize=64)
def _device_levels(table: QuantizationTable, device: torch.device) -> Tensor:
    return torch.tensor(table.levels, dtype=torch.float32, device=device)


register_backend(NAME, forward, backward)
