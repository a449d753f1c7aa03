"""`sparse_attention`: checks what the arguments mean, picks a backend, calls the operator."""

from __future__ import annotations

import warnings
from contextlib import suppress
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import extension
from .arguments import expect_flags, expect_numbers, expect_shares, expect_whole
from .backends import BACKENDS, automatic, reference, usual
from .layout import SparseLayout, for_training_too
from .ops import AttentionCall, run, without_autocast
from .quantization import QuantizationTable, as_table
from .validation import batch_tensor, check_call, check_packed_length, check_prepared, packed_length

_NOT_PREPARED = (
    "the layout is compiled at its first call, which torch.compile cannot trace: call sparse_attention once before, or "
    "sparse_attn.attention.prepare(layout, head_dim, dtype)"
)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SparseLayout,
    *,
    scale: float | None = None,
    bits: int | QuantizationTable | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    causal: bool = False,
    query_offset: int = 0,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the positions that a global mask keeps, with probabilities rounded on the way if asked for.

    Position (i, j) is kept if mask[head, i + query_offset, j], key j is not padding (and not after the query, if
    causal). The softmax goes over kept keys; a row without any yields zeros and lse -inf.

    A layout is compiled for a backend at its first call. `torch.compile` cannot trace that: call this function once
    before, or `sparse_attn.attention.prepare` (which a patched model does by itself, for gradients unless all its
    weights are frozen).

    Args:
        query: [batch, heads, query_len, head_dim], or packed [tokens, heads, head_dim]. float16, bfloat16, float32,
            or float64 (reference backend).
        key, value: [batch, heads, key_len, head_dim], or packed like the query.
        layout: a layer's compiled mask (`GlobalMask.layout`), on the device of the query. Shorter inputs use its
            top-left corner.
        scale: factor on the scores; head_dim ** -0.5 by default.
        bits: 1 to 8 rounds probabilities to 2 ** bits levels of the published log-scale table (Ji et al. 2021); or a
            QuantizationTable; None does not round. Gradients pass straight through.
        query_lengths, key_lengths: int [batch]; rows and keys from there on are padding; more than there are means all,
            fewer than 0 none. Padding rows yield zeros.
        key_padding_mask: bool [batch, key_len], false = padding, for padding elsewhere than at the end.
        cu_seqlens: int32 [sequences + 1], cumulative lengths of packed sequences, starting with 0.
        max_length: the longest packed sequence, or more, where the caller knows it; otherwise the call waits for the
            device to tell. On GPUs it is not checked, nor is then that `cu_seqlens` ends with the last token; output
            rows beyond stay uninitialised.
        causal: no query looks at keys after its absolute position.
        query_offset: absolute position of the first query, for decoding with a key-value cache.
        dropout: share of probabilities dropped; the seed comes from torch's generator.
        return_lse: also return the log-sum-exp of each row's kept scores, float32 [batch, heads, query_len], or
            [heads, tokens] when packed (float64 for float64 inputs). It carries no gradient.
        backend: "triton", "native", "torch", "reference", or "auto" for the first of the device's that can compute
            the call. A named backend runs or raises.

    Returns:
        Tensor in the shape and dtype of the query, or (tensor, lse).

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit; each named with what was expected.
        TypeError: bits that are neither an integer nor a table; other arguments of the wrong kind.
        RuntimeError: the named backend cannot compute this; its reasons are listed.
        NotImplementedError: forward-mode gradients; gradients of second order, but with the reference backend.
            `attention_probabilities` has both.
    """
    expect_flags(return_lse=return_lse)
    call = _checked_call(
        query, key, value, layout, scale=scale, bits=bits, query_lengths=query_lengths, key_lengths=key_lengths,
        key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, max_length=max_length, causal=causal,
        query_offset=query_offset, dropout=dropout,
    )  # fmt: skip
    training = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    chosen = choose_backend(call, layout, training, backend)
    call.layout, call.layout_sizes = _layout_arguments(
        chosen, layout, query.shape[-1], query.dtype, call.table, training
    )
    call.need_lse = return_lse or (training and chosen.BACKWARD_USES_LSE)
    output, lse = run(call, chosen.NAME, training)
    return (output, lse) if return_lse else output


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SparseLayout,
    *,
    scale: float | None = None,
    bits: int | QuantizationTable | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    query_offset: int = 0,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What `sparse_attention` computes, together with its probabilities, for looking at them.

    Arguments are those of `sparse_attention` for padded tensors. It materialises all probabilities and is as slow as
    dense attention.

    Returns:
        The output, and the probabilities as used (after pruning, rounding and dropout) in the dtype of the query:
        [batch, heads, query_len, key_len]. Both carry gradients.
    """
    call = _checked_call(
        query, key, value, layout, scale=scale, bits=bits, query_lengths=query_lengths, key_lengths=key_lengths,
        key_padding_mask=key_padding_mask, causal=causal, query_offset=query_offset, dropout=dropout,
    )  # fmt: skip
    call.layout, call.layout_sizes = _layout_arguments(
        reference, layout, query.shape[-1], query.dtype, call.table, False
    )
    with without_autocast(query):
        attended = reference.attend(call, reference.padded_row_numbers(query))
    return attended.output, attended.used.to(query.dtype)


