"""The fastest correct formulation in PyTorch alone: one sequence at a time, padding never touched.

Without rounding it is torch's own fused attention with the mask as a bias; with rounding, dropout or a wanted lse it
writes out the probabilities of one sequence. It reads sequence lengths on the host, so on a GPU it waits for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..dropout import dropout_keep
from ..layout import SparseLayout
from ..ops import AttentionCall, empty_output, lse_shape, register_backend

NAME = "torch"
BACKWARD_USES_LSE = False


def unsupported(call: AttentionCall, training: bool) -> list[str]:
    """Why this backend cannot compute `call`: it always can, a float64 one less precisely than the reference."""
    return ["float64 (its mask is a float32 bias)"] if call.query.dtype == torch.float64 else []


def layout_arguments(layout: SparseLayout, head_dim: int, dtype: torch.dtype) -> tuple[list[Tensor], tuple[int, ...]]:
    return [layout.bias()], ()


@dataclass(frozen=True)
class _Sequence:
    """One sequence's share of a call: views [heads, length, head_dim] of its real rows and keys."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor  # float32 [heads, query_length, key_length]
    rows: Tensor | None  # int64 [heads, query_length], dropout counters
    where: tuple  # index of its rows in tensors of the query's shape

    def of(self, like_query: Tensor) -> Tensor:
        """This sequence's part of a tensor shaped like the call's query: [heads, query_length, head_dim]."""
        part = like_query[self.where]
        return part.transpose(0, 1) if len(self.where) == 1 else part


def _sequences(call: AttentionCall) -> Iterator[_Sequence]:
    heads, device = call.query.shape[1], call.query.device
    (bias,) = call.layout
    if call.packed:
        bounds = call.cu_seqlens.tolist()
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            query, key, value = (t[start:end].transpose(0, 1) for t in (call.query, call.key, call.value))
            rows = None
            if call.dropout > 0:
                rows = torch.arange(start * heads, end * heads, device=device).view(-1, heads).t()
            own = _sequence_bias(call, bias, None, end - start, end - start)
            yield _Sequence(query, key, value, own, rows, (slice(start, end),))
        return
    batch, _, query_len, _ = call.query.shape
    query_lengths = [query_len] * batch if call.query_lengths is None else call.query_lengths.tolist()
    key_lengths = [call.key.shape[2]] * batch if call.key_lengths is None else call.key_lengths.tolist()
    for index, (own_rows, own_keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        rows = None
        if call.dropout > 0:
            first = index * heads * query_len
            rows = torch.arange(first, first + heads * query_len, device=device).view(heads, -1)[:, :own_rows]
        own = _sequence_bias(call, bias, index, own_rows, own_keys)
        where = (index, slice(None), slice(0, own_rows))
        query, key, value = call.query[where], call.key[index, :, :own_keys], call.value[index, :, :own_keys]
        yield _Sequence(query, key, value, own, rows, where)


def _sequence_bias(call: AttentionCall, bias: Tensor, index: int | None, rows: int, keys: int) -> Tensor:
    bias = bias[:, call.query_offset : call.query_offset + rows, :keys]
    if call.key_padding is not None:
        padding = ~call.key_padding[index, :keys]
        bias = bias.masked_fill(padding, float("-inf")) if bool(padding.any()) else bias
    if call.causal:
        future = torch.ones(rows, keys, dtype=torch.bool, device=bias.device).triu(call.query_offset + 1)
        bias = bias.masked_fill(future, float("-inf"))
    return bias


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output = empty_output(call.query, call.packed).zero_()
    lse_size = lse_shape(call.query, call.packed) if call.need_lse else (0,)
    lse = torch.full(lse_size, float("-inf"), dtype=torch.float32, device=call.query.device)
    fused = call.table is None and call.dropout == 0 and not call.need_lse
    for sequence in _sequences(call):
        if 0 in sequence.bias.shape:
            continue
        if fused:
            query, key, value = (t.unsqueeze(0) for t in (sequence.query, sequence.key, sequence.value))
            bias = sequence.bias.to(query.dtype)  # fp16 and bf16 hold 0 and -inf exactly
            result = scaled_dot_product_attention(query, key, value, bias.unsqueeze(0), scale=call.scale)[0]
            empty = sequence.bias.amax(-1) == float("-inf")
            result = result.masked_fill(empty.unsqueeze(-1), 0.0) if bool(empty.any()) else result
        else:
            used, own_lse, _, _ = _probabilities(call, sequence)
            result = used @ sequence.value.float()
            if call.need_lse:
                own_rows = sequence.where[-1]
                (lse[:, own_rows] if call.packed else lse[sequence.where[0], :, own_rows]).copy_(own_lse)
        sequence.of(output).copy_(result)
    return output, lse


def _probabilities(call: AttentionCall, sequence: _Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Probabilities as used, lse, softmax before rounding and dropout, and dropout's factors (or None) of a sequence:
    float32 [heads, rows, keys], lse [heads, rows]."""
    query, key = sequence.query.float(), sequence.key.float()
    scores = torch.baddbmm(sequence.bias, query, key.transpose(1, 2), alpha=call.scale)
    lse = torch.logsumexp(scores, dim=-1)
    # Subtract 0 from an empty row's scores, so that exp(-inf) = 0 and nothing becomes NaN.
    scores -= lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    softmax = torch.exp(scores)
    used = softmax
    if call.table is not None:
        # The level follows from the exponent; no probability is needed. Both bounds keep -inf out of the integers.
        levels = torch.tensor(call.table.levels, dtype=torch.float32, device=scores.device)
        position = scores * (math.log2(math.e) / call.table.step) - math.log2(call.table.threshold) / call.table.step
        used = levels[position.floor_().clamp_(-1, len(call.table.levels) - 2).to(torch.int32).add_(1)]
    factors = None
    if call.dropout > 0:
        keys = torch.arange(key.shape[1], device=key.device)
        factors = dropout_keep(call.seed, sequence.rows, keys, call.dropout).float() / (1 - call.dropout)
        used = used * factors
    return used, lse, softmax, factors


def backward(call: AttentionCall, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (call.query, call.key, call.value)]
    for sequence in _sequences(call):
        if 0 in sequence.bias.shape:
            continue
        query, key, value = (t.float() for t in (sequence.query, sequence.key, sequence.value))
        grad = sequence.of(grad_output).float()
        used, _, softmax, factors = _probabilities(call, sequence)
        grad_softmax = grad @ value.transpose(1, 2)  # straight through the rounding
        if factors is not None:
            grad_softmax *= factors
        grad_scores = softmax * (grad_softmax - (softmax * grad_softmax).sum(-1, keepdim=True)) * call.scale
        own = (grad_scores @ key, grad_scores.transpose(1, 2) @ query, used.transpose(1, 2) @ grad)
        for whole, part in zip(gradients, own, strict=True):
            if call.packed:
                whole[sequence.where[0]] = part.transpose(0, 1).to(whole.dtype)
            else:
                whole[sequence.where[0], :, : part.shape[1]] = part.to(whole.dtype)
    return tuple(gradients)


register_backend(NAME, forward, backward)
