"""Attention by the C++ and CUDA kernels of `csrc`, on CPUs and NVIDIA GPUs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import extension
from ..layout import SparseLayout
from ..ops import AttentionCall, register_backend
from ..quantization import QuantizationTable
from ..tracing import constant_when_traced
from . import native_cpu, native_cuda

NAME = "native"
BACKWARD_USES_LSE = True


def capabilities() -> tuple[str, ...]:
    """What the extension can compute with here, best first: instruction sets of this processor, then "cuda" where the
    extension has kernels for GPUs. Empty without the extension."""
    return native_cpu.instruction_sets() + (("cuda",) if native_cuda.built() else ())


def unsupported(call: AttentionCall, training: bool) -> list[str]:
    """Why the kernels cannot compute `call`; empty if they can."""
    missing = _missing()
    return ([missing] if missing else []) + _kernels(call.query.device).refusals(call, training)


@constant_when_traced  # torch.compile cannot trace how the extension is loaded
def _missing() -> str | None:
    """Why there is no extension, and how to get it; None where there is one."""
    return None if extension.available() else f"{extension.reason()}; {extension.HOW_TO_GET_IT}"


def layout_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, table: QuantizationTable | None, training: bool
) -> tuple[list[Tensor], tuple[int, ...]]:
    """The lists of the layout as the kernels for its device want them. Raises ValueError without the extension."""
    missing = _missing()
    if missing:
        raise ValueError(f"backend 'native' has no kernels: {missing}")
    return _kernels(layout.device).layout_arguments(layout, head_dim, dtype, table, training)


def known_to_be_faster(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, rounded: bool, training: bool
) -> bool:  # fmt: skip
    """Whether the kernel for GPUs was measured to beat the Triton kernel for such calls on the GPU of the layout."""
    on_gpu = layout.device.type == "cuda" and native_cuda.built()
    return on_gpu and native_cuda.known_to_be_faster(layout, head_dim, dtype, rounded, training)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    return _kernels(call.query.device).forward(call)


def backward(call: AttentionCall, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(call.query.device).backward(call, output, lse, grad_output)


def _kernels(device: torch.device) -> ModuleType:
    return native_cuda if device.type == "cuda" else native_cpu


register_backend(NAME, forward, backward)
