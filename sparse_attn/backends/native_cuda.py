"""The CUDA kernel of `csrc/cuda`: forward, for sequences whose keys and values fit into shared memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from ..kernels.configuration import BlockConfig, Problem, choose_native
from ..layout import SparseLayout
from ..ops import AttentionCall, empty_output, lse_shape
from ..quantization import QuantizationTable
from .fragment_lists import MAX_LENGTH, fragment_lists
from .tickets import ticket_of

HEAD_DIMS = (32, 64)
_DTYPES = (torch.float16, torch.bfloat16)
_OLDEST = (8, 0)  # compute capability
_ALIGNMENT = 8  # elements: rows are read in pieces of 16 bytes
_MAX_ROW_STRIDE = 2**22  # in bytes; 32-bit numbers address the rows of a head

torch.library.define(
    "sparse_attn::native_attention_cuda",
    "(Tensor query, Tensor key, Tensor value, Tensor words, Tensor first_steps, Tensor counts, Tensor order, "
    "Tensor places, Tensor(a!) tickets, bool full, int keys, int[] heaviest, Tensor? query_lengths, "
    "Tensor? key_lengths, Tensor? key_padding, Tensor? cu_seqlens, int max_length, float scale, float[] levels, "
    "float step, bool causal, int warps, int parts, int ticket, int stream, Tensor(b!) output, Tensor(c!) lse) -> ()",
)


def built() -> bool:
    """Whether the extension has kernels for GPUs."""
    name = "sparse_attn::native_attention_cuda"
    return extension.available() and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@torch.compiler.assume_constant_result  # torch.compile cannot trace how the extension is loaded
def _built_without() -> bool:
    return extension.available() and not built()


def refusals(call: AttentionCall, training: bool) -> list[str]:
    """Why the kernel cannot compute `call`; empty if it can."""
    query, device = call.query, call.query.device
    reasons = []
    if _built_without():
        reasons.append("the extension was built without nvcc; install CUDA's compiler and build sparse_attn again")
    if training:
        reasons.append("the kernel has no backward pass")
    if query.dtype not in _DTYPES:
        reasons.append(f"{query.dtype}; the kernel takes float16 and bfloat16")
    if query.shape[-1] not in HEAD_DIMS:
        reasons.append(f"head_dim {query.shape[-1]} is none of {HEAD_DIMS}")
    longest = call.max_length if call.packed else max(query.shape[-2], call.key.shape[-2])
    if longest > MAX_LENGTH:
        reasons.append(f"a sequence of {longest} is longer than {MAX_LENGTH}")
    if call.dropout > 0.0 or call.query_offset != 0:
        reasons.append("the kernel has neither dropout nor a query_offset")
    if not call.scale > 0.0:
        reasons.append(f"the scale {call.scale} is not positive")
    for name, tensor in (("query", query), ("key", call.key), ("value", call.value)):
        if not _rows_are_aligned(tensor):
            reasons.append(f"rows of the {name} are not multiples of {2 * _ALIGNMENT} bytes apart")
        if tensor.stride(0 if call.packed else 2) * tensor.itemsize >= _MAX_ROW_STRIDE:
            reasons.append(f"rows of the {name} are {_MAX_ROW_STRIDE} bytes or more apart")
    if device.type == "cuda" and not reasons:
        reasons += _gpu_refusals(device, min(longest, MAX_LENGTH), query.shape[-1])
    return reasons


def _rows_are_aligned(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 and all(stride % _ALIGNMENT == 0 for stride in tensor.stride()[:-1])


def _gpu_refusals(device: torch.device, length: int, head_dim: int) -> list[str]:
    if torch.version.hip is not None:
        return ["the kernel runs on NVIDIA GPUs"]
    capability, limit = _gpu(device)
    if capability < _OLDEST:
        return [f"the GPU has compute capability {'.'.join(map(str, capability))}, the kernel needs 8.0"]
    needed = 4 * head_dim * length + _SCRATCH_BYTES * head_dim + _EXTRA_SHARED_BYTES
    if needed > limit:
        return [f"keys and values take {needed} bytes of shared memory, the GPU has {limit}"]
    return []


_SCRATCH_BYTES = 12 * 16 * 2  # for each dimension: a group of queries or outputs for each warp
_EXTRA_SHARED_BYTES = 3072  # at most, for what else lies beside keys and values


@torch.compiler.assume_constant_result
def _gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and the shared memory that one block can have in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin


def layout_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, table: QuantizationTable | None, training: bool
) -> tuple[list[Tensor], tuple[int, ...]]:
    """The fragment lists, and how a head is cut into blocks and warps. Raises ValueError for other head_dims."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the native kernel for GPUs takes head_dims {HEAD_DIMS}, not {head_dim}")
    return configured_arguments(layout, head_dim, dtype, choice(layout, head_dim, dtype, table is not None))


def choice(layout: SparseLayout, head_dim: int, dtype: torch.dtype, rounded: bool) -> BlockConfig:
    """The configuration for calls with this layout."""
    problem = Problem("forward", rounded, head_dim, dtype.itemsize, layout.key_len, layout.spread)
    return choose_native(problem, layout.device)


def known_to_be_faster(layout: SparseLayout, head_dim: int, dtype: torch.dtype, rounded: bool) -> bool:
    """Whether the kernel was measured to beat the Triton kernel on this GPU, for problems like this one."""
    computes = head_dim in HEAD_DIMS and dtype in _DTYPES and layout.key_len <= MAX_LENGTH
    return computes and choice(layout, head_dim, dtype, rounded).faster


def configured_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, config: BlockConfig
) -> tuple[list[Tensor], tuple[int, ...]]:
    """What `layout_arguments` returns, for a configuration."""
    lists = fragment_lists(layout, head_dim * dtype.itemsize)
    return lists.tensors(), (int(lists.full), lists.keys, config.warps, config.parts, *lists.heaviest)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output = empty_output(call.query, call.packed)
    lse = call.query.new_empty(lse_shape(call.query, call.packed) if call.need_lse else (0,), dtype=torch.float32)
    full, keys, warps, parts, *heaviest = call.layout_sizes
    table = call.table
    stream = torch.cuda.current_stream(call.query.device).cuda_stream
    torch.ops.sparse_attn.native_attention_cuda(
        _aligned(call.query), _aligned(call.key), _aligned(call.value), *call.layout, bool(full), keys, heaviest,
        call.query_lengths, call.key_lengths, call.key_padding, call.cu_seqlens, call.max_length, call.scale,
        list(table.levels) if table else [], table.step if table else 1.0, call.causal, warps, parts,
        ticket_of(call.layout[-1], stream), stream, output, lse,
    )  # fmt: skip
    return output, lse


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % (2 * _ALIGNMENT) == 0 else tensor.clone()
