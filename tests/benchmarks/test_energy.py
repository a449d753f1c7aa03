"""Joules from the counters of sockets."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.energy import energy_counter, rapl_counter


def write(folder, name, microjoules, size=999):
    socket = folder / name
    socket.mkdir(exist_ok=True)
    (socket / "energy_uj").write_text(f"{microjoules}\n")
    (socket / "max_energy_range_uj").write_text(f"{size}\n")


def test_sockets_are_added_and_counters_start_over(tmp_path):
    write(tmp_path, "intel-rapl:0", 100)
    write(tmp_path, "intel-rapl:1", 990)
    write(tmp_path, "intel-rapl:0:0", 5)  # a part of socket 0, which counts it already
    used = rapl_counter(tmp_path)
    assert used() == 0
    write(tmp_path, "intel-rapl:0", 150)
    write(tmp_path, "intel-rapl:1", 20)  # 10 more to 1,000 values, then 20
    assert used() == pytest.approx(80e-6)
    write(tmp_path, "intel-rapl:1", 10)
    assert used() == pytest.approx((80 + 990) * 1e-6)


def test_no_counter_where_nothing_tells(tmp_path):
    assert rapl_counter(tmp_path / "absent") is None
    write(tmp_path, "intel-rapl:0", "no number")
    assert rapl_counter(tmp_path) is None


def test_a_gpu_is_asked_by_its_uuid_through_nvml(monkeypatch):
    class NVMLError(Exception):
        pass

    millijoules = [4000]

    def handle(uuid):
        if uuid != "GPU-12":
            raise NVMLError
        return "handle"

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda found: millijoules[0],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for uuid, expected in (("12", 2.5), ("13", None)):
        properties = SimpleNamespace(uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        millijoules[0] = 4000
        used = energy_counter(torch.device("cuda"))
        millijoules[0] = 6500
        assert (used and used()) == expected
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_counter(torch.device("cuda")) is None
