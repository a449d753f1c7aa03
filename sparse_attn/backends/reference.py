"""The meaning of attention over a global mask, in plain PyTorch. Other backends are tested against it.

    s = q . k^T * scale                          float32 (float64 for float64 inputs)
    kept(i, j) = mask[head, i + query_offset, j] and j < key_length and i < query_length
                 and key_padding[j] and (j <= i + query_offset, if causal)
    p = softmax of s over the kept keys of the row
    p = quantize(p, table), if a table is given   no renormalisation; straight-through gradient
    p = dropout(p)
    o = p . v

A row without kept keys yields o = 0 and lse = -inf. It materialises [batch, heads, query_len, key_len].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout import dropout_keep
from ..layout import SparseLayout
from ..ops import AttentionCall, empty_output, lse_shape, precision, register_backend, without_autocast
from ..quantization import QuantizationTable, quantize

NAME = "reference"
BACKWARD_USES_LSE = False


def unsupported(call: AttentionCall, training: bool) -> list[str]:
    """Why this backend cannot compute `call`: it always can."""
    return []


def layout_arguments(
    layout: SparseLayout, head_dim: int, dtype: torch.dtype, table: QuantizationTable | None, training: bool
) -> tuple[list[Tensor], tuple[int, ...]]:
    return [layout.keep()], ()


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    with without_autocast(call.query):
        return _forward(call)


def _forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    if not call.packed:
        result = attend(call, padded_row_numbers(call.query))
        output = empty_output(call.query, packed=False).copy_(result.output)
        return output, result.lse if call.need_lse else result.lse.new_empty(0)
    outputs = empty_output(call.query, packed=True)
    lse = call.query.new_empty(lse_shape(call.query, packed=True), dtype=precision(call.query))
    for start, end, sequence, row_numbers in sequences(call):
        result = attend(sequence, row_numbers)
        outputs[start:end] = result.output[0].transpose(0, 1)
        lse[:, start:end] = result.lse[0]
    return outputs, lse if call.need_lse else lse.new_empty(0)


def backward(call: AttentionCall, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(call.query):
        return _backward(call, grad_output)


def _backward(call: AttentionCall, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not call.packed:
        return _gradients(call, padded_row_numbers(call.query), grad_output)
    gradients = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (call.query, call.key, call.value)]
    for start, end, sequence, row_numbers in sequences(call):
        grad = grad_output[start:end].transpose(0, 1).unsqueeze(0)
        for whole, part in zip(gradients, _gradients(sequence, row_numbers, grad), strict=True):
            whole[start:end] = part[0].transpose(0, 1)
    return tuple(gradients)


class Attended(NamedTuple):
    """What a padded call computes; probabilities are [batch, heads, query_len, key_len].

    `softmax` is before rounding and dropout, `used` after both; `dropout` is 0 or 1 / (1 - p), or None without it.
    """

    output: Tensor
    lse: Tensor
    softmax: Tensor
    used: Tensor
    dropout: Tensor | None


def attend(call: AttentionCall, row_numbers: Tensor) -> Attended:
    """Attention of a padded call; `row_numbers` int64 [batch, heads, query_len] are the rows' dropout counters."""
    dtype = precision(call.query)
    scores = (call.query.to(dtype) @ call.key.to(dtype).transpose(-1, -2)) * call.scale
    scores = scores.masked_fill(~kept_positions(call), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    softmax = torch.softmax(scores, dim=-1).masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0)  # empty rows: no NaN
    used = softmax if call.table is None else quantize(softmax, call.table)
    factors = None
    if call.dropout > 0:
        keys = torch.arange(call.key.shape[2], device=call.key.device)
        factors = dropout_keep(call.seed, row_numbers, keys, call.dropout).to(dtype) / (1 - call.dropout)
        used = used * factors
    return Attended((used @ call.value.to(dtype)).to(call.query.dtype), lse, softmax, used, factors)


def kept_positions(call: AttentionCall) -> Tensor:
    """kept(i, j) of a padded call: bool [batch or 1, heads, query_len, key_len]."""
    query_len, key_len = call.query.shape[2], call.key.shape[2]
    device = call.query.device
    rows = torch.arange(query_len, device=device).view(-1, 1)
    keys = torch.arange(key_len, device=device)
    (mask,) = call.layout
    kept = mask[None, :, call.query_offset : call.query_offset + query_len, :key_len]
    if call.key_lengths is not None:
        kept = kept & (keys < call.key_lengths.view(-1, 1, 1, 1))
    if call.query_lengths is not None:
        kept = kept & (rows < call.query_lengths.view(-1, 1, 1, 1))
    if call.key_padding is not None:
        kept = kept & call.key_padding[:, None, None, :]
    if call.causal:
        kept = kept & (keys <= rows + call.query_offset)
    return kept


def padded_row_numbers(query: Tensor) -> Tensor:
    """Dropout counters of a padded call's rows: int64 [batch, heads, query_len], in this order from 0."""
    shape = query.shape[:3]
    return torch.arange(shape.numel(), device=query.device).view(shape)


def sequences(call: AttentionCall) -> Iterator[tuple[int, int, AttentionCall, Tensor]]:
    """The sequences of a packed call: first token, end, the padded call of batch 1, and its dropout counters
    (token * heads + head)."""
    heads = call.query.shape[1]
    bounds = call.cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        query, key, value = (t[start:end].transpose(0, 1).unsqueeze(0) for t in (call.query, call.key, call.value))
        rows = torch.arange(start * heads, end * heads, device=query.device).view(1, -1, heads).transpose(1, 2)
        yield start, end, replace(call, query=query, key=key, value=value, cu_seqlens=None), rows


def _gradients(call: AttentionCall, row_numbers: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = precision(call.query)
    query, key, value, grad_output = (t.to(dtype) for t in (call.query, call.key, call.value, grad_output))
    attended = attend(call, row_numbers)
    grad_value = attended.used.transpose(-1, -2) @ grad_output
    grad_used = grad_output @ value.transpose(-1, -2)
    grad_softmax = grad_used if attended.dropout is None else grad_used * attended.dropout  # straight through rounding
    row_term = (attended.softmax * grad_softmax).sum(-1, keepdim=True)
    grad_scores = attended.softmax * (grad_softmax - row_term) * call.scale
    gradients = (grad_scores @ key, grad_scores.transpose(-1, -2) @ query, grad_value)
    return tuple(gradient.to(call.query.dtype).contiguous() for gradient in gradients)


register_backend(NAME, forward, backward)
