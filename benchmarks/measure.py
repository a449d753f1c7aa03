"""Time and peak memory of a repeated piece of work."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Generic, TypeVar

import torch

from .device import synchronize
from .energy import energy_counter

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """What `timed_passes` found.

    Attributes:
        warm_up_seconds: of the first pass, which compiles and allocates.
        seconds: of each pass after it, up to the end of all work on the device.
        joules: that such a pass took, their mean; None where no driver tells.
        result: of the last pass.
    """

    warm_up_seconds: float
    seconds: list[float]
    joules: float | None
    result: Result


def timed_passes(run_pass: Callable[[], Result], device: torch.device, repeats: int) -> Timed[Result]:
    """Runs `run_pass` once to warm up, then `repeats` times."""
    warm_up_seconds, _ = _timed(run_pass, device)
    used = energy_counter(device)
    before = used() if used else 0.0
    passes = [_timed(run_pass, device) for _ in range(repeats)]
    joules = (used() - before) / repeats if used else None
    return Timed(warm_up_seconds, [seconds for seconds, _ in passes], joules, passes[-1][1])


@contextmanager
def add_seconds(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds how long the block takes to what `seconds` has under `name`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _timed(run_pass: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    synchronize(device)
    start = time.perf_counter()
    result = run_pass()
    synchronize(device)
    return time.perf_counter() - start, result


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes held at most while `run` runs, with what was held before: by torch's allocator on a GPU; resident in this
    process on a CPU, where malloc meanwhile keeps nothing large that was freed.

    Where a system does not let a process forget an earlier peak, as Linux does, nothing larger should have run before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with _freed_memory_returned():
        _forget_peak()
        run()
    # Linux carries ru_maxrss over from the parent that started this process; VmHWM is this process's own.
    own = _process_status("VmHWM")
    if own is not None:
        return own
    kilobytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes


def in_own_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What a new process finds, whose memory no other work has touched. Raises RuntimeError where it is killed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """glibc's malloc hands large blocks back to the system as they are freed. Left alone it learns to keep those of up
    to 32 MB, in holes that do not fit the next ones: the same passes then peak hundreds of megabytes apart."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    _return_freed_memory()
    trim_threshold, mmap_threshold = -1, -3
    large = 2**17  # glibc's defaults
    mallopt(mmap_threshold, large)
    mallopt(trim_threshold, large)
    try:
        yield
    finally:  # where malloc would have got to by itself
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


def _return_freed_memory() -> None:
    """Hands back what malloc has kept so far."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peak() -> None:
    """From now on VmHWM is the peak since now, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def current_memory(device: torch.device) -> int | None:
    """Bytes held now: by torch's allocator on a GPU; resident on a CPU, without what malloc keeps of freed memory (None
    if the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _return_freed_memory()
    return _process_status("VmRSS")


def _process_status(field: str) -> int | None:
    status = Path(f"/proc/{os.getpid()}/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
