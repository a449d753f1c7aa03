import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import current_memory, timed_passes

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_the_first_pass_only_warms_up():
    passes = []
    timed = timed_passes(lambda: passes.append(None) or len(passes), CPU, repeats=3)
    assert (len(timed.seconds), timed.result) == (3, 4) and timed.warm_up_seconds > 0


def test_joules_are_those_of_one_pass_and_not_of_the_first(monkeypatch):
    used = [5.0]
    monkeypatch.setattr("benchmarks.measure.energy_counter", lambda device: lambda: used[0])

    def run_pass():
        used[0] += 7.0

    assert timed_passes(run_pass, CPU, repeats=3).joules == pytest.approx(7.0)
    monkeypatch.setattr("benchmarks.measure.energy_counter", lambda device: None)
    assert timed_passes(run_pass, CPU, repeats=1).joules is None


MEASURES = """
import torch
from benchmarks.measure import current_memory, peak_memory
device = torch.device("cpu")
"""


def _in_a_process(code: str) -> list[int]:
    command = [sys.executable, "-c", MEASURES + code]
    return [int(word) for word in subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split()]


def test_peak_memory_counts_what_was_freed():
    if current_memory(CPU) is None:
        pytest.skip("this system does not tell the resident size of a process")
    before, peak, after = _in_a_process(
        "run = lambda: torch.ones(64 * 2**20).sum()\n"
        "print(current_memory(device), peak_memory(run, device), current_memory(device))"
    )
    assert before + 250 * 2**20 < peak < before + 320 * 2**20 and after < before + 64 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_peak_memory_knows_no_holes():
    """Left alone, malloc keeps every freed block below, which the next one does not fit into: over 100 MB."""
    code = """
kept = []
def run():
    torch.ones(7 * 2**20)  # malloc learns to keep blocks of up to 28 MB
    for i in range(20):
        block = torch.ones(2**22 + 2**16 * i)
        kept.append(bytes(100_000))  # lies above the block
        del block
print(current_memory(device), peak_memory(run, device))
"""
    before, peak = _in_a_process(code)
    assert peak < before + 60 * 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system forgets no peak")
def test_peak_memory_is_not_that_of_what_ran_before():
    (peak, before) = _in_a_process(
        "torch.ones(256 * 2**20)\nprint(peak_memory(lambda: torch.ones(2**20), device), current_memory(device))"
    )
    assert peak < before + 64 * 2**20


def test_peak_memory_is_not_that_of_the_parent():
    ballast = torch.ones(256 * 2**20)  # 1 GiB, resident in this process only
    (peak,) = _in_a_process("print(peak_memory(lambda: None, device))")
    assert peak < 0.9 * 2**30
    assert ballast.numel() == 256 * 2**20
