"""The processes that `torchrun` or `accelerate launch` starts, as the SQuAD benchmark uses them.

A process alone is the plain case: it is the first, and all.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TypeVar

import torch
import torch.distributed as dist

from sparse_attn.distributed import rank_and_world
from sparse_attn.training import require_accelerate

from .device import pick_device

Value = TypeVar("Value")


@contextmanager
def launched(device: str | None) -> Iterator[None]:
    """Joins the other processes, if this one was launched with some, and leaves them at the end. Each takes a GPU of
    its own, and only the first one prints on stdout.

    Raises ValueError where there are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    require_accelerate()
    from accelerate import PartialState

    place = pick_device(device)
    local = int(os.environ.get("LOCAL_RANK", 0))
    if place.type == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; launch as many "
            "processes, or use --device cpu"
        )
    PartialState(cpu=place.type == "cpu")
    try:
        with redirect_stdout(sys.stdout if is_first() else io.StringIO()):
            yield
    finally:
        dist.destroy_process_group()


def own_device(name: str | None) -> torch.device:
    """`pick_device`, but among several processes the GPU that is this one's."""
    device = pick_device(name)
    if device.type == "cuda" and rank_and_world()[1] > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank_and_world()[0] == 0


def is_first_here() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def first_of(value: Value) -> Value:
    """What the first process passes, in every process."""
    return of_all(value)[0]


def of_all(value: Value) -> list[Value]:
    """What each process passes, in every process."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
