"""Which counter a call of a CUDA kernel takes."""

import pytest
import torch

from sparse_attn.backends import tickets
from sparse_attn.backends.tickets import COUNT, NONE, new_tickets, ticket_of


@pytest.fixture
def counters(monkeypatch):
    """New counters, and a switch for capturing."""
    state = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(tickets, "_numbers", {})
    monkeypatch.setattr(tickets, "_captured", {})
    return new_tickets(torch.device("cpu")), state


def test_streams_and_captured_calls_share_nothing(counters):
    own, state = counters
    assert own.tolist() == [0] * COUNT
    assert [ticket_of(own, stream) for stream in (0, 77, 0, 77)] == [0, 1, 0, 1]
    state["capturing"] = True
    assert [ticket_of(own, stream) for stream in (77, 77, 5)] == [COUNT - 1, COUNT - 2, COUNT - 3]
    state["capturing"] = False
    assert [ticket_of(own, stream) for stream in (77, 5)] == [1, 2]
    other = new_tickets(torch.device("cpu"))
    assert ticket_of(other, 5) == 0


def test_where_all_are_taken_the_kernel_does_without(counters):
    own, state = counters
    state["capturing"] = True
    captured = [ticket_of(own, 1) for _ in range(COUNT - 2)]
    state["capturing"] = False
    streams = [ticket_of(own, stream) for stream in (8, 9)]
    assert sorted(captured + streams) == list(range(COUNT))
    assert ticket_of(own, 10) == NONE and ticket_of(own, 9) == 1
    state["capturing"] = True
    assert ticket_of(own, 9) == NONE


def test_counters_where_others_lay_are_new(counters, monkeypatch):
    gone, state = counters
    state["capturing"] = True
    assert [ticket_of(gone, 1) for _ in range(COUNT + 1)][-1] == NONE
    monkeypatch.setattr(torch, "zeros", lambda *sizes, **kind: gone)  # an allocator that takes the same place again
    assert ticket_of(new_tickets(gone.device), 1) == COUNT - 1
