"""Where a benchmark runs, and what that machine and code are called."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparse_attn.backends import native

ROOT = Path(__file__).resolve().parent.parent


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, by default the GPU if there is one. Raises ValueError for an absent GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: {no_gpu()}; use --device cpu")
    return torch.device(name)


def no_gpu() -> str:
    """Why there is no GPU where torch finds none."""
    reason = "this build of torch has no CUDA" if torch.version.cuda is None else "torch sees none"
    return f"no GPU is available ({reason})"


def spare_processors() -> int:
    """How many processes to compute in beside a GPU: two fewer than processors, 14 at most."""
    return max(1, min(14, (os.cpu_count() or 1) - 2))


def start_worker() -> None:
    """What each of several processes does first: it has one thread, and an interrupt is left to its parent, which ends
    it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def synchronize(device: torch.device) -> None:
    """Waits until everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_device(device: torch.device) -> str:
    """For example "NVIDIA H200", "AMD EPYC, 2 threads", "AMD EPYC with AVX2, 2 threads" for one without AVX-512, or
    "Intel(R) Xeon(R) Processor with AMX, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    unit = " with AMX" if "amx" in native.capabilities() else ""
    vectors = " with AVX2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else ""
    return f"{_processor()}{unit}{vectors}, {threads} thread{'s' if threads > 1 else ''}"


def circumstances(device: torch.device) -> dict[str, Any]:
    """What every file of results begins with: where, with which code and when it was measured."""
    return {
        "device": describe_device(device),
        "device_type": device.type,
        **code_and_date(),
    }


def code_and_date() -> dict[str, Any]:
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def commit() -> str | None:
    """The commit of this checkout, ending in "-dirty" with uncommitted changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide about results."""
    # Not every build of torch installs its version with what it was built for, such as +cu130.
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "sparse-attn", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