def prepare(
    layout: SparseLayout,
    head_dim: int,
    dtype: torch.dtype,
    backend: str = "auto",
    bits: int | QuantizationTable | None = None,
    training: bool | None = None,
) -> None:
    """Compiles what `backend` needs of `layout` ahead of the first call, for example before tracing it.

    Args:
        layout: on the device where it will be used.
        head_dim, dtype: of query, key and value.
        backend: as for `sparse_attention`.
        bits: what calls will pass.
        training: whether calls will need gradients, which takes more lists; None prepares for both.

    Raises:
        ValueError: what is no layout, head_dim or dtype; an unknown backend; what Triton's, if named, cannot compute.
        TypeError: bits that are neither an integer nor a table.
    """
    check_prepared(layout, head_dim, dtype)
    _check_backend(backend)
    table = as_table(bits)
    for with_gradients in (False, True) if training is None else (training,):
        if backend != "auto":
            _layout_arguments(BACKENDS[backend], layout, head_dim, dtype, table, with_gradients)
            continue
        # As far as the usual one, which takes the place of a first choice that refuses a call, or the next that can.
        names = automatic(layout, head_dim, dtype, table is not None, with_gradients)
        usual_place = names.index(usual(layout.device)[0])
        for place, name in enumerate(names):
            with suppress(ValueError):
                _layout_arguments(BACKENDS[name], layout, head_dim, dtype, table, with_gradients)
                if place >= usual_place:
                    break


def backends_on(device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, list[str]]:
    """Every backend and its reasons not to compute a small call on `device`; empty if it can. What "auto" prefers comes
    first."""
    device = torch.device(device)
    layout = SparseLayout(torch.ones(1, 16, 16, dtype=torch.bool, device=device))
    tensors = [torch.zeros(1, 1, 16, 64, dtype=dtype, device=device)] * 3
    call = _checked_call(*tensors, layout)
    preferred = usual(device)
    names = [*preferred, *(name for name in BACKENDS if name not in preferred)]
    return {name: BACKENDS[name].unsupported(call, training=False) for name in names}


def _layout_arguments(
    backend: ModuleType,
    layout: SparseLayout,
    head_dim: int,
    dtype: torch.dtype,
    table: QuantizationTable | None,
    training: bool,
) -> tuple[list[Tensor], tuple[int, ...]]:
    kind = (backend.NAME, head_dim, dtype, table, training)
    if kind not in layout.arguments:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=_NOT_PREPARED)
        arguments = _compiled(backend, layout, head_dim, dtype, table, training)
        if layout.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(layout.device).synchronize()  # calls on other streams read them too
        layout.arguments[kind] = arguments
    return layout.arguments[kind]


@for_training_too
def _compiled(backend: ModuleType, layout: SparseLayout, *kind) -> tuple[list[Tensor], tuple[int, ...]]:
    """What a backend wants of a layout, as tensors that later calls can use: torch.export traces calls with tensors
    that hold nothing."""
    with _disable_current_modes():
        return backend.layout_arguments(layout, *kind)


