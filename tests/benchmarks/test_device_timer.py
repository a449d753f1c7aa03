"""Which calls become graphs, on a device of straw: what real devices do with them is theirs to show."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks.timing import LEAST_REPETITIONS, REPETITIONS, DeviceTimer, empty_milliseconds, time_in_turns


class StrawDevice:
    """Stands in for torch.cuda. A graph replays nothing; `capturing` and `sync_mode` tell calls what is going on."""

    def __init__(self):
        self.capturing, self.sync_mode, self.replays, self.pools = False, "default", 0, []

    @contextmanager
    def graph(self, graph, pool, stream):
        self.pools.append(pool)
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def replay(self):
        self.replays += 1

    def set_sync_debug_mode(self, mode):
        self.sync_mode = mode


@pytest.fixture
def straw(monkeypatch):
    device = StrawDevice()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 2.5)
    replacements = dict(
        Stream=lambda on: stream, current_stream=lambda on: stream, stream=lambda stream: nullcontext(),
        graph_pool_handle=object, graph=device.graph, set_sync_debug_mode=device.set_sync_debug_mode,
        CUDAGraph=lambda: SimpleNamespace(replay=device.replay), Event=lambda enable_timing: event,
        get_device_properties=lambda on: SimpleNamespace(L2_cache_size=1024), synchronize=lambda on: None,
        current_device=lambda: 0, default_generators=[SimpleNamespace(graphsafe_set_state=lambda state: None)],
    )  # fmt: skip
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr("benchmarks.timing._GPU_FLUSH_BYTES", 16)
    return device


def timed_on(straw, *calls):
    timer = DeviceTimer(torch.device("cpu"))
    timed = [timer.prepare(call) for call in calls]
    time_in_turns(timer, timed, [0.0] * len(calls))
    return timed


def test_a_call_is_warmed_up_captured_and_replayed(straw):
    calls = []
    (timed,) = timed_on(straw, lambda: calls.append(straw.capturing))
    assert calls == [False] * 3 + [True]
    assert timed.timing == "graph" and timed.milliseconds == [2.5] * LEAST_REPETITIONS
    assert straw.replays == 1 + LEAST_REPETITIONS and straw.sync_mode == "default"


def test_a_graph_keeps_the_tensors_of_its_call(straw):
    def call():
        pass

    (timed,) = timed_on(straw, call)
    assert timed.launch is not call and timed.captured is call


def test_a_call_that_waits_for_the_device_is_launched_instead(straw):
    calls = []

    def waiting():
        calls.append(straw.capturing)
        if straw.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    (timed,) = timed_on(straw, waiting)
    assert timed.timing == "stream" and calls == [False] * (3 + LEAST_REPETITIONS) and straw.replays == 0


def test_a_failed_capture_is_launched_instead_and_the_next_one_gets_a_pool_of_its_own(straw):
    def uncapturable():
        if straw.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    first, second = timed_on(straw, uncapturable, lambda: None)
    assert (first.timing, second.timing) == ("stream", "graph")
    assert len(set(map(id, straw.pools))) == 2


def test_a_call_that_fails_later_is_left_out(straw):
    launches = iter(range(10))

    def failing():
        if straw.sync_mode == "error" or next(launches) > 2:
            raise RuntimeError("late")

    failed, good = timed_on(straw, failing, lambda: None)
    assert str(failed.failure) == "late" and good.failure is None and len(good.milliseconds) == LEAST_REPETITIONS


def test_a_graph_without_work_is_timed_on_a_gpu(straw, monkeypatch):
    timers = []
    monkeypatch.setattr("benchmarks.timing.DeviceTimer", lambda device: timers.append(on_cpu) or on_cpu)
    on_cpu = DeviceTimer(torch.device("cpu"))
    assert empty_milliseconds(torch.device("cuda")) == 2.5 and timers == [on_cpu]
    assert straw.replays == 1 + REPETITIONS
    assert empty_milliseconds(torch.device("cpu")) is None
