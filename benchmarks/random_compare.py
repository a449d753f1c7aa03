"""Runs a random attention call twice, with its backward pass if it has one, and compares it with the reference in
float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attn import SparseLayout, sparse_attention

from .error_budget import gradient_budget, output_budget
from .random_cases import Case, arguments, layout, tensors

_LSE_LIMIT = 5e-5  # absolute and relative
_TINY = 1e-30


@dataclass(frozen=True)
class Checked:
    """A case that was run.

    Attributes:
        failures: what is wrong with it; none: nothing.
        share: the largest share of an error budget that it used.
    """

    number: int
    failures: tuple[str, ...]
    share: float = 0.0


def check(case: Case, device: torch.device) -> Checked:
    """Runs a case and compares it. Raises what the kernels raise."""
    generator = torch.Generator(device).manual_seed(case.number)
    *inputs, grad_output = tensors(case, device, generator)
    mask, named = layout(case, device, generator), arguments(case, device, generator)
    with _poisoned_memory():
        first, again = (_results(case, inputs, grad_output, mask, named, case.target.backend) for _ in range(2))
    failures = []
    for name, own, same in zip(_NAMES, first, again):
        if not torch.equal(own, same):
            failures.append(f"{name}: other bits in a second run")
    exact_inputs = [tensor.double() for tensor in inputs]
    exact = _results(case, exact_inputs, grad_output.double(), mask, named, "reference")
    if case.kind.packed:
        first, exact = (_padded_results(results, case.sequences) for results in (first, exact))
        inputs, grad_output = [_padded(t, case.sequences) for t in inputs], _padded(grad_output, case.sequences)
        named = _padded_arguments(named, case.sequences, device)
    failures += _mistakes(first, exact, named)
    shares = dict(_shares(case, inputs, grad_output, mask, named, first, exact))
    failures += [f"{name}: error {share:.1f} times its budget" for name, share in shares.items() if not share <= 1]
    return Checked(case.number, tuple(failures), max(shares.values()))


_NAMES = ("output", "lse", "gradient of the query", "gradient of the key", "gradient of the value")


def _results(
    case: Case, inputs: Sequence[Tensor], grad_output: Tensor, mask: SparseLayout, named: dict[str, Any], backend: str
) -> tuple[Tensor, ...]:
    """What `_NAMES` says, as far as the target goes; with dropout, the same one every time."""
    leaves = [tensor.detach().requires_grad_(case.trains) for tensor in inputs]
    torch.manual_seed(case.number)
    output, lse = sparse_attention(
        *leaves, mask, dropout=case.kind.dropout, return_lse=True, backend=backend, **named
    )  # fmt: skip
    gradients = torch.autograd.grad(output, leaves, grad_output) if case.trains else ()
    return output.detach(), lse, *gradients


def _mistakes(results: Sequence[Tensor], exact: Sequence[Tensor], named: dict[str, Any]) -> Iterator[str]:
    """What no rounding explains, in padded results."""
    output, lse, *gradients = results
    empty = exact[1] == float("-inf")
    for name, tensor in zip(_NAMES, results):
        finite = torch.isfinite(tensor)
        if not (finite | empty if name == "lse" else finite).all():
            yield f"{name}: not finite everywhere"
    if not torch.equal(lse == float("-inf"), empty):
        yield "lse: -inf for other rows than those without keys"
    of_queries = {"output": output, **dict(zip(("gradient of the query",), gradients))}
    for name, tensor in of_queries.items():
        if (tensor[empty] != 0).any():
            yield f"{name}: not zero for rows without keys"
    if not gradients:
        return
    _, grad_key, grad_value = gradients
    keys = torch.arange(grad_key.shape[2], device=grad_key.device)
    unseen = torch.zeros(grad_key.shape[0], keys.numel(), dtype=torch.bool, device=keys.device)
    if "key_lengths" in named:
        unseen |= keys >= named["key_lengths"][:, None]
    if "key_padding_mask" in named:
        unseen |= ~named["key_padding_mask"]
    for name, tensor in (("gradient of the key", grad_key), ("gradient of the value", grad_value)):
        if (tensor.transpose(1, 2)[unseen] != 0).any():
            yield f"{name}: not zero for padding"


def _shares(
    case: Case, inputs: Sequence[Tensor], grad_output: Tensor, mask: SparseLayout, named: dict[str, Any],
    results: Sequence[Tensor], exact: Sequence[Tensor],
) -> Iterator[tuple[str, float]]:  # fmt: skip
    """The largest errors of padded results, as shares of their budgets; NaN where a result is."""
    output, lse, *gradients = (tensor.double() for tensor in results)
    exact_output, exact_lse, *exact_gradients = exact
    if "query_lengths" in named:  # rows of padding have no gradient to pass on
        rows = torch.arange(grad_output.shape[2], device=output.device)
        grad_output = grad_output * (rows < named["query_lengths"][:, None])[:, None, :, None]
    options = {**named, "dropout": case.kind.dropout}
    _, allowed = output_budget(*inputs, mask, **options)
    yield "output", _largest((output - exact_output).abs() / allowed.clamp(min=_TINY))
    kept = exact_lse != float("-inf")
    error = (lse[kept] - exact_lse[kept]).abs()
    yield "lse", _largest(error / (_LSE_LIMIT * (1 + exact_lse[kept].abs())))
    if not gradients:
        return
    budget = gradient_budget(*inputs, grad_output, mask, **options)
    for name, own, true in zip(("query", "key", "value"), gradients, exact_gradients, strict=True):
        norm = torch.linalg.vector_norm(own - true, dim=(-2, -1))
        yield f"gradient of the {name}", _largest(norm / getattr(budget, name).clamp(min=_TINY))


def _largest(tensor: Tensor) -> float:
    return tensor.max().item() if tensor.numel() else 0.0


def _padded(packed: Tensor, sequences: Sequence[int]) -> Tensor:
    """[tokens, heads, head_dim] -> [sequences, heads, longest, head_dim], zeros behind the shorter ones."""
    longest = max(sequences)
    parts = [part.transpose(0, 1) for part in packed.split(list(sequences))]
    return torch.stack([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])


def _padded_results(results: Sequence[Tensor], sequences: Sequence[int]) -> tuple[Tensor, ...]:
    output, lse, *gradients = results
    parts = [torch.nn.functional.pad(part, (0, max(sequences) - part.shape[1]), value=float("-inf"))
             for part in lse.split(list(sequences), dim=1)]  # fmt: skip
    return _padded(output, sequences), torch.stack(parts), *(_padded(tensor, sequences) for tensor in gradients)


def _padded_arguments(named: dict[str, Any], sequences: Sequence[int], device: torch.device) -> dict[str, Any]:
    lengths = torch.tensor(sequences, device=device)
    kept = {name: value for name, value in named.items() if name not in ("cu_seqlens", "max_length")}
    return {**kept, "query_lengths": lengths, "key_lengths": lengths}


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that an element nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
