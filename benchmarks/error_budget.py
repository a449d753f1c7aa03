"""How far attention and its gradients may be from float64.

The kernels round to the dtype of the inputs what they hand to the matrix unit and what they store. An error may be as
large as these roundings make it if they are independent, with a margin, plus a few units of float32 for sums. With
bits, a probability next to the edge of a bin may fall on either side of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import QuantizationTable, SparseLayout
from sparse_attn.attention import attention_probabilities
from sparse_attn.quantization import as_table

_EDGE = 1e-3  # width of a bin's edge, in bins
_UNITS = 16 * torch.finfo(torch.float32).eps


def edge_gaps(softmax: Tensor, table: QuantizationTable, tolerance: float = _EDGE) -> Tensor:
    """The distance between the two levels beside an edge for probabilities at that edge, 0 elsewhere."""
    position = (torch.log2(softmax) - math.log2(table.threshold)) / table.step
    edge = position.round().clamp(0, len(table.levels) - 2)
    levels = torch.tensor(table.levels, dtype=softmax.dtype, device=softmax.device)
    gaps = levels[edge.long() + 1] - levels[edge.long()]
    return torch.where((position - edge).abs() < tolerance, gaps, 0.0)


def output_budget(
    query: Tensor, key: Tensor, value: Tensor, layout: SparseLayout, bits=None, dropout: float = 0.0, **arguments
) -> tuple[Tensor, Tensor]:
    """The exact output of a padded call in float64, without dropout, and how far each element of an output may be off.

    Twice the error of a plain product of the exact probabilities, rounded to the inputs' dtype, with the values, plus a
    few units of float32 for the scores; with bits, also a level for every probability at an edge. With dropout, the
    largest that these roundings can be if nothing is dropped, but everything scaled, and no terms of a sum cancel:
    which ones do depends on what is dropped.
    """
    exact, factor = [tensor.double() for tensor in (query, key, value)], 1 / (1 - dropout)
    output, used = attention_probabilities(*exact, layout, bits=bits, **arguments)
    if dropout:
        allowed = _unit(factor * used @ exact[2].abs(), query.dtype).max()
    else:
        plain = _rounded(_rounded(used, query.dtype) @ exact[2], query.dtype)
        allowed = 2 * (plain - output).abs().max()
    allowed = allowed + 1e-5 * factor * exact[2].abs().max()
    if bits is None:
        return output, allowed.expand_as(output)
    _, softmax = attention_probabilities(*exact, layout, **arguments)
    return output, allowed + factor * edge_gaps(softmax, as_table(bits)) @ exact[2].abs()


@dataclass(frozen=True)
class GradientBudget:
    """How far the gradients of query, key and value may be off: norms over positions and dimensions, float64
    [batch, heads]."""

    query: Tensor
    key: Tensor
    value: Tensor


def gradient_budget(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, layout: SparseLayout, scale: float, bits=None,
    dropout: float = 0.0, **arguments,
) -> GradientBudget:  # fmt: skip
    """The budget of a padded call, whose probabilities it materialises in float64; dropout as in `output_budget`."""
    dtype, factor = query.dtype, 1 / (1 - dropout)
    query, key, value, grad = (tensor.double() for tensor in (query, key, value, grad_output))
    arguments = {**arguments, "scale": scale}
    output, softmax = attention_probabilities(query, key, value, layout, **arguments)
    used = softmax if bits is None else attention_probabilities(query, key, value, layout, bits=bits, **arguments)[1]
    used, grad_softmax = factor * used, factor * grad @ value.mT
    delta = (softmax * grad_softmax).sum(-1, keepdim=True)
    grad_scores = softmax * (grad_softmax - delta) * scale
    # Without bits, the kernels take delta from the rounded output.
    delta_error = _unit(factor * output, dtype) * grad if bits is None else torch.zeros_like(output)
    delta_error = torch.linalg.vector_norm(delta_error, dim=-1, keepdim=True) * scale
    terms = factor * grad.abs() @ value.abs().mT
    terms = softmax * (terms + (softmax * terms).sum(-1, keepdim=True)) * scale
    if dropout:
        sizes = grad_softmax.abs()
        grad_scores = softmax * (sizes + (softmax * sizes).sum(-1, keepdim=True)) * scale

    def allowed(left: Tensor, right: Tensor, sizes: Tensor) -> Tensor:
        """For a product whose left factor, of terms of these sizes, is rounded, like the product itself."""
        from_factor = (_unit(left, dtype).square() @ right.square()).sqrt()
        product = left.abs() @ right.abs() if dropout else left @ right
        return _norm(from_factor) + _norm(_unit(product, dtype)) + _UNITS * _norm(sizes @ right.abs())

    for_query = allowed(grad_scores, key, terms) + _norm(delta_error * (softmax @ key))
    from_delta = ((softmax * delta_error).square().mT @ query.square()).sqrt()
    for_key = allowed(grad_scores.mT, query, terms.mT) + _norm(from_delta)
    for_value = allowed(used.mT, grad, used.mT)
    if bits is not None:
        for_value = for_value + factor * _norm(edge_gaps(softmax, as_table(bits)).mT @ grad.abs())
    return GradientBudget(for_query, for_key, for_value)


def _unit(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Twice the largest error of rounding each element to `dtype`."""
    limits = torch.finfo(dtype)
    return limits.eps * tensor.abs().clamp(min=limits.smallest_normal)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).double()


def _norm(tensor: Tensor) -> Tensor:
    """Over positions and dimensions."""
    return torch.linalg.vector_norm(tensor, dim=(-2, -1))
