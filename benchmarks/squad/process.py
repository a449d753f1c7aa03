"""Runs the processes that measure one row of the SQuAD table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..device import ROOT
from ..verdicts import Absent
from .peers import require_flash
from .worker import Job, Measured

_OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # not a worker's


class VariantFailed(RuntimeError):
    """The process that measured a variant ended without a result."""


def run_worker(job: Job, folder: Path) -> tuple[Measured, dict[str, torch.Tensor]]:
    """The figures and logits that a worker finds; its files lie in `folder`.

    Raises VariantFailed, or Absent where the variant cannot run on this machine.
    """
    if job.attention == "flash":  # known without a process
        require_flash(torch.device(job.device), getattr(torch, job.dtype))
    spec, out = folder / "spec.json", folder / "out.json"
    for path in (out, out.with_suffix(".safetensors")):
        path.unlink(missing_ok=True)
    spec.write_text(json.dumps(asdict(job)))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.squad.worker", str(spec), str(out)]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    finished = subprocess.run(command, env={**environment, "PYTHONPATH": path})
    if finished.returncode != 0 or not out.exists():
        how = (
            f"was killed by signal {-finished.returncode} (out of memory?)"
            if finished.returncode < 0
            else f"ended with exit status {finished.returncode}"
        )
        raise VariantFailed(f"the process that measured it {how}; its message stands above")
    content = json.loads(out.read_text())
    if "absent" in content:
        raise Absent(content["absent"])
    return Measured(**content), load_file(out.with_suffix(".safetensors"))


def merged(
    found: Sequence[tuple[Measured, dict[str, torch.Tensor]]],
    shares: Sequence[list[int]],
    lengths: Sequence[int],
    on_gpus: bool,
) -> tuple[Measured, dict[str, list[torch.Tensor]]]:
    """One row of what several workers found at the same time, each with the windows `shares` of those of `lengths`.

    A pass takes as long as the slowest of them, and memory is that of the largest. Energy is the sum over GPUs; a
    CPU's counters know all processes. The logits are those of each window.
    """
    figures, logits = zip(*found)
    joules = [one.joules for one in figures]
    loaded = [one.loaded_memory_bytes for one in figures]
    together = Measured(
        seconds=[max(passes) for passes in zip(*(one.seconds for one in figures))],
        warm_up_seconds=max(one.warm_up_seconds for one in figures),
        joules=None if None in joules else sum(joules) if on_gpus else max(joules),
        peak_memory_bytes=max(one.peak_memory_bytes for one in figures),
        loaded_memory_bytes=None if None in loaded else max(loaded),
        processed_tokens=sum(one.processed_tokens for one in figures),
        flops=sum(one.flops for one in figures),
        kernel=figures[0].kernel,
    )
    by_window: dict[str, list] = {name: [None] * len(lengths) for name in logits[0]}
    for own, one in zip(shares, logits, strict=True):
        for name, rows in by_window.items():
            for index, row in zip(own, one[name].split([lengths[index] for index in own]), strict=True):
                rows[index] = row
    return together, by_window
