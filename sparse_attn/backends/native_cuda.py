"""The CUDA kernels of `csrc/cuda`, for sequences whose keys and values fit into shared memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from ..kernels.configuration import BlockConfig, Problem, choose_native
from ..layout import SparseLayout
from ..ops import AttentionCall, empty_gradients, empty_results
from ..quantization import QuantizationTable
from ..tracing import constant_when_traced
from .fragment_lists import GROUP_ROWS, MAX_LENGTH, MAX_ORDERED_HEADS, FragmentLists, fragment_lists
from .tickets import ticket_of

HEAD_DIMS = (32, 64)
_DTYPES = (torch.float16, torch.bfloat16)
_OLDEST = (8, 0)  # compute capability
_ALIGNMENT = 8  # elements: rows are read in pieces of 16 bytes
_MAX_ROW_STRIDE = 2**22  # in bytes; 32-bit numbers address the rows of a head

_LISTS = (
    "Tensor words, Tensor first_steps, Tensor counts, Tensor order, Tensor places, Tensor(a!) tickets, bool full, "
    "int keys, int[] heaviest"
)
torch.library.define(
    "sparse_attn::native_attention_cuda",
    f"(Tensor query, Tensor key, Tensor value, {_LISTS}, Tensor? query_lengths, Tensor? key_lengths, "
    "Tensor? key_padding, Tensor? cu_seqlens, int max_length, float scale, float[] levels, float step, bool causal, "
    "int warps, int parts, int ticket, int stream, Tensor(b!) output, Tensor(c!) lse) -> ()",
)
torch.library.define(
    "sparse_attn::native_attention_gradients_cuda",
    f"(Tensor owned, Tensor first_gathered, Tensor second_gathered, {_LISTS}, Tensor? owned_lengths, "
    "Tensor? gathered_lengths, Tensor? key_padding, Tensor? cu_seqlens, int max_length, float scale, int warps, "
    "int parts, int ticket, int stream, Tensor lse, Tensor second_owned, Tensor? attended, Tensor(b!) statistics, "
    "Tensor(c!) result, Tensor(d!)? second_result) -> ()",
)


def built() -> bool:
    """Whether the extension has kernels for GPUs."""
    name = "sparse_attn::native_attention_cuda"
    return extension.available() and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@constant_when_traced  # torch.compile cannot trace how the extension is loaded
def _built_without() -> bool:
    return extension.available() and not built()


def refusals(call: AttentionCall, training: bool) -> list[str]:
    """Why the kernel cannot compute `call`; empty if it can."""
    query, device = call.query, call.query.device
    reasons = []
    if _built_without():
        reasons.append("the extension has no CUDA kernels; `python -m sparse_attn.doctor` says how to get them")
    if training and (call.table is not None or call.causal):
        reasons.append("the backward pass has neither rounding nor causality")
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
        if _row_bytes(tensor, call.packed) >= _MAX_ROW_STRIDE:
            reasons.append(f"rows of the {name} are {_MAX_ROW_STRIDE} bytes or more apart")
    if device.type == "cuda" and not reasons:
        reasons += _gpu_refusals(device, longest, query.shape[-1], training)
    return reasons


def _rows_are_aligned(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 and all(stride % _ALIGNMENT == 0 for stride in tensor.stride()[:-1])


def _row_bytes(tensor: Tensor, packed: bool) -> int:
    return tensor.stride(0 if packed else 2) * tensor.itemsize


def _gpu_refusals(device: torch.device, length: int, head_dim: int, training: bool) -> list[str]:
    if torch.version.hip is not None:
        return ["the kernel runs on NVIDIA GPUs"]
    capability, limit = _gpu(device)
    if capability < _OLDEST:
        return [f"the GPU has compute capability {'.'.join(map(str, capability))}, the kernel needs 8.0"]
    areas = _BACKWARD_AREAS if training else _FORWARD_AREAS
    needed = 2 * head_dim * (2 * length + areas * GROUP_ROWS) + _EXTRA_SHARED_BYTES
    if needed > limit:
        return [f"keys and values take {needed} bytes of shared memory, the GPU has {limit}"]
    return []


_FORWARD_AREAS, _BACKWARD_AREAS = 12, 16  # at most, of 16 rows each: a warp has one, or two
_EXTRA_SHARED_BYTES = 3072  # at most, for what else lies beside keys and values


@constant_when_traced
def _gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and the shared memory that one block can have in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin


def layout_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, table: QuantizationTable | None, training: bool
) -> tuple[list[Tensor], tuple[int, ...]]:
    """The fragment lists, and how a head is cut into blocks and warps; in training also the lists of the transposed
    mask. Raises ValueError for other head_dims."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the native kernel for GPUs takes head_dims {HEAD_DIMS}, not {head_dim}")
    kinds = [("forward", table is not None)] + ([("backward", False)] if training else [])
    configs = [choice(layout, head_dim, dtype, *kind) for kind in kinds]
    return configured_arguments(layout, head_dim, dtype, *configs)


