"""`sparse_attention`: what it means, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn import GlobalMask, QuantizationTable, attention, log_table, quantize, sparse_attention
from sparse_attn.attention import attention_probabilities, prepare
from tests.helpers import CUDA, assert_within_budget, backends, gradients, random_inputs, random_layout

LONG = 384 if CUDA else 200  # the interpreter takes seconds for hundreds
LENGTHS = (1, 15, 16, 17, 63, 129, LONG)
pytestmark = pytest.mark.usefixtures("poisoned")


def naive_masked_softmax(query, key, value, kept, scale, table=None):
    """Attention written out row by row, in float64."""
    output = torch.zeros_like(query)
    for batch, head, row in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        keys = kept[batch, head, row].nonzero()[:, 0]
        if len(keys) == 0:
            continue
        p = torch.softmax(key[batch, head, keys] @ query[batch, head, row] * scale, dim=0)
        p = p if table is None else quantize(p, table)
        output[batch, head, row] = p @ value[batch, head, keys]
    return output


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_a_masked_softmax(bits, causal):
    query, key, value = random_inputs((2, 3, 19, 8), torch.float64, "cpu")
    layout = random_layout(3, 25, 0.7, "cpu")
    lengths = torch.tensor([19, 11])
    kept = layout.keep()[None, :, :19, :19] & (torch.arange(19) < lengths.view(-1, 1, 1, 1))
    kept = kept & (torch.arange(19).view(-1, 1) < lengths.view(-1, 1, 1, 1))
    kept = kept.tril() if causal else kept
    result = sparse_attention(
        query, key, value, layout, bits=bits, causal=causal, key_lengths=lengths, query_lengths=lengths,
        backend="reference",
    )  # fmt: skip
    naive = naive_masked_softmax(query, key, value, kept, 8**-0.5, log_table(bits) if bits else None)
    torch.testing.assert_close(result, naive, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_padded_lengths(backend, device, length, bits):
    query, key, value = random_inputs((2, 2, length, 32), torch.float32, device)
    layout = random_layout(2, max(length, 20), 0.8, device)
    lengths = torch.tensor([length, (length + 1) // 2], device=device)
    arguments = dict(bits=bits, key_lengths=lengths, query_lengths=lengths)
    result = sparse_attention(query, key, value, layout, backend=backend, **arguments)
    assert_within_budget(result, query, key, value, layout, **arguments)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("lengths", [(1,), (15, 16, 17), (63, 0, 129), (LONG, 1)])
def test_packed_lengths(backend, device, lengths, bits):
    layout = random_layout(2, 384, 0.8, device)
    query, key, value = random_inputs((sum(lengths), 2, 32), torch.float32, device)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).to(torch.int32)
    result, lse = sparse_attention(
        query, key, value, layout, bits=bits, cu_seqlens=cu_seqlens, return_lse=True, backend=backend
    )
    start = 0
    for length in lengths:
        parts = [t[start : start + length].transpose(0, 1).unsqueeze(0) for t in (query, key, value)]
        own = result[start : start + length].transpose(0, 1).unsqueeze(0)
        if length:
            assert_within_budget(own, *parts, layout, bits=bits)
            _, own_lse = sparse_attention(*parts, layout, return_lse=True, backend="reference")
            torch.testing.assert_close(lse[:, start : start + length], own_lse[0], atol=1e-5, rtol=1e-5)
        start += length


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 40])
def test_head_dims_and_dtypes(backend, device, head_dim, dtype):
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    query, key, value = random_inputs((1, 2, 70, head_dim), dtype, device)
    layout = random_layout(2, 80, 0.7, device)
    for bits in (None, 3):
        result = sparse_attention(query, key, value, layout, bits=bits, backend=backend)
        assert result.dtype == dtype
        assert_within_budget(result, query, key, value, layout, bits=bits)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("granularity", ["element", "tile"])
@pytest.mark.parametrize("bits", [1, 4, 8, QuantizationTable(1e-2, (0.0, 0.03, 0.2, 0.7))])
def test_bits_and_granularities(backend, device, granularity, bits):
    query, key, value = random_inputs((2, 2, 90, 32), torch.float32, device)
    layout = random_layout(2, 96, 0.8, device, granularity)
    assert layout.lists(16).full == (granularity == "tile")
    result = sparse_attention(query, key, value, layout, bits=bits, backend=backend)
    assert_within_budget(result, query, key, value, layout, bits=bits)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@pytest.mark.parametrize("bits", [None, 3])
def test_causal_offset_and_scattered_padding(backend, device, bits):
    query, key, value = random_inputs((2, 2, 40, 32), torch.float32, device)
    layout = random_layout(2, 64, 0.5, device)
    padding = torch.rand(2, 40, device=device) < 0.7
    for arguments in (
        dict(causal=True),
        dict(key_padding_mask=padding),
        dict(key_padding_mask=padding, causal=True, key_lengths=torch.tensor([40, 21], device=device)),
        dict(scale=0.3),
    ):
        result = sparse_attention(query, key, value, layout, bits=bits, backend=backend, **arguments)
        assert_within_budget(result, query, key, value, layout, bits=bits, **arguments)
    for offset in (1, 16, 23):
        rows = query[:, :, : 40 - offset]
        arguments = dict(causal=True, query_offset=offset)
        result = sparse_attention(rows, key, value, layout, bits=bits, backend=backend, **arguments)
        assert_within_budget(result, rows, key, value, layout, bits=bits, **arguments)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
def test_lengths_outside_the_tensors(backend, device):
    """A length beyond the tensors means all of them, one below zero none."""
    query, key, value = random_inputs((3, 2, 20, 32), torch.float32, device)
    layout = random_layout(2, 32, 0.5, device)
    real = torch.tensor([20, 0, 20], device=device)
    for lengths in ([25, -3, 20], [2**40, -(2**40), 2**31]):
        lengths = torch.tensor(lengths, device=device)
        arguments = dict(key_lengths=lengths, query_lengths=lengths)
        result = sparse_attention(query, key, value, layout, backend=backend, **arguments)
        assert_within_budget(result, query, key, value, layout, key_lengths=real, query_lengths=real)
        assert (result[1] == 0).all()


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
def test_strided_arguments(backend, device):
    """Inputs, padding masks and lengths may be slices of larger tensors."""
    query, key, value = (t[:, :, ::2, 16:48] for t in random_inputs((2, 2, 60, 64), torch.float32, device))
    layout = random_layout(2, 30, 0.5, device)
    padding = (torch.rand(2, 60, device=device) < 0.7)[:, ::2]
    lengths = torch.tensor([30, 0, 17, 0], device=device)[::2]
    arguments = dict(key_padding_mask=padding, key_lengths=lengths)
    result = sparse_attention(query, key, value, layout, backend=backend, **arguments)
    assert_within_budget(result, query, key, value, layout, **arguments)
    packed = [torch.randn(60, 4, 32, device=device)[::2, ::2] for _ in range(3)]
    bounds = torch.tensor([0, 9, 11, 9, 30, 9], dtype=torch.int32, device=device)[::2]
    ours, reference = (
        sparse_attention(*packed, layout, cu_seqlens=bounds, backend=name) for name in (backend, "reference")
    )
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("backend", "device"), backends("triton", "native"))
def test_strided_inputs_are_not_copied(backend, device, packed):
    """What transformers passes: query, key and value beside each other, heads beside tokens."""
    layout = random_layout(2, 32, 0.5, device)
    beside = torch.randn(2, 32, 3, 2, 32, device=device).unbind(2)
    tensors = [tensor.flatten(0, 1) if packed else tensor.transpose(1, 2) for tensor in beside]
    bounds = torch.tensor([0, 32, 64], dtype=torch.int32, device=device)
    arguments = dict(cu_seqlens=bounds, max_length=32) if packed else {}
    sparse_attention(*tensors, layout, backend=backend, **arguments)  # compiles the layout
    assert not any(tensor.is_contiguous() for tensor in tensors)
    with torch.profiler.profile() as profile:
        sparse_attention(*tensors, layout, backend=backend, **arguments)
    names = {event.name for event in profile.events()}
    assert names and not names & {"aten::clone", "aten::contiguous"}


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
def test_dropout_is_the_same_everywhere(backend, device):
    query, key, value = random_inputs((2, 2, 50, 32), torch.float32, device)
    layout = random_layout(2, 50, 0.5, device)
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(7)
        results.append(sparse_attention(query, key, value, layout, dropout=0.3, backend=name))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    torch.manual_seed(8)
    assert not torch.allclose(results[0], sparse_attention(query, key, value, layout, dropout=0.3, backend=backend))


def test_dropout_drops_the_share_it_says():
    query, key, value = random_inputs((4, 4, 128, 8), torch.float32, "cpu")
    layout = GlobalMask.from_function(lambda *position: torch.tensor(True), 1, 4, 128).layout(0)
    _, used = attention_probabilities(query, key, value, layout, dropout=0.3)
    _, dense = attention_probabilities(query, key, value, layout)
    assert (used == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    for axis in (0, 1, 2):  # no row, head or sequence shares its draws with another one
        assert not torch.equal((used == 0).select(axis, 0), (used == 0).select(axis, 1))
    kept = used != 0
    torch.testing.assert_close(used[kept], dense[kept] / 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch", "reference"))
def test_rows_without_keys_are_zero(backend, device, dtype):
    keep = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    keep[0, 0, 3] = False  # an empty row
    keep[0, 0, 5, :10] = False  # empty for sequences of length 10 and less
    layout = GlobalMask(keep).layout(0, device)
    query, key, value = random_inputs((4, 1, 20, 32), dtype, device)
    lengths = torch.tensor([20, 10, 0, -1], device=device)
    for bits in (None, 3):
        output, lse = sparse_attention(
            query, key, value, layout, bits=bits, key_lengths=lengths, return_lse=True, backend=backend
        )
        same = sparse_attention(query, key, value, layout, bits=bits, key_lengths=lengths, backend=backend)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(output, same, atol=tolerance, rtol=tolerance)
        empty = torch.zeros(4, 1, 20, dtype=torch.bool, device=device)
        empty[:, :, 3] = empty[1, :, 5] = empty[2:] = True
        assert (output[empty] == 0).all() and (lse[empty] == float("-inf")).all()
        assert torch.isfinite(lse[~empty]).all() and (output[~empty] != 0).any(-1).all()


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch", "reference"))
def test_padding_rows_are_zero_and_padding_keys_unseen(backend, device):
    query, key, value = random_inputs((2, 2, 33, 32), torch.float32, device)
    layout = random_layout(2, 40, 0.4, device)
    lengths = torch.tensor([33, 9], device=device)
    first = sparse_attention(query, key, value, layout, key_lengths=lengths, query_lengths=lengths, backend=backend)
    key[1, :, 9:], value[1, :, 9:] = 1e4, float("nan")
    second = sparse_attention(query, key, value, layout, key_lengths=lengths, query_lengths=lengths, backend=backend)
    if backend == "reference":  # it multiplies all values, unseen ones by zero
        value = value.nan_to_num()
        second = sparse_attention(
            query, key, value, layout, key_lengths=lengths, query_lengths=lengths, backend=backend
        )
    torch.testing.assert_close(first, second)
    assert (first[1, :, 9:] == 0).all()


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch", "reference"))
@pytest.mark.parametrize("bits", [None, 3, QuantizationTable(1e-2, (0.0, 0.03, 0.2, 0.7))])
@pytest.mark.parametrize("bad", [float("nan"), 1e38])
def test_what_is_not_finite_stays_visible(backend, device, bits, bad):
    """A key that holds NaN, or scores beyond float32, makes the rows that keep it NaN, as in dense attention."""
    query, key, value = random_inputs((1, 2, 40, 32), torch.float32, device)
    layout = random_layout(2, 40, 0.6, device)
    query = query.abs()
    finite = sparse_attention(query, key, value, layout, bits=bits, backend=backend)
    key[:, :, 7] = bad
    output, lse = sparse_attention(query, key, value, layout, bits=bits, return_lse=True, backend=backend)
    reaches = layout.keep()[None, :, :, 7]
    assert reaches.any() and output[reaches].isnan().all()
    assert not torch.isfinite(lse[reaches]).any()
    if backend != "torch":  # which adds -inf to pruned scores
        torch.testing.assert_close(output[~reaches], finite[~reaches], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [None, 3, QuantizationTable(1e-2, (0.0, 0.03, 0.2, 0.7))])
@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
def test_what_is_not_finite_stays_visible_in_gradients(backend, device, bits):
    layout = random_layout(2, 32, 0.5, device)
    tensors = random_inputs((1, 2, 32, 32), torch.float32, device)
    tensors[0][0, 0, 3, 5] = float("nan")
    grad_output = torch.randn(1, 2, 32, 32, device=device)
    of_query, of_key, of_value = gradients(tensors, layout, grad_output, backend, bits=bits)
    seen = layout.keep()[0, 3]
    assert of_query[0, 0, 3].isnan().all() and of_key[0, 0, seen].isnan().all()
    assert of_value[0, 0, seen].isnan().all()
    assert not any(one[0, 1].isnan().any() for one in (of_query, of_key, of_value))


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch", "reference"))
def test_full_mask_is_dense_attention(backend, device):
    query, key, value = random_inputs((2, 2, 65, 64), torch.float32, device)
    layout = GlobalMask(torch.ones(1, 2, 65, 65, dtype=torch.bool)).layout(0, device)
    result = sparse_attention(query, key, value, layout, backend=backend)
    torch.testing.assert_close(result, scaled_dot_product_attention(query, key, value), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_calls(backend, device, data):
    """Any shape, mask and option agrees with the reference; extreme but finite inputs give finite outputs."""
    batch, heads, length = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 70)))
    head_dim = data.draw(st.sampled_from([16, 32, 40, 64]))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    layout = random_layout(heads, length + data.draw(st.integers(0, 20)), data.draw(st.floats(0, 0.99)), device)
    query, key, value = random_inputs((batch, heads, length, head_dim), torch.float32, device)
    query = query * data.draw(st.sampled_from([1.0, 30.0]))
    arguments = dict(
        bits=data.draw(st.sampled_from([None, 2, 5])),
        causal=data.draw(st.booleans()),
        key_lengths=torch.randint(0, length + 1, (batch,), device=device),
    )
    result = sparse_attention(query, key, value, layout, backend=backend, **arguments)
    assert torch.isfinite(result).all()
    if query.abs().max() < 10:
        assert_within_budget(result, query, key, value, layout, **arguments)


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch", "reference"))
def test_a_layout_first_used_in_inference_mode_serves_training(backend, device):
    inputs = random_inputs((1, 2, 40, 32), torch.float32, device)
    with torch.inference_mode():
        layout = random_layout(2, 40, 0.3, device)
        sparse_attention(*inputs, layout, backend=backend)
        prepare(layout, 32, torch.float32, backend)
    fresh = GlobalMask(layout.keep()[None].cpu().clone()).layout(0, device)
    found, expected = (gradients(inputs, each, torch.ones_like(inputs[0]), backend) for each in (layout, fresh))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("backend", "device"), backends("triton", "native", "torch"))
def test_permuting_keys_with_the_mask_changes_nothing(backend, device):
    query, key, value = random_inputs((1, 2, 48, 32), torch.float32, device)
    keep = torch.rand(1, 2, 48, 48) < 0.3
    order = torch.randperm(48)
    plain = sparse_attention(query, key, value, GlobalMask(keep).layout(0, device), backend=backend)
    permuted = GlobalMask(keep[:, :, :, order]).layout(0, device)
    moved = sparse_attention(
        query, key[:, :, order.to(device)], value[:, :, order.to(device)], permuted, backend=backend
    )
    torch.testing.assert_close(plain, moved, atol=1e-5, rtol=1e-5)


def test_bad_arguments_are_named():
    query, key, value = random_inputs((2, 2, 10, 16), torch.float32, "cpu")
    layout = random_layout(2, 8, 0.5, "cpu")
    wide = random_layout(2, 16, 0.5, "cpu")
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    packed = [torch.randn(10, 2, 16) for _ in range(3)]

    def refused(match, *tensors, layout=wide, error=ValueError, **arguments):
        with pytest.raises(error, match=match):
            sparse_attention(*(tensors or (query, key, value)), layout, **arguments)

    refused("longer than the mask: queries end at position 10 and keys at 10, the mask covers 8", layout=layout)
    refused("3 heads, the mask's layer 2", *random_inputs((2, 3, 10, 16), torch.float32, "cpu"))
    refused("expected a SparseLayout", layout=torch.ones(2, 2))
    refused("expected one dtype", query, key.half(), value)
    refused("key is ndarray, expected a tensor", query, key.numpy(), value)
    refused("head_dim is 0", *(t[..., :0] for t in (query, key, value)))
    refused(r"int64", *(t.long() for t in (query, key, value)))
    refused("batch, heads and head_dim must agree", query, key[:1], value[:1])
    refused("expected query \\[batch", query[0], key[0], value[0])
    refused("key_lengths is torch.int64 \\(3,\\)", key_lengths=torch.tensor([1, 2, 3]))
    refused("key_lengths is list, expected a tensor", key_lengths=[1, 2])
    refused("cu_seqlens is list, expected a tensor", *packed, cu_seqlens=[0, 4, 10])
    refused("key_padding_mask is torch.int64", key_padding_mask=torch.ones(2, 10, dtype=torch.int64))
    refused("bits is 9, expected 1..8", bits=9)
    refused("bits is 0, expected 1..8", bits=0)
    refused("bits is 3.0", bits=3.0, error=TypeError)
    refused("dropout is 1.0", dropout=1.0)
    refused("dropout is '0.1', expected a number", dropout="0.1", error=TypeError)
    refused("scale is '1', expected a number, or None", scale="1", error=TypeError)
    refused("query_offset is -1", query_offset=-1)
    refused("query_offset is 1.5, expected a whole number", query_offset=1.5, error=TypeError)
    refused("max_length is '6'", *packed, cu_seqlens=cu_seqlens, max_length="6", error=TypeError)
    refused("backend is 'fast', expected 'auto' or one of", backend="fast")
    refused("causal is 'no', expected True or False", causal="no", error=TypeError)
    refused("return_lse is 1, expected True or False", return_lse=1, error=TypeError)
    refused("padding masks out", *packed, cu_seqlens=cu_seqlens, key_lengths=torch.tensor([4, 6]))
    refused("cumulative lengths from 0 to the 10 tokens", *packed, cu_seqlens=cu_seqlens[:2])
    refused("longest packed sequence has 10 tokens", *packed, layout=layout, cu_seqlens=cu_seqlens[[0, 2]])
    refused("max_length is 5, but cu_seqlens has a sequence of 6", *packed, cu_seqlens=cu_seqlens, max_length=5)
    refused("cumulative lengths from 0 to the 10 tokens", *packed, cu_seqlens=cu_seqlens[:2], max_length=6)
    refused("cu_seqlens is torch.float32", *packed, cu_seqlens=cu_seqlens.float())
    refused("float64", *(t.double() for t in (query, key, value)), backend="triton", error=RuntimeError)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layout": torch.ones(2, 8, 8)}, "layout is Tensor, expected a SparseLayout"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"dtype": torch.int32}, "dtype is torch.int32, expected torch.float16"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
)
def test_what_cannot_be_prepared_is_named(changed, message):
    usual = dict(layout=random_layout(2, 16, 0.5, "cpu"), head_dim=64, dtype=torch.float32, backend="native")
    with pytest.raises(ValueError, match=message):
        prepare(**usual | changed)
    with pytest.raises(TypeError, match="head_dim is '64', expected a whole number"):
        prepare(**usual | {"head_dim": "64"})


def test_auto_takes_what_a_named_backend_refuses():
    exact = random_inputs((1, 2, 10, 300), torch.float64, "cpu")
    layout = random_layout(2, 16, 0.5, "cpu")
    with pytest.raises(RuntimeError, match="head_dim 300 is larger than 256"):
        sparse_attention(*exact, layout, backend="triton")
    attention._warned_of.clear()
    with pytest.warns(UserWarning, match=r"'reference' computes attention; the faster .*float64") as warned:
        result = sparse_attention(*exact, layout)
        sparse_attention(*random_inputs((1, 2, 9, 400), torch.float64, "cpu"), layout)
    assert len(warned) == 1
    assert torch.equal(result, sparse_attention(*exact, layout, backend="reference"))
