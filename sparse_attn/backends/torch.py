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
from ..ops import AttentionCall, empty_output, lse_shape, register_backend, without_autocast
from ..quantization import QuantizationTable

NAME = "torch"
BACKWARD_USES_LSE = False


def unsupported(call: AttentionCall, training: bool) -> list[str]:
    """Why this backend cannot compute `call`: it always can, a float64 one less precisely than the reference."""
    return ["float64 (its mask is a float32 bias)"] if call.query.dtype == torch.float64 else []


def layout_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, table: QuantizationTable | None, training: bool
) -> tuple[list[Tensor], tuple[int, ...]]:
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
    query_lengths = _lengths(call.query_lengths, batch, query_len)
    key_lengths = _lengths(call.key_lengths, batch, call.key.shape[2])
    for index, (own_rows, own_keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        rows = None
        if call.dropout > 0:
            first = index * heads * query_len
            rows = torch.arange(first, first + heads * query_len, device=device).view(heads, -1)[:, :own_rows]
        own = _sequence_bias(call, bias, index, own_rows, own_keys)
        where = (index, slice(None), slice(0, own_rows))
        query, key, value = call.query[where], call.key[index, :, :own_keys], call.value[index, :, :own_keys]
        yield _Sequence(query, key, value, own, rows, where)


def _lengths(lengths: Tensor | None, batch: int, longest: int) -> list[int]:
    return [longest] * batch if lengths is None else lengths.clamp(0, longest).tolist()


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
    with without_autocast(call.query):
        return _forward(call)


def _forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output = empty_output(call.query, call.packed).zero_()
    lse_size = lse_shape(call.query, call.packed) if call.need_lse else (0,)
    lse = torch.full(lse_size, float("-inf"), dtype=torch.float32, device=call.query.device)
    fused = call.table is None and call.dropout == 0 and not call.need_lse
    for sequence in _sequences(call):
        if 0 in sequence.bias.shape:
            continue
        if fused:
            result = _fused(sequence, call.scale)
        else:
            log_probabilities, own_lse = _log_probabilities(call, sequence)
            used, _ = _used_probabilities(call, sequence, log_probabilities)
            result = used @ sequence.value.float()
            if call.need_lse:
                own_rows = sequence.where[-1]
                (lse[:, own_rows] if call.packed else lse[sequence.where[0], :, own_rows]).copy_(own_lse)
        sequence.of(output).copy_(result)
    return output, lse


def _fused(sequence: _Sequence, scale: float) -> Tensor:
    query, key, value, bias = (t.unsqueeze(0) for t in (sequence.query, sequence.key, sequence.value, sequence.bias))
    if query.device.type == "cpu":  # takes a float32 bias for every dtype and yields zeros for rows without keys
        return scaled_dot_product_attention(query, key, value, bias, scale=scale)[0]
    result = scaled_dot_product_attention(query, key, value, bias.to(query.dtype), scale=scale)[0]
    return result.masked_fill((sequence.bias == float("-inf")).all(-1, keepdim=True), 0.0)


def _log_probabilities(call: AttentionCall, sequence: _Sequence) -> tuple[Tensor, Tensor]:
    """Logarithm of a sequence's softmax, float32 [heads, rows, keys], -inf where not kept; and lse [heads, rows]."""
    query, key = sequence.query.float(), sequence.key.float()
    scores = torch.baddbmm(sequence.bias, query, key.transpose(1, 2), alpha=call.scale)
    lse = torch.logsumexp(scores, dim=-1)
    # Subtract 0 from an empty row's scores, so that they stay -inf and nothing becomes NaN.
    return scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)), lse


def _used_probabilities(
    call: AttentionCall, sequence: _Sequence, log_probabilities: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Probabilities after rounding and dropout, and dropout's factors or None: float32 [heads, rows, keys]."""
    if call.table is None:
        used = log_probabilities.exp()
    else:
        used = _rounded(log_probabilities, call.table)
    if call.dropout == 0:
        return used, None
    keys = torch.arange(used.shape[-1], device=used.device)
    factors = dropout_keep(call.seed, sequence.rows, keys, call.dropout).float() / (1 - call.dropout)
    return used.mul_(factors), factors


def _rounded(log_probabilities: Tensor, table: QuantizationTable) -> Tensor:
    """The levels of `table` for natural logarithms of probabilities, with as few passes over memory as possible."""
    per_bin = math.log2(math.e) / table.step
    bins = log_probabilities.mul(per_bin).sub_(math.log2(table.threshold) / table.step)
    bins.floor_().clamp_(-1, len(table.levels) - 2)  # -1: below the threshold
    if table.mid_points:  # mid-points are quicker to compute than to look up
        pruned = bins < 0
        return bins.add_(0.5).mul_(table.step).add_(math.log2(table.threshold)).exp2_().masked_fill_(pruned, 0.0)
    levels = torch.tensor(table.levels, dtype=torch.float32, device=bins.device)
    unknown = bins.isnan()
    return levels[bins.nan_to_num_(0.0).add_(1).to(torch.int32)].masked_fill_(unknown, float("nan"))


def backward(call: AttentionCall, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(call.query):
        return _backward(call, grad_output)


def _backward(call: AttentionCall, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (call.query, call.key, call.value)]
    for sequence in _sequences(call):
        if 0 in sequence.bias.shape:
            continue
        query, key, value = (t.float() for t in (sequence.query, sequence.key, sequence.value))
        grad = sequence.of(grad_output).float()
        log_probabilities, _ = _log_probabilities(call, sequence)
        used, factors = _used_probabilities(call, sequence, log_probabilities)
        softmax = log_probabilities.exp_()
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