def choice(layout: SparseLayout, head_dim: int, dtype: torch.dtype, kernel: str, rounded: bool) -> BlockConfig:
    """The configuration of the "forward" or the "backward" kernels for calls with this layout."""
    problem = Problem(kernel, rounded, head_dim, dtype.itemsize, layout.key_len, layout.spread)
    return choose_native(problem, layout.device)


def known_to_be_faster(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, rounded: bool, training: bool
) -> bool:  # fmt: skip
    """Whether the kernels were measured to beat the Triton kernels on this GPU, for problems like this one."""
    computes = head_dim in HEAD_DIMS and dtype in _DTYPES and layout.key_len <= MAX_LENGTH
    if training and rounded or not computes:
        return False
    return choice(layout, head_dim, dtype, "backward" if training else "forward", rounded).faster


def configured_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, forward: BlockConfig, backward: BlockConfig | None = None
) -> tuple[list[Tensor], tuple[int, ...]]:
    """What `layout_arguments` returns, for configurations; in training there are two."""
    lists = fragment_lists(layout, head_dim * dtype.itemsize)
    if backward is None:
        return lists.tensors(), _sizes(lists, forward)
    transposed = fragment_lists(layout, head_dim * dtype.itemsize, transposed=True)
    sizes = _sizes(lists, forward) + _sizes(lists, backward) + _sizes(transposed, backward)
    return lists.tensors() + transposed.tensors(), sizes


def _sizes(lists: FragmentLists, config: BlockConfig) -> tuple[int, ...]:
    """What a kernel is told beside its lists."""
    return (int(lists.full), lists.keys, config.warps, config.parts, *lists.heaviest)


class _Lists:
    """A kernel's lists as its operator takes them: the forward kernel's, those of queries, those of keys."""

    def __init__(self, call: AttentionCall, kernel: int):
        self.tensors = call.layout[:6] if kernel < 2 else call.layout[6:]
        count = 4 + min(call.query.shape[1], MAX_ORDERED_HEADS)
        full, keys, self.warps, self.parts, *heaviest = call.layout_sizes[kernel * count : (kernel + 1) * count]
        self.arguments = (*self.tensors, bool(full), keys, heaviest)

    def cut(self) -> tuple[int, int, int, int]:
        """Warps, parts, ticket and stream of a call."""
        tickets = self.tensors[-1]
        stream = torch.cuda.current_stream(tickets.device).cuda_stream
        return self.warps, self.parts, ticket_of(tickets, stream), stream


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output, lse = empty_results(call)
    lists, table = _Lists(call, 0), call.table
    torch.ops.sparse_attn.native_attention_cuda(
        _aligned(call.query), _aligned(call.key), _aligned(call.value), *lists.arguments, call.query_lengths,
        call.key_lengths, call.key_padding, call.cu_seqlens, call.max_length, call.scale,
        list(table.levels) if table else [], table.step if table else 1.0, call.causal, *lists.cut(), output, lse,
    )  # fmt: skip
    return output, lse


def backward(call: AttentionCall, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = map(_aligned, (call.query, call.key, call.value))
    if not _rows_are_aligned(grad_output) or _row_bytes(grad_output, call.packed) >= _MAX_ROW_STRIDE:
        grad_output = grad_output.clone(memory_format=torch.contiguous_format)  # dimensions of size 1 included
    grad_output = _aligned(grad_output)
    gradients = empty_gradients(call)
    statistics = lse.new_empty((*lse.shape, 2))  # what the second kernel wants to know of queries
    of_queries, of_keys = call.query_lengths, call.key_lengths

    def compute(kernel: int, tensors, lengths, second: Tensor, attended: Tensor | None, *results: Tensor | None):
        lists = _Lists(call, kernel)
        torch.ops.sparse_attn.native_attention_gradients_cuda(
            *tensors, *lists.arguments, *lengths, call.key_padding, call.cu_seqlens, call.max_length, call.scale,
            *lists.cut(), lse, second, attended, statistics, *results,
        )  # fmt: skip

    compute(1, (query, key, value), (of_queries, of_keys), grad_output, output, gradients[0], None)
    compute(2, (key, query, grad_output), (of_keys, of_queries), value, None, *gradients[1:])
    return gradients


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % (2 * _ALIGNMENT) == 0 else tensor.clone()
