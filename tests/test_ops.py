"""The operator: registration, gradients, tracing."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_attn import GlobalMask, SparseLayout, ops, sparse_attention
from sparse_attn.attention import attention_probabilities
from sparse_attn.ops import AttentionCall
from tests.helpers import DEVICE, backends, gradients, random_inputs, random_layout


def operator_arguments(backend, device, dtype=torch.float32, bits=None, packed=False):
    """Arguments of torch.ops.sparse_attn.attention for a small random call."""
    captured = []
    from sparse_attn import attention

    layout = random_layout(2, 12, 0.4, device)
    shape = (12, 2, 16) if packed else (2, 2, 12, 16)
    tensors = [t.requires_grad_() for t in random_inputs(shape, dtype, device)]
    original = attention.run

    def spy(call: AttentionCall, name: str, training: bool):
        captured.append((call, name))
        return original(call, name, training)

    attention.run = spy
    try:
        arguments = dict(cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32, device=device)) if packed else {}
        sparse_attention(*tensors, layout, bits=bits, backend=backend, **arguments)
    finally:
        attention.run = original
    call, name = captured[0]
    return *ops.operator_arguments(call), name


@pytest.mark.parametrize(("backend", "device"), backends("reference", "torch", "native", "triton"))
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, device, packed):
    dtype = torch.float64 if backend == "reference" else torch.float32
    arguments = operator_arguments(backend, device, dtype, packed=packed)
    torch.library.opcheck(torch.ops.sparse_attn.attention.default, arguments)


class Names(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_who_wants_to_see_the_operator_does(monkeypatch):
    """Others do without torch's dispatcher, and get the same."""
    layout, tensors = random_layout(2, 12, 0.4, "cpu"), random_inputs((2, 2, 12, 16), torch.float32, "cpu")
    with torch.no_grad(), Names() as seen:
        watched = sparse_attention(*tensors, layout, bits=3)
    assert "sparse_attn.attention.default" in seen.names
    monkeypatch.setattr(ops, "_table", None)  # what the operator's levels become a table with
    assert torch.equal(sparse_attention(*tensors, layout, bits=3), watched)


@pytest.mark.parametrize("arguments", [{}, {"causal": True}, {"key_lengths": torch.tensor([7, 3])}])
def test_gradcheck_of_the_reference(arguments):
    layout = random_layout(2, 7, 0.5, "cpu")
    tensors = [t.requires_grad_() for t in random_inputs((2, 2, 7, 3), torch.float64, "cpu")]
    torch.autograd.gradcheck(
        lambda *t: sparse_attention(*t, layout, backend="reference", **arguments), tensors, fast_mode=False
    )


def test_gradcheck_packed():
    layout = random_layout(2, 9, 0.5, "cpu")
    tensors = [t.requires_grad_() for t in random_inputs((10, 2, 4), torch.float64, "cpu")]
    cu_seqlens = torch.tensor([0, 7, 10], dtype=torch.int32)
    torch.autograd.gradcheck(
        lambda *t: sparse_attention(*t, layout, cu_seqlens=cu_seqlens, backend="reference"), tensors
    )


