"""Times of short calls, one after the other so that drift hits all of them, with caches flushed before each.

On a GPU a call is captured in a CUDA graph, so that Python takes no part in its time, and timed by device events.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]

WARM_UPS = 3
REPETITIONS = 100  # at most
LEAST_REPETITIONS = 3  # however long they take
_CPU_FLUSH_BYTES = 64 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_KEPT_BYTES = 2**30
_GPU_FLUSH_BYTES = 256 * 2**20  # at least; long enough for the host to get ahead of the device


@dataclass
class Timed:
    """A call that is being timed.

    Attributes:
        launch: what is timed.
        timing: "graph" (replays of a CUDA graph), "stream" (launches from Python) or "host" (a CPU).
        milliseconds: of each repetition.
        failure: the error that ended it, if one did.
        captured: what a graph was made of; the graph needs the tensors that this holds.
    """

    launch: Call
    timing: str
    milliseconds: list[float] = field(default_factory=list)
    failure: Exception | None = None
    captured: Call | None = None


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, so that fewer calls pay, by chance, for fresh pages of their results. Other C
    libraries stay as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)


class HostTimer:
    """Times calls on a CPU. From the first on, the process gives no memory back to the system."""

    def __init__(self):
        keep_freed_memory()
        self._flushed = torch.empty(_CPU_FLUSH_BYTES, dtype=torch.uint8)

    def prepare(self, call: Call, seconds: float = 1.0) -> Timed:
        """Warms `call` up, three times or for `seconds`."""
        end = time.perf_counter() + seconds
        for _ in range(WARM_UPS):
            call()
            if time.perf_counter() > end:
                break
        return Timed(call, "host")

    def repeat(self, timed: Sequence[Timed]) -> None:
        """Runs each call once."""
        for one in timed:
            self._flushed.add_(1)
            start = time.perf_counter()
            try:
                one.launch()
            except Exception as error:
                one.failure = error
            one.milliseconds.append((time.perf_counter() - start) * 1e3)


class DeviceTimer:
    """Times calls on a GPU, as CUDA graphs where that works. Graphs share memory, so keep all of them or none."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failed_graphs: list[torch.cuda.CUDAGraph] = []  # the allocator may still refer to them
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.zeros(max(size, _GPU_FLUSH_BYTES) // 4, dtype=torch.float32, device=device)

    def prepare(self, call: Call, seconds: float = 1.0) -> Timed:
        """Warms `call` up on a side stream and captures it. The outputs of all captured calls share memory."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS - 1):
                call()
            waits = self._waits_for_the_device(call)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = None if waits else self._captured(call)
        return Timed(call, "stream") if graph is None else Timed(graph.replay, "graph", captured=call)

    def repeat(self, timed: Sequence[Timed]) -> None:
        """Runs each call once, and waits for all of them."""
        laps = []
        for one in timed:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flushed.sum()  # reads alone: what a flush writes, the timed call would have to move out of the L2
            start.record()
            try:
                one.launch()
            except Exception as error:
                one.failure = error
            end.record()
            laps.append((one, start, end))
        torch.cuda.synchronize(self._device)
        for one, start, end in laps:
            one.milliseconds.append(start.elapsed_time(end))

    def _waits_for_the_device(self, call: Call) -> bool:
        """Whether the host waits for the device within the call, which a graph cannot hold."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def _captured(self, call: Call) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream where the inner one fails to.
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                call()
            graph.replay()
            torch.cuda.synchronize(self._device)
        except Exception:
            self._after_failed_capture(graph)
            return None
        return graph

    def _after_failed_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        self._failed_graphs.append(graph)
        self._pool = torch.cuda.graph_pool_handle()
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self._device)
        with contextlib.suppress(RuntimeError, AttributeError):  # the generator still believes in the capture
            index = torch.cuda.current_device() if self._device.index is None else self._device.index
            torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(torch.device("cuda", index)))


Timer = HostTimer | DeviceTimer


def make_timer(device: torch.device) -> Timer:
    return DeviceTimer(device) if device.type == "cuda" else HostTimer()


def time_in_turns(timer: Timer, timed: Sequence[Timed], seconds: Sequence[float]) -> None:
    """Fills in the milliseconds of `timed`: rounds of all of them, until each had 100 repetitions or its seconds.

    A call that fails is left out from then on; its failure says why.
    """
    while True:
        open_calls = [one for one, budget in zip(timed, seconds, strict=True) if _wants_more(one, budget)]
        if not open_calls:
            return
        timer.repeat(open_calls)


def _wants_more(timed: Timed, seconds: float) -> bool:
    done = len(timed.milliseconds)
    if timed.failure is not None or done >= REPETITIONS:
        return False
    return done < LEAST_REPETITIONS or sum(timed.milliseconds) < seconds * 1e3


def empty_milliseconds(device: torch.device) -> float | None:
    """What is measured on a GPU for a graph without work, the median: part of every time there. None on a CPU."""
    if device.type != "cuda":
        return None
    timer = make_timer(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        timed = timer.prepare(lambda: None)
    time_in_turns(timer, [timed], [1.0])
    return percentiles(timed.milliseconds)[1]


def percentiles(milliseconds: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile of at least two times."""
    tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]
