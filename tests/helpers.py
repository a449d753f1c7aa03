"""What tests share: where a backend can run, random inputs, how wrong a result may be, and a model's weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.error_budget import output_budget
from sparse_attn import GlobalMask, SparseLayout, extension, sparse_attention

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
    """Compares a padded result with the reference in float64; `output_budget` says how far it may be off."""
    output, allowed = output_budget(query, key, value, layout, bits=bits, **arguments)
    assert torch.isfinite(result).all(), "the result is not finite"
    error = (result.double() - output).abs()
    assert (error <= allowed).all(), f"error {error.max().item():.3e}, allowed {allowed.max().item():.3e}"


def gradients(tensors, layout, grad_output, backend, **arguments) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; with dropout, always the same one."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    torch.manual_seed(3)
    output = sparse_attention(*leaves, layout, backend=backend, **arguments)
    return torch.autograd.grad(output, leaves, grad_output)


def weights(model: torch.nn.Module) -> Tensor:
    """All parameters, side by side."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
