import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import current_memory, peak_memory, timed_passes

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


def test_peak_memory_keeps_what_was_freed():
    before = current_memory(CPU)
    if before is None:
        pytest.skip("this system does not tell the resident size of a process")
    block = torch.ones(64 * 2**20)  # 256 MiB
    assert peak_memory(CPU) >= before + 200 * 2**20
    del block
    assert current_memory(CPU) < peak_memory(CPU) - 200 * 2**20


def test_peak_memory_is_not_that_of_the_parent():
    ballast = torch.ones(256 * 2**20)  # 1 GiB, resident in this process only
    code = "import torch; from benchmarks.measure import peak_memory; print(peak_memory(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(child.stdout) < 0.9 * 2**30
    assert ballast.numel() == 256 * 2**20
