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
    seconds, last = timed_passes(lambda: passes.append(None) or len(passes), CPU, repeats=3)
    assert (len(seconds), last) == (3, 4)


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
