"""The attention operator: schema, fake and autograd. Backends register what computes it.

`torch.ops.sparse_attn.attention` takes tensors and constants only, so that it can be traced, compiled and captured;
`sparse_attn.sparse_attention` is the function to call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .quantization import QuantizationTable


@dataclass(slots=True)
class AttentionCall:
    """The arguments of one attention call, as a backend gets them.

    Padded calls have query [batch, heads, query_len, head_dim] and key, value [batch, heads, key_len, head_dim], of
    any strides; packed ones have all three [tokens, heads, head_dim] and `cu_seqlens`.

    Attributes:
        layout, layout_sizes: the tensors and integers that the backend's `layout_arguments` chose.
        query_lengths, key_lengths: int32 [batch] or None; rows and keys from there on are padding.
        key_padding: bool [batch, key_len] or None; false keys are padding.
        cu_seqlens: int32 [batch + 1] or None.
        max_length: the longest packed sequence; 0 for padded calls.
        seed: int64 [1] or None; for dropout.
        scale: factor on the scores.
        table: quantiser of the probabilities or None.
        causal: keys after a query's absolute position are not kept.
        query_offset: absolute position of the first query.
        dropout: share of probabilities to drop.
        need_lse: whether the log-sum-exp of the rows is wanted; it is empty otherwise.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: list[Tensor]
    layout_sizes: tuple[int, ...]
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    key_padding: Tensor | None
    cu_seqlens: Tensor | None
    max_length: int
    seed: Tensor | None
    scale: float
    table: QuantizationTable | None
    causal: bool
    query_offset: int
    dropout: float
    need_lse: bool

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None


Forward = Callable[[AttentionCall], tuple[Tensor, Tensor]]
Backward = Callable[[AttentionCall, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_FORWARD: dict[str, Forward] = {}
_BACKWARD: dict[str, Backward] = {}


def register_backend(name: str, forward: Forward, backward: Backward) -> None:
    """Makes `forward(call) -> (output, lse)` and `backward(call, output, lse, grad_output) -> (grad_query, grad_key,
    grad_value)` what the operator runs for the backend `name`."""
    _FORWARD[name], _BACKWARD[name] = forward, backward


# One schema for both operators' common arguments; `levels` and `threshold` are a QuantizationTable, empty = off.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor[] layout, int[] layout_sizes, Tensor? query_lengths, "
    "Tensor? key_lengths, Tensor? key_padding, Tensor? cu_seqlens, SymInt max_length, Tensor? seed, float scale, "
    "float[] levels, float threshold, bool causal, SymInt query_offset, float dropout, bool need_lse, str backend"
)
_KINDS = [argument.rpartition(" ")[0] for argument in _ARGUMENTS.split(", ")]
_TENSORS = [at for at, kind in enumerate(_KINDS) if kind in ("Tensor", "Tensor?")]
_LAYOUT, _BACKEND = _KINDS.index("Tensor[]"), len(_KINDS) - 1
torch.library.define("sparse_attn::attention", f"({_ARGUMENTS}) -> (Tensor output, Tensor lse)")
torch.library.define(
    "sparse_attn::attention_backward",
    f"({_ARGUMENTS}, Tensor output, Tensor lse, Tensor grad_output) -> (Tensor, Tensor, Tensor)",
)


def run(call: AttentionCall, backend: str, training: bool) -> tuple[Tensor, Tensor]:
    """Runs the operator: output in the shape and dtype of the query, and the lse. `training`: whether gradients are
    wanted. Raises NotImplementedError for forward-mode gradients."""
    if forward_ad._current_level >= 0:
        _expect_no_tangents(call)
    if not (training or _is_watched(call.query)):
        return _FORWARD[backend](call)
    return torch.ops.sparse_attn.attention(*operator_arguments(call), backend)


def operator_arguments(call: AttentionCall) -> list:
    """A call as the operator takes it, without the backend's name: `_call` makes it again."""
    table = call.table
    return [
        call.query, call.key, call.value, call.layout, list(call.layout_sizes),
        call.query_lengths, call.key_lengths, call.key_padding, call.cu_seqlens, call.max_length, call.seed,
        call.scale, list(table.levels) if table else [], table.threshold if table else 0.0,
        call.causal, call.query_offset, call.dropout, call.need_lse,
    ]  # fmt: skip


def _is_watched(query: Tensor) -> bool:
    """Whether anybody wants to see the operator itself: a compiler, a tracer, a mode, a subclass of tensors. Otherwise
    a call does without torch's dispatcher, which takes as long as a short input."""
    return (
        torch.compiler.is_compiling()
        or type(query) is not Tensor
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
    )


def _expect_no_tangents(call: AttentionCall) -> None:
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (call.query, call.key, call.value)):
        raise NotImplementedError(
            "sparse_attention has no forward-mode gradients, and query, key or value has a tangent; use backward "
            "gradients, or sparse_attn.attention.attention_probabilities, which has both"
        )