def test_gradgradcheck_of_the_reference():
    layout = random_layout(2, 7, 0.5, "cpu")
    tensors = [t.requires_grad_() for t in random_inputs((1, 2, 7, 3), torch.float64, "cpu")]
    torch.autograd.gradgradcheck(lambda *t: sparse_attention(*t, layout, backend="reference"), tensors)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_of_second_order_are_refused(backend, device, wanted):
    """Never taken for zero; gradients of first order come as ever, also where they are kept to be differentiated."""
    layout = random_layout(2, 12, 0.4, device)
    tensors = random_inputs((2, 2, 12, 16), torch.float32, device)
    wanted = tensors[wanted].requires_grad_()
    loss = sparse_attention(*tensors, layout, backend=backend).square().sum()
    (first,) = torch.autograd.grad(loss, wanted, create_graph=True)
    (again,) = torch.autograd.grad(sparse_attention(*tensors, layout, backend=backend).square().sum(), wanted)
    assert torch.equal(first, again)
    with pytest.raises(NotImplementedError, match=f"{backend}.*second order"):
        torch.autograd.grad(first.square().sum(), wanted)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch", "reference"))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_mode_gradients_are_refused(backend, device, which):
    layout = random_layout(2, 12, 0.4, device)
    tensors = random_inputs((2, 2, 12, 16), torch.float32, device)
    with forward_ad.dual_level():
        sparse_attention(*tensors, layout, backend=backend)  # nobody asks for one
        tensors[which] = forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            sparse_attention(*tensors, layout, backend=backend)
        output, _ = attention_probabilities(*tensors, layout)
        assert forward_ad.unpack_dual(output).tangent is not None


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("arguments", [{}, {"bits": 3}, {"dropout": 0.4}, {"bits": 2, "dropout": 0.2, "causal": True}])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_agree_with_the_reference(backend, device, arguments, packed):
    layout = random_layout(2, 30, 0.6, device)
    tensors = random_inputs((30, 2, 16) if packed else (2, 2, 30, 16), torch.float32, device)
    grad_output = torch.randn_like(tensors[0])
    more = dict(arguments)
    if packed:
        more["cu_seqlens"] = torch.tensor([0, 11, 30], dtype=torch.int32, device=device)
    else:
        more["key_lengths"] = more["query_lengths"] = torch.tensor([30, 13], device=device)
    ours = gradients(tensors, layout, grad_output, backend, **more)
    theirs = gradients(tensors, layout, grad_output, "reference", **more)
    for own, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 40])