def _checked_call(
    query, key, value, layout, *, scale=None, bits=None, query_lengths=None, key_lengths=None, key_padding_mask=None,
    cu_seqlens=None, max_length=None, causal=False, query_offset=0, dropout=0.0,
) -> AttentionCall:  # fmt: skip
    expect_flags(causal=causal)
    expect_whole(0, query_offset=query_offset)
    expect_whole(None, or_none=True, max_length=max_length)  # a traced one's value may be unknown
    expect_numbers(or_none=True, scale=scale)
    if isinstance(scale, Tensor) and (scale.requires_grad or scale.numel() != 1):
        raise ValueError(
            f"scale is a tensor {tuple(scale.shape)} with requires_grad={scale.requires_grad}; expected one number, a "
            "constant: multiply the query by what is learned, or differs between heads, and pass scale=1.0"
        )
    expect_shares(dropout=dropout)
    check_call(query, key, value, layout, cu_seqlens, query_offset)
    if cu_seqlens is not None:
        if not (query_lengths is key_lengths is key_padding_mask is None):
            raise ValueError("cu_seqlens describes sequences without padding; leave lengths and padding masks out")
        max_length = packed_length(cu_seqlens, max_length, query.shape[0])
        check_packed_length(max_length, query_offset, layout)
    elif max_length is not None:
        raise ValueError(f"max_length is {max_length}, but nothing is packed; pass cu_seqlens, or leave max_length out")
    batch = query.shape[0]
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        layout=[],
        layout_sizes=(),
        query_lengths=batch_tensor("query_lengths", query_lengths, (batch,), query.device),
        key_lengths=batch_tensor("key_lengths", key_lengths, (batch,), query.device),
        key_padding=batch_tensor("key_padding_mask", key_padding_mask, (batch, key.shape[-2]), query.device),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous(),
        max_length=0 if cu_seqlens is None else max_length,
        seed=torch.randint(2**32, (1,), device=query.device) if dropout > 0 else None,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        table=as_table(bits),
        causal=causal,
        query_offset=query_offset,
        dropout=dropout,
        need_lse=False,
    )


def _check_backend(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}, expected 'auto' or one of {sorted(BACKENDS)}")


def choose_backend(call: AttentionCall, layout: SparseLayout, training: bool, backend: str) -> ModuleType:
    """The backend that will compute `call`: the one named, or the first one that can for "auto"."""
    _check_backend(backend)
    names = (backend,)
    if backend == "auto":
        names = automatic(layout, call.query.shape[-1], call.query.dtype, call.table is not None, training)
    refusals = {}
    for name in names:
        refusals[name] = BACKENDS[name].unsupported(call, training)
        if not refusals[name]:
            if len(refusals) > 1 and not torch.compiler.is_compiling():
                refusals.pop(name)
                _warn_of_refusals(name, refusals)
            return BACKENDS[name]
    reasons = _listed(refusals)
    raise RuntimeError(f"cannot compute attention for {describe(call)} with backend {backend!r}. {reasons}")


def _listed(refusals: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refusals.items())


_warned_of: set[tuple[str, ...]] = set()  # backends that took the place of others, and those


def _warn_of_refusals(backend: str, refusals: dict[str, list[str]]) -> None:
    """Says once what computes attention where the backends that are faster refuse."""
    if list(refusals) == ["native"] and not extension.available():
        return extension.warn_of_absence()
    kind = (backend, *refusals)
    if kind not in _warned_of:
        _warned_of.add(kind)
        warnings.warn(
            f"the backend {backend!r} computes attention; the faster ones cannot: {_listed(refusals)}", stacklevel=4
        )


def describe(call: AttentionCall) -> str:
    """What an error says about a call."""
    query, key = call.query, call.key
    parts = [f"query {tuple(query.shape)}", f"key {tuple(key.shape)}", str(query.dtype), f"on {query.device}"]
    parts += [f"bits {call.table.bits}"] if call.table else []
    parts += ["packed"] if call.packed else []
    return ", ".join(parts)
