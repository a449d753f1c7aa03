"""Timed calls take turns, and their times are times."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings
from benchmarks.attention_workloads import FORWARD, FORWARD_BACKWARD
from benchmarks.ceilings import least_bytes, measure_ceilings, useful_flops
from benchmarks.timing import LEAST_REPETITIONS, REPETITIONS, HostTimer, Timed, percentiles, time_in_turns
from tests.benchmarks.attention_samples import packed_workload, tiny_workload

ROOT = Path(__file__).resolve().parents[2]


class FakeTimer:
    """Every repetition takes what the launch returns."""

    def repeat(self, timed):
        for one in timed:
            try:
                one.milliseconds.append(one.launch())
            except RuntimeError as error:
                one.failure = error


def test_percentiles_are_ordered_and_of_the_times():
    assert percentiles([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert percentiles([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_calls_take_turns_until_their_time_or_repetitions_are_over():
    order = []
    calls = [Timed(lambda: order.append("quick") or 1.0, "host"), Timed(lambda: order.append("slow") or 30.0, "host")]
    time_in_turns(FakeTimer(), calls, [1.0, 0.1])
    assert [len(one.milliseconds) for one in calls] == [REPETITIONS, 4]
    assert order[:4] == ["quick", "slow"] * 2


PAGES_OF_A_RESULT = """
import resource, torch
from benchmarks.timing import HostTimer
timer = HostTimer()
for _ in range(16):  # until free pieces of the heap are large enough
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_results_take_the_memory_of_those_before():
    """In a process of its own, whose heap no other test has cut up. 64 MiB are more than glibc keeps by itself."""
    command = [sys.executable, "-c", PAGES_OF_A_RESULT]
    pages = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert pages < 2**26 / resource.getpagesize() / 4


def test_a_slow_call_still_gets_a_few_repetitions():
    slow = Timed(lambda: 1e6, "host")
    time_in_turns(FakeTimer(), [slow], [0.1])
    assert len(slow.milliseconds) == LEAST_REPETITIONS


def test_a_call_that_fails_is_left_out():
    def fail():
        raise RuntimeError("broken")

    bad, good = Timed(fail, "host"), Timed(lambda: 1.0, "host")
    time_in_turns(FakeTimer(), [bad, good], [1.0, 1.0])
    assert str(bad.failure) == "broken" and bad.milliseconds == [] and len(good.milliseconds) == REPETITIONS


def test_the_host_timer_warms_up_and_measures():
    calls = []
    timer = HostTimer()
    timed = timer.prepare(lambda: calls.append(None))
    assert len(calls) == 3 and timed.timing == "host"
    time_in_turns(timer, [timed], [0.0])
    assert len(calls) == 3 + LEAST_REPETITIONS == 3 + len(timed.milliseconds) and min(timed.milliseconds) > 0


def test_ceilings_are_rates():
    measured = measure_ceilings(torch.device("cpu"), torch.float32, seconds=0.01)
    assert measured.copy_bytes_per_second > 1e8 and measured.matrix_flops_per_second > 1e8


@pytest.mark.parametrize(("slower", "multiplied"), [(100, torch.float32), (2, torch.bfloat16)])
def test_the_ceiling_of_numbers_that_a_cpu_cannot_multiply_is_float32s(slower, multiplied, monkeypatch):
    made = []
    monkeypatch.setattr(ceilings, "_product", lambda side, device, dtype: made.append((side, dtype)) or dtype)
    monkeypatch.setattr(ceilings, "_seconds_of", lambda dtype: 1e-3 * (slower if dtype == torch.bfloat16 else 1))
    monkeypatch.setattr(ceilings, "_medians", lambda device, calls, seconds: [1.0])
    rate = ceilings.measure_matrix_rate(torch.device("cpu"), torch.bfloat16)
    assert made[-1] == (2048, multiplied) and rate == 2 * 2048**3


def test_floors_are_those_counted_by_hand():
    tiny, packed = tiny_workload(), packed_workload()  # 2 x 48 and 40 + 17 + 5 tokens, 2 heads, head_dim 16
    assert least_bytes(tiny, FORWARD, 2) == 4 * 96 * 32 * 2
    assert least_bytes(tiny, FORWARD_BACKWARD, 2) == 12 * 96 * 32 * 2
    assert least_bytes(packed, FORWARD, 4) == 4 * 62 * 32 * 4
    assert useful_flops(tiny, FORWARD, kept=1000) == 2 * 2 * 16 * 1000  # two products, multiply and add
    assert useful_flops(tiny, FORWARD_BACKWARD, kept=1000) == 7 * 2 * 16 * 1000