def empty_output(query: Tensor, packed: bool) -> Tensor:
    """An output for `query`: heads beside tokens in memory, so that [batch, tokens, heads * head_dim] is a view."""
    if packed:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    batch, heads, query_len, head_dim = query.shape
    return query.new_empty(batch, query_len, heads, head_dim).transpose(1, 2)


def lse_shape(query: Tensor, packed: bool) -> tuple[int, ...]:
    """[batch, heads, query_len], or [heads, tokens] for packed calls."""
    return (query.shape[1], query.shape[0]) if packed else tuple(query.shape[:3])


def precision(query: Tensor) -> torch.dtype:
    """What scores are computed in: float32, or float64 for such inputs."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def without_autocast(query: Tensor) -> torch.autocast:
    """Where products have the precision that their factors have, which torch.autocast would lower."""
    return torch.autocast(query.device.type, enabled=False)


def empty_results(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Memory for the output and, where it is wanted, for lse."""
    shape = lse_shape(call.query, call.packed) if call.need_lse else (0,)
    return empty_output(call.query, call.packed), call.query.new_empty(shape, dtype=precision(call.query))


def empty_gradients(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients of query, key and value."""
    inputs = (call.query, call.key, call.value)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _call(*arguments) -> AttentionCall:
    *first, levels, threshold, causal, query_offset, dropout, need_lse = arguments
    table = _table(threshold, tuple(levels)) if levels else None
    return AttentionCall(*first, table, causal, query_offset, dropout, need_lse)


_table = lru_cache(maxsize=256)(QuantizationTable)  # the same one for every call


@torch.library.impl("sparse_attn::attention", "CompositeExplicitAutograd")
def _attention(*arguments):
    *shared, backend = arguments
    return _FORWARD[backend](_call(*shared))


@torch.library.register_fake("sparse_attn::attention")
def _attention_fake(*arguments):
    return empty_results(_call(*arguments[:_BACKEND]))


@torch.library.impl("sparse_attn::attention_backward", "CompositeExplicitAutograd")
def _attention_backward(*arguments):
    *shared, backend, output, lse, grad_output = arguments
    return _BACKWARD[backend](_call(*shared), output, lse, grad_output)


@torch.library.register_fake("sparse_attn::attention_backward")
def _attention_backward_fake(*arguments):
    return empty_gradients(_call(*arguments[:_BACKEND]))


def _setup_context(ctx, inputs, output):
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.constants = [None if at in (*_TENSORS, _LAYOUT) else argument for at, argument in enumerate(inputs)]
    ctx.save_for_backward(out, lse, *(inputs[at] for at in _TENSORS), *inputs[_LAYOUT])


def _autograd_backward(ctx, grad_output, _grad_lse):
    out, lse, *tensors = ctx.saved_tensors
    arguments = list(ctx.constants)
    for at, tensor in zip(_TENSORS, tensors, strict=False):
        arguments[at] = tensor
    arguments[_LAYOUT] = tensors[len(_TENSORS) :]
    if torch.is_grad_enabled() and arguments[_BACKEND] == "reference":  # plain PyTorch, to be differentiated again
        gradients = _BACKWARD["reference"](_call(*arguments[:_BACKEND]), out, lse, grad_output)
    else:
        gradients = torch.ops.sparse_attn.attention_backward(*arguments, out, lse, grad_output)
    return *gradients, *(_no_gradient(argument) for argument in arguments[3:])


def _no_gradient(argument) -> list[None] | None:
    """What autograd wants back for an argument without gradient: a list for a list of tensors."""
    tensors = isinstance(argument, list) and all(isinstance(item, Tensor) for item in argument)
    return [None] * len(argument) if tensors else None


torch.library.register_autograd("sparse_attn::attention", _autograd_backward, setup_context=_setup_context)


def _remember_backend(ctx, inputs, output):
    ctx.backend = inputs[_BACKEND]


def _no_second_gradient(ctx, *_):
    raise NotImplementedError(
        f"sparse_attention with the backend {ctx.backend!r} has no gradients of second order; backend='reference' and "
        "sparse_attn.attention.attention_probabilities have them"
    )


torch.library.register_autograd("sparse_attn::attention_backward", _no_second_gradient, setup_context=_remember_backend)
