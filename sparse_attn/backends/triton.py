"""Attention by the Triton kernels over column lists: NVIDIA and AMD GPUs, and the CPU under Triton's interpreter."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, fields
from functools import cache

import torch
from torch import Tensor

from .. import extension
from ..kernels.configuration import KERNELS, MAX_HEAD_DIM, KernelConfig, Problem, choose
from ..layout import SparseLayout
from ..ops import AttentionCall, empty_gradients, empty_results, register_backend
from ..quantization import QuantizationTable
from ..step_lists import StepLists
from ..tracing import constant_when_traced

NAME = "triton"
BACKWARD_USES_LSE = True
NOT_INSTALLED = f"Triton is not installed; {extension.how_to_install('gpu')}"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TENSORS, _SIZES = len(fields(StepLists)) - 1, 1 + len(fields(KernelConfig))  # of a kernel, see `configured_arguments`
_MAX_OFFSET = 2**31 - 1  # offsets within one head of a sequence are 32-bit


def unsupported(call: AttentionCall, training: bool) -> list[str]:
    """Why the kernels cannot compute `call`; empty if they can."""
    reasons = []
    if not TRITON_INSTALLED:
        reasons.append(NOT_INSTALLED)
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
        span = _head_span(tensor, call)
        if span > _MAX_OFFSET:
            reasons.append(f"one head of the {name} spans {span} elements, more than 32 bits can address")
    length = call.max_length if call.packed else call.query.shape[2]
    if length * call.query.shape[1] * call.query.shape[-1] > _MAX_OFFSET:  # its heads lie beside tokens
        reasons.append("one sequence of the output has more elements than 32 bits can address")
    return reasons


def _head_span(tensor: Tensor, call: AttentionCall) -> int:
    """How far the last element of a sequence's head lies behind its first one, in elements."""
    rows, dims = (0, 2) if call.packed else (2, 3)
    length = call.max_length if call.packed else tensor.shape[rows]
    return (length - 1) * abs(tensor.stride(rows)) + (tensor.shape[dims] - 1) * abs(tensor.stride(dims))


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module
        return False


TRITON_INSTALLED = _installed()


@constant_when_traced  # torch.compile cannot trace into Triton's settings
def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, which it decides once, at its import."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def layout_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, table: QuantizationTable | None, training: bool
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Lists and configuration of the forward kernel; in training also those of the two backward kernels. The levels of
    a table come last, unless they can be computed."""
    rounded = table is not None
    kinds = [(kernel, rounded and kernel == "forward") for kernel in (KERNELS if training else KERNELS[:1])]
    facts = (head_dim, dtype.itemsize, layout.key_len, layout.spread)
    configs = [choose(Problem(*kind, *facts), layout.device) for kind in kinds]
    tensors, sizes = configured_arguments(layout, configs)
    if table is not None and not table.mid_points:
        tensors.append(torch.tensor(table.levels, dtype=torch.float32, device=layout.device))
    return tensors, sizes


def configured_arguments(layout: SparseLayout, configs: list[KernelConfig]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Lists, and configurations of the kernels in the order of KERNELS."""
    tensors, sizes = [], []
    for kernel, config in zip(KERNELS, configs, strict=False):
        lists = layout.step_lists(config.rows, transposed=kernel == "grad_key_value", split=config.split)
        tensors += lists.tensors()
        sizes += [int(lists.full), *map(int, astuple(config))]
    return tensors, tuple(sizes)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    from ..kernels import launch

    output, lse = empty_results(call)
    with _current(call.query.device):
        launch.forward(call, output, lse, *_kernel_arguments(call, "forward"))
    return output, lse


def backward(call: AttentionCall, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import launch

    if _head_span(grad_output, call) > _MAX_OFFSET:
        grad_output = grad_output.contiguous()
    gradients = empty_gradients(call)
    of_queries, of_keys = _kernel_arguments(call, "grad_query"), _kernel_arguments(call, "grad_key_value")
    delta = torch.empty_like(lse)
    with _current(call.query.device):
        launch.backward_query(call, output, lse, delta, grad_output, gradients[0], *of_queries)
        launch.backward_key_value(call, lse, delta, grad_output, gradients[1:], *of_keys)
    return gradients


def _current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one, if another is: that is where Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _kernel_arguments(call: AttentionCall, kernel: str) -> tuple[StepLists, KernelConfig]:
    """The lists and the configuration that `layout_arguments` chose for a kernel."""
    place = KERNELS.index(kernel)
    full, *config = call.layout_sizes[place * _SIZES : (place + 1) * _SIZES]
    lists = call.layout[place * _TENSORS : (place + 1) * _TENSORS]
    return StepLists(*lists, full=bool(full)), _same_config(*config)


_same_config = cache(KernelConfig)


register_backend(NAME, forward, backward)
