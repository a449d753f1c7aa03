"""The Triton backend's own: what it refuses and what it copies for 32-bit offsets, and on which GPU it launches."""

from contextlib import nullcontext

import pytest
import torch

from sparse_attn import sparse_attention
from sparse_attn.backends import triton
from tests.helpers import DEVICE, assert_within_budget, gradients, random_inputs, random_layout

pytestmark = pytest.mark.usefixtures("poisoned")


def test_heads_beyond_32_bit_offsets_are_refused():
    near = torch.empty(1, 2, 5, 32, dtype=torch.float16, device="meta")
    far = torch.empty_strided((1, 2, 5, 32), (0, 0, 2**29, 1), dtype=torch.float16, device="meta")
    layout = random_layout(2, 5, 0.0, "cpu").to("meta")
    with pytest.raises(RuntimeError, match="one head of the value spans 2147483679 elements"):
        sparse_attention(near, near, far, layout, backend="triton")


def test_outputs_beyond_32_bit_offsets_are_refused(monkeypatch):
    """Heads of an output lie beside tokens, further apart than those of a contiguous query."""
    query = torch.empty(1, 2, 5, 32, dtype=torch.float16, device="meta")
    layout = random_layout(2, 5, 0.0, "cpu").to("meta")
    monkeypatch.setattr(triton, "_MAX_OFFSET", 5 * 2 * 32 - 1)
    with pytest.raises(RuntimeError, match="one sequence of the output has more elements than 32 bits"):
        sparse_attention(query, query, query, layout, backend="triton")


def test_packed_batches_may_be_longer_than_32_bit_offsets(monkeypatch):
    layout = random_layout(2, 20, 0.5, DEVICE)
    tensors = random_inputs((60, 2, 32), torch.float32, DEVICE)
    cu_seqlens = torch.tensor([0, 20, 35, 55, 60], device=DEVICE, dtype=torch.int32)
    expected = sparse_attention(*tensors, layout, cu_seqlens=cu_seqlens, backend="triton")
    monkeypatch.setattr(triton, "_MAX_OFFSET", 20 * 2 * 32)
    assert torch.equal(sparse_attention(*tensors, layout, cu_seqlens=cu_seqlens, backend="triton"), expected)


def test_output_gradients_beyond_32_bit_offsets_are_copied(monkeypatch):
    from sparse_attn.kernels import launch

    layout = random_layout(1, 20, 0.5, DEVICE)
    tensors = random_inputs((1, 1, 20, 32), torch.float32, DEVICE)
    grad_output = torch.randn(1, 1, 20, 64, device=DEVICE)[..., ::2]
    expected = gradients(tensors, layout, grad_output, "triton")
    launched, launch_backward = [], launch.backward_key_value
    monkeypatch.setattr(launch, "backward_key_value", lambda *given: launched.append(given) or launch_backward(*given))
    for limit in (20 * 64, 20 * 32):  # what a head of grad_output needs, and less
        monkeypatch.setattr(triton, "_MAX_OFFSET", limit)
        own = gradients(tensors, layout, grad_output, "triton")
        assert all(map(torch.equal, own, expected))
    assert [given[3].is_contiguous() for given in launched] == [False, True]


@pytest.mark.parametrize(("device", "changed_to"), [("cpu", []), ("cuda:0", []), ("cuda:1", [1])])
def test_triton_launches_where_the_query_is(device, changed_to, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(device.index) or nullcontext())
    with triton._current(torch.device(device)):
        assert current == changed_to


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_triton_on_another_gpu_than_the_current_one():
    layout = random_layout(2, 40, 0.5, "cuda:1")
    tensors = random_inputs((2, 2, 40, 32), torch.float16, "cuda:1")
    assert_within_budget(sparse_attention(*tensors, layout, backend="triton"), *tensors, layout)
