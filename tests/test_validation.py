"""What `sparse_attention` refuses because it does not fit the mask or the query: named, before anything is computed."""

import pytest
import torch

from sparse_attn import GlobalMask, sparse_attention
from tests.helpers import random_inputs, random_layout

LAYOUT = random_layout(2, 16, 0.5, "cpu")
BOUNDS = torch.tensor([0, 4, 10], dtype=torch.int32)


def padded():
    return random_inputs((2, 2, 10, 16), torch.float32, "cpu")


def packed():
    return random_inputs((10, 2, 16), torch.float32, "cpu")


def changed(tensors, place, change):
    """The tensors, one of them changed."""
    return [change(tensor) if index == place else tensor for index, tensor in enumerate(tensors)]


def refused(match, tensors, layout=LAYOUT, **arguments):
    with pytest.raises(ValueError, match=match):
        sparse_attention(*tensors, layout, backend="reference", **arguments)


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_each_side_of_the_mask_limits_its_own(side):
    shape = (8, 16) if side == "queries" else (16, 8)
    layout = GlobalMask.random(1, 2, *shape, sparsity=0.5).layout(0)
    covered = f"{shape[0]} queries and {shape[1]} keys"
    refused(f"position 10 .* keys at 10.* {covered}", padded(), layout)
    refused(f"10 tokens .* {covered}", packed(), layout, cu_seqlens=BOUNDS[[0, 2]])


def test_queries_end_where_their_offset_puts_them():
    refused("position 17 and keys at 10", padded(), query_offset=7)
    refused(r"6 tokens \(query_offset 11\)", packed(), cu_seqlens=BOUNDS, query_offset=11)


@pytest.mark.parametrize("place", range(3))
def test_packed_tensors_have_one_shape(place):
    refused(r"all three must be \[tokens", changed(packed(), place, lambda tensor: tensor[:9]), cu_seqlens=BOUNDS)


def test_padded_tensors_fit_each_other():
    refused(r"expected query \[batch", changed(padded(), 2, lambda value: value[:, :, :9]))
    refused("head_dim must agree", changed(padded(), 0, lambda query: query[..., :8]))
    refused("expected one dtype", changed(padded(), 2, torch.Tensor.half))


def test_everything_is_on_one_device():
    for place in (1, 2):
        refused("on meta.* expected one device", changed(padded(), place, lambda tensor: tensor.to("meta")))
    refused("the layout is on meta, the query on cpu", padded(), LAYOUT.to("meta"))
    refused("cu_seqlens is on meta", packed(), cu_seqlens=BOUNDS.to("meta"))
    refused("key_lengths is on meta", padded(), key_lengths=torch.tensor([4, 6], device="meta"))


def test_lengths_are_whole_numbers():
    refused("key_lengths is torch.float32", padded(), key_lengths=torch.tensor([4.0, 6.0]))


@pytest.mark.parametrize("bounds", [(0, 7, 3, 10), (2, 4, 10)])
def test_cumulative_lengths_start_at_0_and_never_fall(bounds):
    refused(f"cu_seqlens is {bounds[0]} to 10", packed(), cu_seqlens=torch.tensor(bounds))


def test_cumulative_lengths_may_be_int64():
    tensors = packed()
    one, other = (sparse_attention(*tensors, LAYOUT, cu_seqlens=bounds) for bounds in (BOUNDS, BOUNDS.long()))
    assert torch.equal(one, other)


def test_a_scale_is_one_number_that_nobody_learns():
    for scale in (torch.ones((), requires_grad=True), torch.ones(2)):
        refused("scale is a tensor .*; expected one number, a constant", padded(), scale=scale)


def test_only_packed_sequences_have_a_max_length():
    refused("max_length is 10, but nothing is packed", padded(), max_length=10)
