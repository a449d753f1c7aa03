"""Which kernel is faster, measured by a timer that says so."""

import pytest
import torch

from benchmarks import tune_native
from benchmarks.attention_workloads import Workload
from benchmarks.tuning.bench import Layouts
from benchmarks.tuning.problems import TuningProblem
from benchmarks.tuning.table import TableFile
from benchmarks.verdicts import Wrong
from sparse_attn.backends import native_cuda
from sparse_attn.kernels.configuration import BlockConfig, read_table
from tests.helpers import CUDA

pytestmark = pytest.mark.xdist_group("cuda")


@pytest.fixture
def place(device) -> torch.device:
    if CUDA and device == "cpu":
        pytest.skip("with a GPU, the Triton kernels that this compares with run there alone")
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def masks(granularity: str, device: torch.device) -> torch.Tensor:
    keep = torch.rand(2, 2, 48, 48, generator=torch.Generator().manual_seed(0)) < 0.3
    return keep.to(device)


@pytest.mark.parametrize(("native", "triton", "faster"), [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.01, False)])
def test_the_best_cut_and_whether_it_is_faster(place, tmp_path, monkeypatch, native, triton, faster):
    path = tmp_path / "table.json"
    problem = TuningProblem("forward", Workload("tiny", 1, 2, 48, 32, masks), "element", head_dim=32, bits=3)
    times = iter([[3.0, 1.5, *[2.0] * (len(tune_native.CONFIGS) - 2)], [native, triton]])

    def measure(calls, seconds):
        for call in calls:
            call()
        return next(times)

    line = tune_native.tune_forward(problem, Layouts(place), measure, TableFile(path, "Some GPU", "sm_90"), place)
    assert line == f"native {1e3 * native:.1f} us (12 warps, 1 parts), Triton {1e3 * triton:.1f} us"
    ((known, config),) = read_table(path).native
    assert config == BlockConfig(12, 1, faster) and (known.rounded, known.head_dim, known.key_len) == (True, 32, 48)


def test_training_is_measured_apart(place, tmp_path):
    problem = TuningProblem("forward", Workload("tiny", 1, 2, 48, 32, masks), "element", head_dim=32)
    times = iter([[2.0, 1.0, 3.0], [1.0, 2.0]])

    def measure(calls, seconds):
        for call in calls:
            call()
        return next(times)

    table = TableFile(tmp_path / "table.json", "Some GPU", "sm_90")
    line = tune_native.tune_training(problem, Layouts(place), measure, table, place)
    best = tune_native.BACKWARD_CONFIGS[1]
    assert line == f"native 1000.0 us ({best.warps} warps, {best.parts} parts), Triton 2000.0 us"
    ((known, config),) = read_table(tmp_path / "table.json").native
    assert known.kernel == "backward" and config == BlockConfig(best.warps, best.parts, True)


def test_wrong_results_are_not_timed(place, tmp_path, monkeypatch):
    forward = native_cuda.forward
    monkeypatch.setattr(native_cuda, "forward", lambda call: (2 * forward(call)[0], None))
    problem = TuningProblem("forward", Workload("tiny", 1, 2, 48, 32, masks), "element", head_dim=32)
    table = TableFile(tmp_path / "table.json", "Some GPU", "sm_90")
    with pytest.raises(Wrong, match="the Triton kernel's"):
        tune_native.tune_forward(problem, Layouts(place), None, table, place)


def test_problems_are_what_the_kernel_computes():
    names = [problem.name for problem in tune_native.native_problems()]
    assert "forward-squad384-element-64-float16" in names and "forward-3bits-squad384-tile-64-float16" in names
    assert not any("long" in name or "float32" in name or "-128-" in name for name in names)


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_there_is_one_line(capsys):
    assert tune_native.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.tune_native: error: no GPU is available") and error.count("\n") == 1


def test_a_cut_that_fails_leaves_the_others(capsys):
    good, bad = tune_native.CONFIGS[:2]

    def caller(config):
        if config == bad:
            raise RuntimeError("too many resources requested for launch")
        return lambda: config

    def check(output):
        if output != good:
            raise Wrong("is off")

    assert list(tune_native._right(tune_native.CONFIGS, caller, check)) == [good]
    said = capsys.readouterr().err
    assert "too many resources" in said and said.count("is off") == len(tune_native.CONFIGS) - 2
    with pytest.raises(RuntimeError, match="too many resources"):
        tune_native._right([bad], caller, check)
