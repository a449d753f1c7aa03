"""What the arguments of `sparse_attention` must be; every refusal names the thing, its shape and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import expect_whole
from .layout import SparseLayout

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(
    query: Tensor, key: Tensor, value: Tensor, layout: SparseLayout, cu_seqlens: Tensor | None, query_offset: int
) -> None:
    """Raises ValueError where query, key, value, layout and cu_seqlens do not fit together."""
    _expect_layout(layout)
    _check_tensors(query, key, value, cu_seqlens is not None)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, query)
    _check_layout(query, key, layout, cu_seqlens is not None, query_offset)


def check_prepared(layout: SparseLayout, head_dim: int, dtype: torch.dtype) -> None:
    """Raises ValueError for a layout, head_dim or dtype that no call has, TypeError for a head_dim of another kind."""
    _expect_layout(layout)
    expect_whole(head_dim=head_dim)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected torch.float16, bfloat16, float32 or float64")


def _expect_layout(layout: object) -> None:
    if not isinstance(layout, SparseLayout):
        raise ValueError(
            f"layout is {type(layout).__name__}, expected a SparseLayout; compile one with mask.layout(layer, device)"
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, packed: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {type(tensor).__name__}, expected a tensor")
    if packed:
        if query.ndim != 3 or key.shape != query.shape or value.shape != query.shape:
            shapes = _shapes(query, key, value)
            raise ValueError(f"{shapes}: with cu_seqlens all three must be [tokens, heads, head_dim]")
    elif query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"{_shapes(query, key, value)}: expected query [batch, heads, query_len, head_dim] and key, value "
            "[batch, heads, key_len, head_dim], or all three [tokens, heads, head_dim] with cu_seqlens"
        )
    elif query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(f"{_shapes(query, key, value)}: batch, heads and head_dim must agree")
    if query.shape[-1] == 0:
        raise ValueError(f"{_shapes(query, key, value)}: head_dim is 0, expected at least 1")
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(
            f"query is {query.dtype}, key {key.dtype}, value {value.dtype}; expected one dtype of float16, bfloat16, "
            "float32, float64 for all three"
        )
    if key.device != query.device or value.device != query.device:
        raise ValueError(
            f"query is on {query.device}, key on {key.device}, value on {value.device}; expected one device"
        )


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


def _check_cu_seqlens(cu_seqlens: Tensor, query: Tensor) -> None:
    # Its values stay on the device: looking at them would make the host wait.
    _expect_tensor("cu_seqlens", cu_seqlens, "int32 [sequences + 1]")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected int32 [sequences + 1], "
            "starting with 0"
        )
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the query on {query.device}; expected one device")


def _check_layout(query: Tensor, key: Tensor, layout: SparseLayout, packed: bool, query_offset: int) -> None:
    heads = query.shape[1]
    if heads != layout.heads:
        raise ValueError(
            f"the query {tuple(query.shape)} has {heads} heads, the mask's layer {layout.heads}; masks are per head of "
            f"one model. Expected {'[tokens, heads, head_dim]' if packed else '[batch, heads, query_len, head_dim]'}"
        )
    if layout.device != query.device:
        raise ValueError(
            f"the layout is on {layout.device}, the query on {query.device}; use mask.layout(layer, query.device)"
        )
    if packed:
        return  # its lengths live on the device: see check_packed_length
    query_len, key_len = query.shape[2] + query_offset, key.shape[2]
    if query_len > layout.query_len or key_len > layout.key_len:
        raise ValueError(
            f"the sequence is longer than the mask: queries end at position {query_len} and keys at {key_len}, the "
            f"mask covers {layout.query_len} queries and {layout.key_len} keys. {_shorten_or_lengthen(layout)}. (Where "
            "padding alone is longer, a model patched with unpad=True takes it out first)"
        )


def longest_sequence(cu_seqlens: Tensor, tokens: int) -> int:
    """The longest sequence of a packed batch. Waits for the device; raises ValueError for lengths that are none."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens is {bounds[0]} to {bounds[-1]}, its shortest sequence has {min(lengths, default=0)} tokens; "
            f"expected cumulative lengths from 0 to the {tokens} tokens of the query, never falling"
        )
    return max(lengths, default=0)


def packed_length(cu_seqlens: Tensor, max_length: int | None, tokens: int) -> int:
    """How long packed sequences are at most: as the caller says, or else as they are.

    Raises ValueError for a sequence that is longer than the caller says, where a look at it costs nothing: on a CPU and
    outside of tracing. Elsewhere `max_length` is the caller's promise.
    """
    if max_length is not None and (cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling()):
        return max_length
    longest = longest_sequence(cu_seqlens, tokens)
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"max_length is {max_length}, but cu_seqlens has a sequence of {longest} tokens; pass the length of the "
            "longest or more, or leave max_length out"
        )
    return longest if max_length is None else max_length


def check_packed_length(longest: int, query_offset: int, layout: SparseLayout) -> None:
    """Raises ValueError where the longest packed sequence does not fit the mask."""
    if longest + query_offset > layout.query_len or longest > layout.key_len:
        raise ValueError(
            f"the longest packed sequence has {longest} tokens (query_offset {query_offset}), longer than the mask, "
            f"which covers {layout.query_len} queries and {layout.key_len} keys. {_shorten_or_lengthen(layout)}"
        )


def _shorten_or_lengthen(layout: SparseLayout) -> str:
    longest = min(layout.query_len, layout.key_len)
    return (
        f"Cut inputs (tokenizer(..., truncation=True, max_length={longest})), or make the mask from averages of longer "
        "ones"
    )


def batch_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Lengths as int32 and padding masks as bool: contiguous, of `shape`, on `device`. Raises ValueError for others."""
    if tensor is None:
        return None
    boolean = len(shape) == 2
    expected = "bool [batch, key_len]" if boolean else "int [batch]"
    _expect_tensor(name, tensor, expected)
    if tuple(tensor.shape) != shape or (tensor.dtype == torch.bool) != boolean or tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {expected} with shape {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the query on {device}; expected one device")
    if not boolean and tensor.dtype != torch.int32:  # what int32 cannot hold still means all, or none
        tensor = tensor.to(torch.int64).clamp(-1, torch.iinfo(torch.int32).max)
    return (tensor if boolean else tensor.to(torch.int32)).contiguous()


def _expect_tensor(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {type(value).__name__}, expected a tensor: {expected}, on the query's device")
