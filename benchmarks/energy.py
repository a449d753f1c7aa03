"""Energy that a device has used, where its driver tells: NVML on GPUs, RAPL on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")

Counter = Callable[[], float]


def energy_counter(device: torch.device) -> Counter | None:
    """A function that says how many joules `device` has used since the counter was made; None where nothing tells.

    A GPU is asked through NVML (package nvidia-ml-py), a CPU through RAPL: all its sockets, whatever runs on them.
    """
    return _nvml_counter(device) if device.type == "cuda" else rapl_counter(RAPL)


def rapl_counter(folder: Path) -> Counter | None:
    """The counter of the sockets below `folder`, as Linux shows them: intel-rapl:0 and so on, AMD's too."""
    sockets = [path for path in sorted(folder.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        ranges = [int((path / "max_energy_range_uj").read_text()) for path in sockets]
        last = [_microjoules(path) for path in sockets]
    except (OSError, ValueError):
        return None
    if not sockets:
        return None
    used = 0

    def read() -> float:
        nonlocal last, used
        now = [_microjoules(path) for path in sockets]
        used += sum((new - old) % (size + 1) for new, old, size in zip(now, last, ranges))  # counters start over
        last = now
        return used / 1e6

    return read


def _microjoules(socket: Path) -> int:
    return int((socket / "energy_uj").read_text())


def _nvml_counter(device: torch.device) -> Counter | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # millijoules
    except pynvml.NVMLError:
        return None
    return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1e3
