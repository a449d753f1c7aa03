"""The CUDA kernel of the forward pass against the reference: emulated everywhere, and on a GPU where there is one."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_attn import QuantizationTable, SparseLayout, sparse_attention
from sparse_attn.backends import native_cuda
from sparse_attn.backends.tickets import NONE
from sparse_attn.kernels.configuration import BlockConfig
from tests.cuda.random_calls import HALVES, MANY_ROUNDS, draw_call, many_rounds
from tests.helpers import assert_within_budget, random_inputs, random_layout

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.xdist_group("cuda")]


def check(layout, tensors, **arguments):
    """Computes and compares."""
    result, lse = sparse_attention(*tensors, layout, backend="native", return_lse=True, **arguments)
    assert result.dtype == tensors[0].dtype
    assert_within_budget(result, *tensors, layout, **arguments)
    doubles = [tensor.double() for tensor in tensors]
    _, exact = sparse_attention(*doubles, layout, backend="reference", return_lse=True, **arguments)
    torch.testing.assert_close(lse.double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [None, 3, 5])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 129, 200])
def test_lengths(device, length, bits, dtype):
    layout = random_layout(2, max(length, 20), 0.8, device)
    lengths = torch.tensor([length, (length + 1) // 2, 0], device=device)
    tensors = random_inputs((3, 2, length, 64), dtype, device)
    check(layout, tensors, bits=bits, key_lengths=lengths, query_lengths=lengths)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("granularity", ["element", "tile"])
@pytest.mark.parametrize("bits", [None, 1, 4, 8, QuantizationTable(1e-2, (0.0, 0.03, 0.2, 0.7))])
def test_bits_and_granularities(device, granularity, bits, head_dim, dtype):
    layout = random_layout(2, 96, 0.7, device, granularity)
    check(layout, random_inputs((2, 2, 90, head_dim), dtype, device), bits=bits)


@pytest.mark.parametrize("bits", [None, 3, 6])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_short_and_long_lists(device, bits, sparsity):
    """Lists of up to 128 keys stay in registers, longer ones come in segments."""
    keep = torch.rand(3, 300, 300) >= sparsity
    keep[0, 64:80] = False
    keep[1, :, 40:] = False
    layout = SparseLayout(keep.to(device))
    check(layout, random_inputs((1, 3, 290, 64), torch.float16, device), bits=bits)


@pytest.mark.parametrize("bits", [None, 3])
def test_packed(device, bits):
    lengths = (63, 0, 129, 16, 1)
    layout = random_layout(2, 200, 0.8, device)
    query, key, value = random_inputs((sum(lengths), 2, 64), torch.float16, device)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    result, lse = sparse_attention(
        query, key, value, layout, bits=bits, cu_seqlens=cu_seqlens, return_lse=True, backend="native"
    )
    for start, length in zip(cu_seqlens.tolist(), lengths):
        parts = [tensor[start : start + length].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
        if length:
            own = result[start : start + length].transpose(0, 1).unsqueeze(0)
            assert_within_budget(own, *parts, layout, bits=bits)
            exact = sparse_attention(*parts, layout, return_lse=True, backend="reference")[1][0]
            torch.testing.assert_close(lse[:, start : start + length], exact, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("granularity", ["element", "tile"])
def test_causal_and_scattered_padding(device, bits, granularity):
    tensors = random_inputs((2, 2, 75, 32), torch.float16, device)
    layout = random_layout(2, 80, 0.5, device, granularity)
    padding = torch.rand(2, 75, device=device) < 0.7
    lengths = torch.tensor([75, 41], device=device)
    for arguments in (
        dict(causal=True),
        dict(key_padding_mask=padding),
        dict(causal=True, key_padding_mask=padding, key_lengths=lengths),
        dict(scale=0.3, key_lengths=lengths),
    ):
        check(layout, tensors, bits=bits, **arguments)


def test_what_padding_holds_does_not_matter(device):
    query, key, value = random_inputs((2, 2, 60, 64), torch.float16, device)
    layout = random_layout(2, 64, 0.6, device)
    lengths = torch.tensor([60, 23], device=device)
    hole = torch.rand(2, 60, device=device) < 0.8
    for arguments in (dict(key_lengths=lengths, query_lengths=lengths), dict(key_padding_mask=hole)):
        dirty = [query.clone(), key.clone(), value.clone()]
        real = torch.arange(60, device=device) < lengths[:, None] if "key_lengths" in arguments else hole
        for tensor in dirty[1:]:
            tensor[~real[:, None].expand(2, 2, 60)] = float("nan")
        clean = sparse_attention(query, key, value, layout, bits=3, backend="native", **arguments)
        assert torch.equal(sparse_attention(*dirty, layout, bits=3, backend="native", **arguments), clean)


@pytest.mark.parametrize(("length", "heads", "rounds"), MANY_ROUNDS)
def test_many_rounds(device, length, heads, rounds):
    layout = random_layout(heads, length, 0.8, device)
    tensors, lengths = many_rounds(device, length, heads, rounds)
    check(layout, tensors, key_lengths=lengths, query_lengths=lengths)
    check(layout, tensors, bits=3)


@pytest.mark.parametrize(("warps", "parts"), [(1, 1), (4, 2), (12, 1), (3, 5)])
def test_every_way_to_cut_a_head_computes_the_same(device, warps, parts, monkeypatch):
    tensors = random_inputs((2, 2, 130, 64), torch.float16, device)
    keep = random_layout(2, 144, 0.8, "cpu").keep()
    lengths = torch.tensor([130, 50], device=device)
    arguments = dict(bits=3, key_lengths=lengths, query_lengths=lengths)
    usual = sparse_attention(*tensors, SparseLayout(keep.to(device)), backend="native", **arguments)
    monkeypatch.setattr(native_cuda, "choice", lambda *_: BlockConfig(warps, parts))
    layout = SparseLayout(keep.to(device))
    assert torch.equal(sparse_attention(*tensors, layout, backend="native", **arguments), usual)
    few = [tensor[:, :, :40].contiguous() for tensor in tensors]  # three groups: some parts have none
    check(layout, [tensor.repeat(5, 1, 1, 1) for tensor in few])


@pytest.mark.parametrize("uneven", [False, True])
def test_with_and_without_a_ticket_it_computes_the_same(device, uneven, monkeypatch):
    """More heads of sequences than blocks have slots for, of lengths that differ or not."""
    layout = random_layout(3, 48, 0.7, device)
    tensors = random_inputs((9, 3, 40, 32), torch.float16, device)
    lengths = torch.tensor([40, 3, 17, 0, 40, 31, 16, 8, 25], device=device)
    arguments = dict(key_lengths=lengths, query_lengths=lengths) if uneven else {}
    check(layout, tensors, **arguments)
    shared = sparse_attention(*tensors, layout, backend="native", **arguments)
    numbers = set()

    def ticket_of(tickets, stream):
        assert not tickets.any()  # as every call before has left them
        numbers.add(own(tickets, stream))
        return NONE

    own = native_cuda.ticket_of
    monkeypatch.setattr(native_cuda, "ticket_of", ticket_of)
    assert torch.equal(sparse_attention(*tensors, layout, backend="native", **arguments), shared)
    assert numbers == {0}


@pytest.mark.parametrize("sequences", [2, 256, 257])
def test_many_sequences(device, sequences):
    """Up to 256 are taken in the order of their lengths."""
    layout = random_layout(1, 8, 0.5, device)
    lengths = torch.arange(sequences, device=device) * 7 % 9
    tensors = random_inputs((sequences, 1, 8, 32), torch.float16, device)
    check(layout, tensors, key_lengths=lengths, query_lengths=lengths)


def test_masks_and_shapes_of_other_sizes(device):
    """More keys than queries; a mask beyond what fits into shared memory, for inputs that do; nothing at all."""
    query, key, value = random_inputs((1, 2, 80, 64), torch.float16, device)
    for layout in (random_layout(2, 600, 0.8, device), SparseLayout(torch.zeros(2, 96, 96, dtype=bool, device=device))):
        check(layout, (query[:, :, :33], key, value))
    layout = random_layout(2, 96, 0.8, device)
    for batch, length in ((0, 5), (2, 0)):
        empty = random_inputs((batch, 2, length, 64), torch.float16, device)
        assert sparse_attention(*empty, layout, backend="native").shape == (batch, 2, length, 64)


def test_strides_and_what_is_not_finite(device):
    layout = random_layout(2, 40, 0.5, device)
    whole = torch.randn(2, 40, 3, 2, 64).to(device, torch.float16)
    query, key, value = (whole[:, :, i].transpose(1, 2) for i in range(3))
    check(layout, (query, key, value), bits=3)
    assert torch.equal(
        sparse_attention(query, key, value, layout, backend="native"),
        sparse_attention(*(t.contiguous() for t in (query, key, value)), layout, backend="native"),
    )
    query = query.clone()
    query[0, 0, 3] = float("nan")
    for bits in (None, 3):
        result = sparse_attention(query, key, value, layout, bits=bits, backend="native")
        assert result[0, 0, 3].isnan().all() and result[1].isfinite().all() and result[0, 0, 16:].isfinite().all()


def test_refusals(device):
    tensors = random_inputs((1, 2, 40, 64), torch.float16, device)
    layout = random_layout(2, 640, 0.5, device)
    long = random_inputs((1, 2, 520, 64), torch.float16, device)
    leaf = tensors[0].clone().requires_grad_()
    odd = [torch.randn(1, 2, 40, 68).to(device, torch.float16)[..., 1:65] for _ in range(3)]
    for inputs, arguments, reason in (
        ([t.float() for t in tensors], {}, "float32; the kernel takes float16 and bfloat16"),
        ([t[..., :40] for t in tensors], {}, r"head_dim 40 is none of \(32, 64\)"),
        (long, {}, "a sequence of 520 is longer than 512"),
        (tensors, dict(dropout=0.1), "neither dropout nor a query_offset"),
        (tensors, dict(query_offset=3), "neither dropout nor a query_offset"),
        (tensors, dict(scale=-1.0), "the scale -1.0 is not positive"),
        ([leaf, *tensors[1:]], dict(bits=3), "the backward pass has neither rounding nor causality"),
        (odd, {}, "rows of the query are not multiples of 16 bytes apart"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            sparse_attention(*inputs, layout, backend="native", **arguments)


def test_memory_that_starts_anywhere(device):
    """Rows are read in pieces of 16 bytes: those that start elsewhere are copied before."""
    layout = random_layout(2, 40, 0.5, device)
    tensors = [torch.randn(1, 2, 40, 72).to(device, torch.float16)[..., 1:65] for _ in range(3)]
    assert all(tensor.data_ptr() % 16 for tensor in tensors)
    check(layout, tensors, bits=3)


@pytest.mark.parametrize("bits", [None, 3, QuantizationTable(1e-2, (0.0, 0.03, 0.2, 0.7))])
def test_compiles_once_for_all_lengths(device, bits):
    layout = random_layout(2, 64, 0.5, device)

    def attend(query, key, value):
        return sparse_attention(query, key, value, layout, bits=bits, backend="native")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for length in (9, 17, 32, 20):
        tensors = random_inputs((2, 2, length, 64), torch.float16, device)
        expected = attend(*tensors)  # compiles the layout the first time
        assert torch.equal(compiled(*tensors), expected)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_calls(device, data):
    draw = data.draw
    layout, tensors, arguments = draw_call(draw, device)
    bits, causal = draw(st.sampled_from([None, 1, 2, 3, 4, 8])), draw(st.booleans())
    check(layout, tensors, bits=bits, causal=causal, **arguments)
