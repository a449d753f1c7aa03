"""Runs the process that measures one row of the SQuAD table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from .attention_variants import Absent
from .device import ROOT
from .squad_worker import Job, Measured


class VariantFailed(RuntimeError):
    """The process that measured a variant ended without a result."""


def run_worker(job: Job, folder: Path) -> tuple[Measured, dict[str, torch.Tensor]]:
    """The figures and logits that a worker finds; its files lie in `folder`.

    Raises VariantFailed, or Absent where the variant cannot run on this machine.
    """
    spec, out = folder / "spec.json", folder / "out.json"
    for path in (out, out.with_suffix(".safetensors")):
        path.unlink(missing_ok=True)
    spec.write_text(json.dumps(asdict(job)))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.squad_worker", str(spec), str(out)]
    finished = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
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