def test_gradients_within_budget(backend, device, head_dim, dtype):
    """A gradient's error against float64 is at most that of products whose factors are rounded to the dtype."""
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    layout = random_layout(2, 70, 0.7, device)
    tensors = random_inputs((1, 2, 66, head_dim), dtype, device)
    grad_output = torch.randn(1, 66, 2, head_dim).transpose(1, 2).to(device, dtype)
    arguments = dict(causal=True, key_padding_mask=torch.rand(1, 66, device=device) < 0.8)
    ours = gradients(tensors, layout, grad_output, backend, **arguments)
    exact = gradients([t.double() for t in tensors], layout, grad_output.double(), "reference", **arguments)
    for own, true in zip(ours, exact, strict=True):
        assert own.dtype == dtype
        assert (own.double() - true).norm() <= 8 * torch.finfo(dtype).eps * true.norm() + 1e-5


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("length", [1, 15, 17, 63, 129])
def test_gradients_at_odd_lengths_are_complete_and_repeatable(backend, device, length, poisoned):
    layout = random_layout(2, length + 3, 0.8, device)
    tensors = random_inputs((2, 2, length, 32), torch.float32, device)
    grad_output = torch.randn_like(tensors[0])
    lengths = torch.tensor([length, length // 2], device=device)
    more = dict(key_lengths=lengths, query_lengths=lengths, dropout=0.2)
    first = gradients(tensors, layout, grad_output, backend, **more)
    again = gradients(tensors, layout, grad_output, backend, **more)
    exact = gradients(tensors, layout, grad_output, "reference", **more)
    for own, same, true in zip(first, again, exact, strict=True):
        assert torch.equal(own, same)
        torch.testing.assert_close(own, true, atol=2e-5, rtol=1e-4)
        assert (own[1, :, length // 2 :] == 0).all()


def test_training_needs_no_memory_for_pairs_of_positions():
    """The kernels allocate outputs, gradients and two numbers a row; nothing that grows with length squared."""
    length, activity = 384, torch.profiler.ProfilerActivity
    layout = random_layout(1, length, 0.99, DEVICE)
    tensors = random_inputs((1, 1, length, 16), torch.float32, DEVICE)
    gradients(tensors, layout, tensors[0], "triton")
    with torch.profiler.profile(activities=[activity.CPU], profile_memory=True) as profile:
        gradients(tensors, layout, tensors[0], "triton", bits=3, dropout=0.1)
    largest = max(max(event.cpu_memory_usage, event.device_memory_usage) for event in profile.events())
    one_tensor = tensors[0].numel() * 4
    assert one_tensor <= largest <= 5 * one_tensor < length**2


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
def test_gradients_with_an_offset_and_more_keys(backend, device):
    layout = random_layout(2, 48, 0.5, device)
    query, key, value = random_inputs((2, 2, 40, 32), torch.float32, device)
    tensors = [query[:, :, 13:], key, value]
    grad_output = torch.randn_like(tensors[0])
    more = dict(causal=True, query_offset=13)
    ours = gradients(tensors, layout, grad_output, backend, **more)
    exact = gradients(tensors, layout, grad_output, "reference", **more)
    for own, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(own, true, atol=2e-5, rtol=1e-4)


def test_rounding_is_straight_through():
    """The operator's gradient with bits is that of the differentiable formula with straight-through rounding."""
    layout = random_layout(2, 20, 0.5, "cpu")
    tensors = [t.requires_grad_() for t in random_inputs((1, 2, 20, 8), torch.float64, "cpu")]
    grad_output = torch.randn(1, 2, 20, 8, dtype=torch.float64)
    output, _ = attention_probabilities(*tensors, layout, bits=3)
    formula = torch.autograd.grad(output, tensors, grad_output)
    operator = gradients(tensors, layout, grad_output, "reference", bits=3)
    for own, other in zip(operator, formula, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch", "reference"))
def test_compiles_without_breaks_for_any_length(backend, device):
    mask = GlobalMask.random(1, 2, 32, sparsity=0.5)
    layout = mask.layout(0, device)
    compiled = torch.compile(
        lambda q, k, v: sparse_attention(q, k, v, layout, bits=3, backend=backend),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    for length in (9, 17, 32, 20):
        tensors = [t.requires_grad_() for t in random_inputs((2, 2, length, 16), torch.float32, device)]
        eager = sparse_attention(*tensors, layout, bits=3, backend=backend)
        torch.testing.assert_close(compiled(*tensors), eager)
        compiled(*tensors).sum().backward()
    assert graphs["unique_graphs"] == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_layout_is_prepared_before_it_is_traced(fullgraph):
    """Or its call is not traced."""
    layout, tensors = random_layout(2, 16, 0.5, "cpu"), random_inputs((1, 2, 16, 8), torch.float32, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: sparse_attention(*t, layout), fullgraph=fullgraph, backend="aot_eager")
    if fullgraph:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="call sparse_attention once before, or.*prepare"):
            compiled(*tensors)
        sparse_attention(*tensors, layout)
    own = compiled(*tensors)
    assert torch.equal(own, sparse_attention(*tensors, layout))


@pytest.mark.parametrize(("backend", "device"), backends("reference", "torch", "native", "triton"))
def test_output_strides_fit_transformers(backend, device):
    """[batch, tokens, heads * head_dim] is a view of the output, on every backend and in the fake."""
    layout = random_layout(2, 16, 0.5, device)
    output = sparse_attention(*random_inputs((2, 2, 16, 8), torch.float32, device), layout, backend=backend)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("backend", "device"), backends("reference", "torch", "native"))
def test_a_layout_that_an_export_met_first_serves_other_calls(backend, device):
    layout, tensors = random_layout(2, 16, 0.5, device), random_inputs((1, 2, 16, 8), torch.float32, device)
    expected = sparse_attention(*tensors, SparseLayout(layout.keep()), backend=backend)

    class Attention(torch.nn.Module):
        def forward(self, *tensors):
            return sparse_attention(*tensors, layout, backend=backend)

    exported = torch.export.export(Attention(), tuple(tensors)).module()
    torch.testing.assert_close(exported(*tensors), expected)
    torch.testing.assert_close(sparse_attention(*tensors, layout, backend=backend), expected)


@pytest.mark.parametrize(("backend", "device"), backends("reference", "torch", "native", "triton"))
def test_autocast_lowers_no_precision(backend, device):
    layout, tensors = random_layout(2, 16, 0.5, device), random_inputs((1, 2, 16, 8), torch.float32, device)

    def computed() -> list[torch.Tensor]:
        output, lse = sparse_attention(*tensors, layout, bits=8, return_lse=True, backend=backend)
        grads = gradients(tensors, layout, tensors[0], backend, bits=8)
        return [output, lse, *grads, *attention_probabilities(*tensors, layout, bits=8)]

    expected = computed()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        inside = computed()
    assert all(torch.equal(own, true) for own, true in zip(inside, expected, strict=True))
