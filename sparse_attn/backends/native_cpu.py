"""The C++ kernels of `csrc/cpu` over column lists for 16 rows, forward and backward."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .. import extension
from ..dropout import drop_threshold
from ..layout import SparseLayout
from ..ops import AttentionCall, empty_gradients, empty_results
from ..quantization import QuantizationTable
from .row_lists import not_divided, row_lists_of

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROWS = 16

_CALL = (
    "Tensor? query_lengths, Tensor? key_lengths, Tensor? key_padding, Tensor? cu_seqlens, int max_length, "
    "Tensor? seed, float scale, Tensor levels, int level_count, float log2_threshold, float step, bool mid_points, "
    "bool causal, int query_offset, float dropout_factor, int dropout_threshold, str instruction_set"
)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor stops, Tensor columns, Tensor row_bits, bool full"
_DIVIDED = (
    "Tensor shared_stops, Tensor shared_columns, Tensor shared_bits, "
    "Tensor row_stops, Tensor row_columns, Tensor sorted_columns, Tensor sorted_places"
)
torch.library.define(
    "sparse_attn::native_attention",
    f"({_INPUTS}, {_DIVIDED}, {_CALL}, Tensor(a!) output, Tensor(b!) lse) -> ()",
)
torch.library.define(
    "sparse_attn::native_attention_backward",
    f"({_INPUTS}, Tensor transposed_stops, Tensor transposed_columns, Tensor transposed_bits, bool transposed_full, "
    f"{_DIVIDED}, {_CALL}, Tensor lse, Tensor grad_output, Tensor(a!) delta, "
    "Tensor(b!) grad_query, Tensor(c!) grad_key, Tensor(d!) grad_value) -> ()",
)
torch.library.define("sparse_attn::instruction_sets", "() -> str")

_instruction_set = ""  # the best of this processor


def instruction_sets() -> tuple[str, ...]:
    """Those that there are kernels for and this processor has, best first; the first is used. Empty without the
    extension."""
    return tuple(torch.ops.sparse_attn.instruction_sets().split()) if extension.available() else ()


def floats_are_faster() -> bool:
    """Whether this processor is known to multiply float32 faster than bfloat16."""
    return instruction_sets()[:1] in (("avx512",), ("avx2",))


def refusals(call: AttentionCall, training: bool) -> list[str]:
    """Why the kernels cannot compute `call`; empty if they can."""
    if call.query.device.type != "cpu":
        return [f"the query is on {call.query.device}; the kernels run on CPUs and NVIDIA GPUs"]
    if call.query.dtype not in _DTYPES:
        return [f"{call.query.dtype}; the kernels take float16, bfloat16 and float32"]
    return []


def layout_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, table: QuantizationTable | None, training: bool
) -> tuple[list[Tensor], tuple[int, ...]]:
    """The column lists for 16 queries, then the same divided, where the kernels take them; in training also those for
    16 keys."""
    undivided = dtype == torch.bfloat16 and (_instruction_set or instruction_sets()[0]) == "amx"
    tensors, full = [], []
    for transposed in (False, True) if training else (False,):
        lists = layout.lists(_ROWS, transposed=transposed)
        divided = not_divided() if undivided else row_lists_of(layout, transposed)
        tensors += [lists.stops, lists.columns, lists.row_bits, *divided]
        full.append(int(lists.full))
    return tensors, tuple(full)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output, lse = empty_results(call)
    torch.ops.sparse_attn.native_attention(
        call.query, call.key, call.value, *call.layout[:3], bool(call.layout_sizes[0]), *call.layout[3:10],
        *_arguments(call), output, lse,
    )  # fmt: skip
    return output, lse


def backward(call: AttentionCall, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients = empty_gradients(call)
    full, transposed_full = map(bool, call.layout_sizes)
    lists = (*call.layout[:3], full, *call.layout[10:13], transposed_full, *call.layout[13:])
    torch.ops.sparse_attn.native_attention_backward(
        call.query, call.key, call.value, *lists, *_arguments(call), lse, grad_output, torch.empty_like(lse), *gradients
    )
    return gradients


def _arguments(call: AttentionCall) -> tuple:
    table = call.table
    levels = _levels(table.levels if table else ())
    return (
        call.query_lengths, call.key_lengths, call.key_padding, call.cu_seqlens, call.max_length, call.seed, call.scale,
        levels, len(table.levels) if table else 0, math.log2(table.threshold) if table else 0.0,
        table.step if table else 1.0, table is not None and table.mid_points,
        call.causal, call.query_offset, 1.0 / (1.0 - call.dropout), drop_threshold(call.dropout), _instruction_set,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _levels(levels: tuple[float, ...]) -> Tensor:
    """float32 [at least 16], which the kernels look up in one vector; empty for none."""
    padding = [0.0] * (_ROWS - len(levels)) if levels else []
    return torch.tensor([*levels, *padding], dtype=torch.float32, device="cpu")
