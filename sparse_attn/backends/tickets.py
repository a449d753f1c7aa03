"""Counters that the blocks of one kernel call share. A call leaves its counter as it found it, at 0; what may run at
the same time must not share one."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

COUNT = 256  # of a layout
NONE = -1  # the kernel does without

_lock = threading.Lock()
_numbers: dict[int, dict[int, int]] = {}  # by where the counters lie: of each stream
_captured: dict[int, int] = {}  # how many belong to captured calls


def new_tickets(device: torch.device) -> Tensor:
    """int32 [COUNT], all 0."""
    tickets = torch.zeros(COUNT, dtype=torch.int32, device=device)
    with _lock:  # what lay there before is gone
        _numbers.pop(tickets.data_ptr(), None)
        _captured.pop(tickets.data_ptr(), None)
    return tickets


def ticket_of(tickets: Tensor, stream: int) -> int:
    """The number of the counter for a call on the current stream of their device, whose handle is `stream`; NONE where
    all are taken.

    The calls of a stream come one after the other, so that they share one, counted from the first. A captured call,
    which may be replayed on any stream, gets one of its own for good, counted from the last.
    """
    with torch.cuda.device_of(tickets):
        capturing = torch.cuda.is_current_stream_capturing()
    place = tickets.data_ptr()
    with _lock:
        numbers, captured = _numbers.setdefault(place, {}), _captured.get(place, 0)
        if not capturing and stream in numbers:
            return numbers[stream]
        if len(numbers) + captured >= COUNT:
            return NONE
        if capturing:
            _captured[place] = captured + 1
            return COUNT - 1 - captured
        return numbers.setdefault(stream, len(numbers))
