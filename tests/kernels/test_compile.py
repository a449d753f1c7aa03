"""Every shipped kernel configuration compiles for GPUs without one, and fits them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compiled_kernels import SHARED_LIMITS, Record, read_record, record_path, write_record

# One worker runs these tests, so that the report is made once.
pytestmark = pytest.mark.xdist_group("kernel report")
TRITON = pytest.importorskip("triton").__version__
ROOT = Path(__file__).parents[2]
# A few bytes of wide configurations spill, most where float32 rows of 256 leave no room; more is a regression. Those of
# a measured table were the fastest on its GPU, spills and all.
# Triton 3.6, which torch 2.11 brings, spills more: at head_dim 64 on chips older than sm_90, at 128 on gfx942.
OLDER_THAN_SM_90 = ("sm_80", "sm_86", "sm_89")
TRITON_36 = TRITON.startswith("3.6.")
SPILL_LIMIT_BYTES = {32: 24, 64: 48, 128: 288, 256: 1024} if TRITON_36 else {32: 16, 64: 16, 128: 128, 256: 1024}
MEASURED_SPILL_LIMIT_BYTES = 128
# More of the default table: kernel, variant, head_dim, chip.
SPILL_LIMIT_BYTES_OF = {
    ("grad_query", "padded", 64, "sm_86"): 24,
    ("grad_query", "padded", 64, "sm_89"): 24,
    ("grad_key_value", "causal, dropout", 128, "gfx942"): 272,
}
MATRIX_INSTRUCTIONS = {
    "sm_80": {"mma.sync"}, "sm_86": {"mma.sync"}, "sm_89": {"mma.sync"}, "sm_90": {"wgmma", "mma.sync"},
    "sm_100": {"tcgen05", "mma.sync"}, "gfx942": {"v_mfma"},
}  # fmt: skip


def _report(folder: Path, *options: str) -> Record:
    """What a process without the interpreter compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel_report", "--csv", str(folder / "report.csv")]
    command += ["--processes", "2", *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=3600)
    return read_record(folder / "report.csv")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Record:
    """All configurations for all chips and kinds of call, as recorded; what changed since then is compiled, which takes
    minutes if it is much. With a Triton that has no record, those for sm_90 with padding and rounded."""
    recorded = record_path(TRITON).exists()
    options = ["--recorded"] if recorded else ["--targets", "sm_90", "--variants", "padded", "3 bits"]
    return _report(tmp_path_factory.mktemp("report"), *options)


def test_the_record_says_what_the_compiler_says(tmp_path):
    record = read_record(record_path(TRITON))
    if not record.compiled:
        pytest.skip(f"no record of Triton {TRITON}")
    some = ["--kernels", "forward", "--targets", "sm_90", "gfx942", "--variants", "packed", "--head-dims", "32"]
    compiled = _report(tmp_path, *some)
    known = record.known(compiled.sources)
    assert {one.target for one in compiled.compiled} == {"sm_90", "gfx942"}
    for one in compiled.compiled:
        # What changed since is not in the record.
        assert known.get((one.kernel, one.identity), one) == one


def test_shipped_configurations_fit_the_chips(report):
    if record_path(TRITON).exists():
        assert {one.target for one in report.compiled} == set(SHARED_LIMITS)
    for kernel in ("forward", "grad_query", "grad_key_value"):
        assert {one.head_dim for one in report.compiled if one.kernel == kernel} == {32, 64, 128, 256}
    for one in report.compiled:
        assert one.shared_bytes <= SHARED_LIMITS[one.target], one
        usual = SPILL_LIMIT_BYTES[one.head_dim] if one.table == "default" else MEASURED_SPILL_LIMIT_BYTES
        kind = (one.kernel, one.variant, one.head_dim, one.target)
        limit = max(usual, SPILL_LIMIT_BYTES_OF.get(kind, 0)) if one.table == "default" else usual
        assert one.spilled_bytes <= limit, one
        used = set(one.matrix.split())
        assert used and used <= MATRIX_INSTRUCTIONS[one.target], one


def test_main_configuration_spills_nothing(report):
    main = [
        one
        for one in report.compiled
        if (one.table, one.head_dim) == ("default", 64) and one.dtype != "float32" and not one.split
    ]
    assert {one.kernel for one in main} == {"forward", "grad_query", "grad_key_value"}
    assert all(one.spilled_bytes == 0 for one in main if not (TRITON_36 and one.target in OLDER_THAN_SM_90))
    assert all("wgmma" in one.matrix for one in main if one.target == "sm_90")
    assert all("tcgen05" in one.matrix for one in main if one.target == "sm_100")


def test_a_record_is_read_as_it_was_written(report, tmp_path):
    changed = Record(report.sources, [replace(one, matrix="") for one in report.compiled[:3]])
    write_record(changed, tmp_path / "some.csv")
    assert read_record(tmp_path / "some.csv") == changed


def test_what_other_sources_gave_is_not_known(report):
    assert len(report.known(report.sources)) > 50
    assert report.known(dict.fromkeys(report.sources, "another")) == {}
