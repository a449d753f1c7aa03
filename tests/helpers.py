"""What tests of attention share: where a backend can run, random inputs, and how wrong a result may be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_attn import GlobalMask, QuantizationTable, SparseLayout, extension, sparse_attention
from sparse_attn.attention import attention_probabilities
from sparse_attn.quantization import as_table

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def backends(*names: str) -> list:
    """Test parameters (backend, device): Triton on the GPU, or in its interpreter without one; the C++ kernels on the
    CPU; PyTorch on both."""
    places = [(name, "cpu") for name in names if name != "triton" or not CUDA]
    places += [(name, "cuda") for name in names if name != "native"]
    no_gpu = pytest.mark.skipif(not CUDA, reason="no GPU")
    not_built = pytest.mark.skipif(not extension.available(), reason="the C++ extension is not built")
    marks = {"cuda": [no_gpu], "native": [not_built]}
    return [
        pytest.param(name, device, id=f"{name}-{device}", marks=[*marks.get(device, []), *marks.get(name, [])])
        for name, device in places
    ]


def random_layout(
    heads: int, query_len: int, sparsity: float, device: str, granularity: str = "element", seed: int = 0
):
    """A random layout; some rows may keep nothing, since the diagonal is not kept."""
    mask = GlobalMask.random(
        1, heads, query_len, sparsity=sparsity, granularity=granularity, keep_diagonal=False, seed=seed
    )
    return mask.layout(0, device)


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key and value with the strides that transformers passes: heads beside tokens in memory."""
    if len(shape) == 3:
        return [torch.randn(shape).to(device, dtype) for _ in range(3)]
    batch, heads, length, head_dim = shape
    return [torch.randn(batch, length, heads, head_dim).transpose(1, 2).to(device, dtype) for _ in range(3)]


def assert_within_budget(
    result: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: SparseLayout, bits=None, **arguments
) -> None:
    """Compares a padded result with the reference in float64.

    It may be off by twice the error of a plain product of the exact probabilities, rounded to the inputs' dtype, with
    the values, plus a few units of float32 for the scores. With bits, a probability next to the edge of a bin may fall
    on either side of it, so such entries may be off by one level.
    """
    exact = [tensor.double() for tensor in (query, key, value)]
    output, used = attention_probabilities(*exact, layout, bits=bits, **arguments)
    plain = (used.to(query.dtype).double() @ exact[2]).to(query.dtype)
    allowed = 2 * (plain.double() - output).abs().max() + 1e-5 * exact[2].abs().max()
    if bits is not None:
        _, softmax = attention_probabilities(*exact, layout, **arguments)
        allowed = allowed + _edge_gaps(softmax, as_table(bits)) @ exact[2].abs()
    assert torch.isfinite(result).all(), "the result is not finite"
    error = (result.double() - output).abs()
    assert (error <= allowed).all(), f"error {error.max().item():.3e}, allowed {allowed.max().item():.3e}"


def gradients(tensors, layout, grad_output, backend, **arguments) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; with dropout, always the same one."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    torch.manual_seed(3)
    output = sparse_attention(*leaves, layout, backend=backend, **arguments)
    return torch.autograd.grad(output, leaves, grad_output)


def _edge_gaps(softmax: Tensor, table: QuantizationTable, tolerance: float = 1e-3) -> Tensor:
    """The distance between the two levels beside an edge for probabilities at that edge, 0 elsewhere."""
    position = (torch.log2(softmax) - math.log2(table.threshold)) / table.step
    edge = position.round().clamp(0, len(table.levels) - 2)
    levels = torch.tensor(table.levels, dtype=softmax.dtype, device=softmax.device)
    gaps = levels[edge.long() + 1] - levels[edge.long()]
    return torch.where((position - edge).abs() < tolerance, gaps, 0.0)
