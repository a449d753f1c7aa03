"""Every shipped kernel configuration compiles for GPUs without one, and fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_attn.kernels.configuration import SHIPPED_CONFIGS, config
from sparse_attn.layout import ROWS

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
# A few registers of wide configurations spill, most where float32 rows of 256 leave no room; more is a regression.
SPILL_LIMIT_BYTES = {32: 16, 64: 16, 128: 64, 256: 1024}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[dict]:
    """The two variants that hold all code paths of the kernel, compiled in a process without the interpreter."""
    out = tmp_path_factory.mktemp("report") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel_report", "--json", str(out)]
    command += ["--variants", "padded", "3 bits", "--processes", "2"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    return json.loads(out.read_text())


def test_shipped_configurations_fit_the_chips(report, record_property):
    identity = ("kernel", "head_dim", "dtype", "variant", "architecture")
    compiled = {tuple(one[field] for field in identity) for one in report}
    assert len(compiled) == len(report) == (3 * 4 * 2 + 1) * 2 * 3
    for one in report:
        name = (
            f"{one['kernel']}, {one['variant']}, head_dim {one['head_dim']}, {one['dtype']}, sm_{one['architecture']}"
        )
        assert one["shared_bytes"] <= SHARED_LIMIT[one["architecture"]], name
        assert one["spilled_bytes"] <= SPILL_LIMIT_BYTES[one["head_dim"]], name
        assert one["matrix_instructions"], f"{name} uses no matrix unit"
    spilled = [one for one in report if one["spilled_bytes"]]
    record_property("spilled", json.dumps(spilled))
    print(*(f"spills: {one}" for one in spilled), sep="\n")


def test_main_configuration_spills_nothing(report):
    main = [one for one in report if one["head_dim"] == 64 and one["dtype"] != "float32"]
    assert main and all(one["spilled_bytes"] == 0 for one in main)
    on_hopper = [one for one in main if one["architecture"] == 90]
    assert all(one["matrix_instructions"] == ["wgmma.mma_async"] for one in on_hopper)


def test_configurations_are_chosen_by_size():
    assert config("forward", 33, 2) == config("forward", 64, 2)
    assert config("forward", 1, 4) == config("forward", 32, 4)
    with pytest.raises(ValueError, match="no configuration of forward for head_dim 257"):
        config("forward", 257, 2)
    assert set(SHIPPED_CONFIGS) == {"forward", "grad_query", "grad_key_value"}
    assert all(shipped.rows in ROWS for configs in SHIPPED_CONFIGS.values() for shipped in configs.values())
