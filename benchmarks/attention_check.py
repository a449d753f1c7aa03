"""Correct before timed: compares results with attention in float64, on a sample that stays cheap for long inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparse_attn.quantization import log_table, quantize

from .attention_inputs import Case
from .error_budget import edge_gaps
from .verdicts import Wrong

# Largest relative error, ||result - exact|| / ||exact||. Matrix units may compute float32 products in tf32.
LIMITS = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_PAIRS = 4  # sequences and heads looked at
_ROWS = 128  # queries of each


class Expected:
    """What is right for a case, on a sample of its sequences, heads and queries; computed once for all variants.

    Args:
        case: its mask, inputs and bits decide about the result.
        seed: of the sample.
    """

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        self._pairs = [(index, head, _rows(case, index, seed)) for index, head in _sampled_pairs(case, seed)]
        self._outputs = [self._output(*pair) for pair in self._pairs]
        self._gradients = self._all_gradients(*self._pairs[-1][:2]) if case.training else []

    def error(self, results: Sequence[Tensor], tolerance: float | None = None) -> float:
        """The relative error of a variant's results: output, and gradients of query, key and value in training.

        Raises Wrong where they have another shape, are not finite, or are further off than `tolerance` (default: the
        limit of the dtype). With bits, a probability at the edge of a bin may be off by one level.
        """
        packed = results[0].ndim == 3
        for result, original in zip(results, self.case.inputs.tensors(packed), strict=False):
            if result.shape != original.shape:
                raise Wrong(f"the result has shape {tuple(result.shape)}, expected {tuple(original.shape)}")
            if not all(bool(torch.isfinite(part).all()) for part in self._real_rows(result)):
                raise Wrong("the result is not finite everywhere")
        limit = LIMITS[self.case.inputs.dtype] if tolerance is None else tolerance
        found = [self._own(results[0], index, head)[rows] for index, head, rows in self._pairs]
        exact = torch.cat([output for output, _ in self._outputs])
        error = _relative_error(torch.cat(found), exact)
        slack = (torch.cat([gap for _, gap in self._outputs]).norm() / exact.norm()).item()
        gradient_errors = [
            _relative_error(self._own(result, *self._pairs[-1][:2]), gradient)
            for result, gradient in zip(results[1:], self._gradients, strict=True)
        ]
        largest = max([error, *gradient_errors])
        if not (error <= limit + slack and all(one <= limit for one in gradient_errors)):  # NaN is not
            raise Wrong(f"wrong: relative error {largest:.1e}, at most {limit:.0e} expected")
        return largest

    def _own(self, tensor: Tensor, index: int, head: int) -> Tensor:
        return self.case.inputs.sequence(tensor, index, head).double()

    def _real_rows(self, result: Tensor) -> Iterator[Tensor]:
        """Parts of a result without rows of padding."""
        if result.ndim == 3 or not self.case.workload.packed:
            yield result
            return
        for index, length in enumerate(self.case.workload.sequence_lengths):
            yield result[index, :, :length]

    def _softmax(self, index: int, head: int, rows: Tensor) -> Tensor:
        """Exact probabilities of some queries: float64 [rows, length]."""
        query, key, _, _ = (self._own(t, index, head) for t in self.case.inputs.tensors(packed=True))
        scores = query[rows] @ key.T * query.shape[-1] ** -0.5
        if self.case.layer is not None:
            keep = self.case.layer.keep[head, : len(query), : len(query)]
            scores = scores.masked_fill(~keep[rows], float("-inf"))
        return torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a query without keys

    def _output(self, index: int, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Exact output of some queries, and how far rounding may move it: float64 [rows, head_dim]."""
        value = self._own(self.case.inputs.tensors(packed=True)[2], index, head)
        softmax = self._softmax(index, head, rows)
        if self.case.bits is None:
            return softmax @ value, torch.zeros_like(value[rows])
        table = log_table(self.case.bits)
        return quantize(softmax, table) @ value, edge_gaps(softmax, table) @ value.abs()

    def _all_gradients(self, index: int, head: int) -> list[Tensor]:
        """Exact gradients of one sequence's query, key and value in one head: float64 [length, head_dim] each."""
        query, key, value, grad_output = (self._own(t, index, head) for t in self.case.inputs.tensors(packed=True))
        scale = query.shape[-1] ** -0.5
        grad_query, grad_key, grad_value = (torch.zeros_like(t) for t in (query, key, value))
        for rows in torch.arange(len(query), device=query.device).split(1024):
            softmax = self._softmax(index, head, rows)
            grad_softmax = grad_output[rows] @ value.T
            grad_scores = softmax * (grad_softmax - (softmax * grad_softmax).sum(-1, keepdim=True)) * scale
            grad_query[rows] = grad_scores @ key
            grad_key += grad_scores.T @ query[rows]
            grad_value += softmax.T @ grad_output[rows]
        return [grad_query, grad_key, grad_value]


def _sampled_pairs(case: Case, seed: int) -> list[tuple[int, int]]:
    """Sequences and heads: some by chance, and the last of both."""
    generator = torch.Generator("cpu").manual_seed(seed)
    batch, heads = case.workload.batch, case.workload.heads
    drawn = torch.randint(batch * heads, (_PAIRS - 1,), generator=generator).tolist()
    return [*(divmod(number, heads) for number in drawn), (batch - 1, heads - 1)]


def _rows(case: Case, index: int, seed: int) -> Tensor:
    """Queries of a sequence: the first and the last, and others by chance."""
    length, generator = case.workload.sequence_lengths[index], torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randperm(length, generator=generator)[:_ROWS]
    return torch.cat((drawn, torch.tensor([0, length - 1]))).unique().to(case.inputs.device)


def _relative_error(result: Tensor, exact: Tensor) -> float:
    return ((result - exact).norm() / exact.norm()).item()
