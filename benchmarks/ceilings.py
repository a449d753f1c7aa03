"""What the machine can do at most, measured in the same run: bytes copied and floating-point operations a second.

A floor is the time that a ceiling leaves to a kernel that moves as many bytes, or multiplies as much, at these rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .attention_workloads import FORWARD, Workload
from .timing import make_timer, percentiles, time_in_turns

_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28}
_MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
_PROBED_SIDE, _PROBES, _MUCH_SLOWER = 256, 5, 8
_FORWARD_TENSORS, _BOTH_TENSORS = 4, 12
_BOTH_OVER_FORWARD = 3.5  # two products forward, five backward


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes read and written a second by a large copy, operations a second of a large matrix product
    of random numbers."""

    copy_bytes_per_second: float
    matrix_flops_per_second: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Ceilings:
    """Times a copy of 1 GiB (a quarter of it on a CPU) and a matrix product of side 8192 (2048 on a CPU, of float32
    where that is much faster).

    A kernel copies, changing signs: a GPU's copy engine, which `copy_` in a graph may use, has less bandwidth.
    """
    generator = torch.Generator(device).manual_seed(0)
    source = torch.empty(_COPIED_BYTES[device.type] // 4, dtype=torch.float32, device=device).normal_(
        generator=generator
    )
    target = torch.empty_like(source)
    product, flops = _matrix_product(device, dtype)
    copy, multiply = _medians(device, [lambda: torch.neg(source, out=target), product], seconds)
    return Ceilings(2 * source.nbytes / copy, flops / multiply)


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """`Ceilings.matrix_flops_per_second` alone."""
    product, flops = _matrix_product(device, dtype)
    return flops / _medians(device, [product], seconds)[0]


def _matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A large product, and how many operations it is."""
    if device.type == "cpu":
        # torch multiplies 16-bit numbers a hundred times slower where a CPU has no instructions for them; a kernel can
        # convert them.
        seconds, of_float32 = (_seconds_of(_product(_PROBED_SIDE, device, one)) for one in (dtype, torch.float32))
        dtype = torch.float32 if seconds > _MUCH_SLOWER * of_float32 else dtype
    side = _MATRIX_SIDE[device.type]
    return _product(side, device, dtype), 2 * side**3


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A product of random square matrices."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product)


def _seconds_of(call: Callable[[], object]) -> float:
    """Of the fastest of some calls on a CPU, the first of which warms up: something may get in the way of one."""
    return min(_timed(call) for _ in range(_PROBES))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _medians(device: torch.device, calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Seconds of each call, timed in turns for `seconds` each."""
    timer = make_timer(device)
    timed = [timer.prepare(call) for call in calls]
    time_in_turns(timer, timed, [seconds] * len(timed))
    return [percentiles(one.milliseconds)[1] / 1e3 for one in timed]


def least_bytes(workload: Workload, direction: str, element_bytes: int) -> int:
    """Bytes that attention has to move: query, key, value and output of all real tokens once in the forward pass; then
    once more in the backward pass, with their four gradients."""
    tensors = _FORWARD_TENSORS if direction == FORWARD else _BOTH_TENSORS
    return tensors * workload.tokens * workload.heads * workload.head_dim * element_bytes


def useful_flops(workload: Workload, direction: str, kept: float) -> float:
    """Operations on `kept` positions (over heads, sequences and real lengths): two products of head_dim multiplications
    and additions for each forward, five more backward."""
    forward = 4 * workload.head_dim * kept
    return forward if direction == FORWARD else _BOTH_OVER_FORWARD * forward


def kept_in_corners(keep: torch.Tensor) -> torch.Tensor:
    """Positions that a mask, bool [heads, length, length], keeps in the top-left corner of 1, 2, ... tokens, over all
    heads: int64 [length]."""
    counts = torch.zeros(keep.shape[-1], dtype=torch.int64, device=keep.device)
    for head in keep:  # head by head: the mask of a long sequence is large
        # Size n + 1 adds row n up to the diagonal and column n above it.
        counts += head.tril().sum(1) + head.triu(1).sum(0)
    return counts.cumsum(0)
