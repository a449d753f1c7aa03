"""The CUDA kernels of the backward pass against the reference: emulated everywhere, and on a GPU where there is one."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.error_budget import gradient_budget
from sparse_attn import SparseLayout, sparse_attention
from sparse_attn.attention import prepare
from sparse_attn.backends import native_cuda
from sparse_attn.backends.tickets import NONE
from sparse_attn.kernels.configuration import BlockConfig
from tests.cuda.random_calls import HALVES, MANY_ROUNDS, draw_call, many_rounds
from tests.helpers import gradients, random_inputs, random_layout

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.xdist_group("cuda")]
NAMES = ("query", "key", "value")


def real_rows(grad_output, lengths):
    """The gradient that counts: rows of padding have none to pass on."""
    if lengths is None:
        return grad_output
    rows = torch.arange(grad_output.shape[2], device=grad_output.device)
    return grad_output * (rows < lengths[:, None])[:, None, :, None]


def check(layout, tensors, grad_output=None, scale=None, **arguments):
    """Computes and compares."""
    if grad_output is None:
        grad_output = torch.randn(tensors[0].shape, device=tensors[0].device).to(tensors[0].dtype)
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    arguments["scale"] = scale
    ours = gradients(tensors, layout, grad_output, "native", **arguments)
    doubles = [tensor.double() for tensor in tensors]
    exact = gradients(doubles, layout, grad_output.double(), "reference", **arguments)
    real = real_rows(grad_output, arguments.get("query_lengths"))
    budget = gradient_budget(*tensors, real, layout, **arguments)
    for name, own, true in zip(NAMES, ours, exact, strict=True):
        assert own.dtype == tensors[0].dtype and torch.isfinite(own).all(), name
        error = torch.linalg.vector_norm(own.double() - true, dim=(-2, -1))
        assert (error <= getattr(budget, name) + 1e-12).all(), f"{name}: {error} of {getattr(budget, name)}"


@pytest.mark.parametrize(("length", "dtype"), list(zip([1, 15, 17, 63, 129, 200], 3 * HALVES)))
def test_lengths(device, length, dtype):
    layout = random_layout(2, max(length, 20), 0.8, device)
    lengths = torch.tensor([length, (length + 1) // 2, 0], device=device)
    tensors = random_inputs((3, 2, length, 64), dtype, device)
    check(layout, tensors, key_lengths=lengths, query_lengths=lengths)


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("granularity", ["element", "tile"])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.97])
def test_masks_and_head_dims(device, sparsity, granularity, head_dim):
    layout = random_layout(3, 96, sparsity, device, granularity)
    check(layout, random_inputs((1, 3, 90, head_dim), torch.float16, device), scale=0.2)


def test_packed(device):
    lengths = (63, 0, 129, 16, 1)
    layout = random_layout(2, 200, 0.8, device)
    tensors = random_inputs((sum(lengths), 2, 64), torch.float16, device)
    grad_output = torch.randn_like(tensors[0])
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    ours = gradients(tensors, layout, grad_output, "native", cu_seqlens=cu_seqlens)
    for start, length in zip(cu_seqlens.tolist(), lengths):
        parts = [t[start : start + length].transpose(0, 1).unsqueeze(0) for t in (*tensors, grad_output)]
        if length == 0:
            continue
        alone = gradients(parts[:3], layout, parts[3], "native")
        check(layout, parts[:3], parts[3])
        for own, true in zip(ours, alone, strict=True):
            assert torch.equal(own[start : start + length].transpose(0, 1).unsqueeze(0), true)


def test_one_query_whose_gradient_has_odd_strides(device):
    """torch calls it contiguous, since a dimension of size 1 may have any stride."""
    grad_output = torch.randn(128).to(device).half().as_strided((1, 2, 1, 32), (64, 32, 5, 1))
    check(random_layout(2, 1, 0.0, device), random_inputs((1, 2, 1, 32), torch.float16, device), grad_output)


def test_what_is_prepared_in_inference_mode_serves_training(device):
    with torch.inference_mode():
        layout = random_layout(2, 40, 0.3, device)
        prepare(layout, 32, torch.float16, "native")
    check(layout, random_inputs((1, 2, 40, 32), torch.float16, device))


def test_rows_and_columns_without_anything(device):
    keep = torch.rand(3, 100, 100) > 0.8
    keep[0, 16:48] = False
    keep[1, :, 30:90] = False
    keep[2] = False
    check(SparseLayout(keep.to(device)), random_inputs((1, 3, 96, 64), torch.float16, device))


def test_what_padding_holds_does_not_matter(device):
    tensors = [*random_inputs((2, 2, 60, 64), torch.float16, device), torch.randn(2, 2, 60, 64).to(device).half()]
    layout = random_layout(2, 64, 0.6, device)
    lengths = torch.tensor([60, 23], device=device)
    at_end = torch.arange(60, device=device) >= lengths[:, None]
    holes = torch.rand(2, 60, device=device) < 0.3
    for padding, arguments, of_keys_alone in (
        (at_end, dict(key_lengths=lengths, query_lengths=lengths), False),
        (holes, dict(key_padding_mask=~holes), True),
    ):
        padding = padding[:, None].expand(2, 2, 60)
        dirty = [tensor.clone() for tensor in tensors]
        for tensor in dirty[1:3] if of_keys_alone else dirty:
            tensor[padding] = float("nan")
        clean = gradients(tensors[:3], layout, tensors[3], "native", **arguments)
        found = gradients(dirty[:3], layout, dirty[3], "native", **arguments)
        for name, own, true in zip(NAMES, found, clean, strict=True):
            assert torch.equal(own, true)
            assert (own[padding] == 0).all() or (of_keys_alone and name == "query")


def test_other_shapes_and_strides(device):
    """More keys than queries, rows of heads beside each other, gradients that are broadcast; nothing at all."""
    layout = random_layout(2, 80, 0.5, device)
    whole = torch.randn(2, 80, 3, 2, 64).to(device, torch.float16)
    query, key, value = (whole[:, :, i].transpose(1, 2) for i in range(3))
    check(layout, (query[:, :, :33], key, value))
    check(layout, (query, key, value), torch.randn(2, 80, 2, 64).to(device, torch.float16).transpose(1, 2))
    check(layout, (query, key, value), torch.ones(1, 1, 1, 1, device=device).half().expand(2, 2, 80, 64))
    for batch, length in ((0, 5), (2, 0)):
        empty = random_inputs((batch, 2, length, 64), torch.float16, device)
        assert all(one.shape == (batch, 2, length, 64) for one in gradients(empty, layout, empty[0], "native"))


@pytest.mark.parametrize(("length", "heads", "rounds"), MANY_ROUNDS)
def test_many_rounds(device, length, heads, rounds):
    tensors, lengths = many_rounds(device, length, heads, rounds)
    check(random_layout(heads, length, 0.8, device), tensors, key_lengths=lengths, query_lengths=lengths)


@pytest.mark.parametrize(("warps", "parts"), [(1, 1), (4, 2), (8, 1), (3, 5)])
def test_every_way_to_cut_a_head_computes_the_same(device, warps, parts, monkeypatch):
    tensors = random_inputs((2, 2, 130, 64), torch.float16, device)
    keep = random_layout(2, 144, 0.8, "cpu").keep().to(device)
    usual = gradients(tensors, SparseLayout(keep), tensors[0], "native")
    monkeypatch.setattr(native_cuda, "choice", lambda *_: BlockConfig(warps, parts))
    monkeypatch.setattr(native_cuda, "ticket_of", lambda *_: NONE)
    own = gradients(tensors, SparseLayout(keep), tensors[0], "native")
    assert all(torch.equal(one, other) for one, other in zip(own, usual, strict=True))


def test_refusals(device):
    tensors = [tensor.requires_grad_() for tensor in random_inputs((1, 2, 40, 64), torch.float16, device)]
    layout = random_layout(2, 48, 0.5, device)
    with pytest.raises(RuntimeError, match="the backward pass has neither rounding nor causality"):
        sparse_attention(*tensors, layout, backend="native", causal=True)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_calls(device, data):
    layout, tensors, arguments = draw_call(data.draw, device)
    check(layout, tensors, **arguments)
