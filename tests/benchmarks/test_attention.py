"""The attention command from end to end, on a tiny workload."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention
from benchmarks.attention_workloads import FORWARD
from sparse_attn import ops
from tests.benchmarks.attention_samples import packed_workload, tiny_workload

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(monkeypatch):
    """The command's workloads, made small, and a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    workloads = (tiny_workload(name="squad384", cpu_batch=2), packed_workload(cpu_batch=3), tiny_workload(name="huge"))
    monkeypatch.setattr(attention, "WORKLOADS", workloads)
    monkeypatch.setattr("benchmarks.attention_workloads.WORKLOADS", workloads)


def test_a_run_prints_tables_and_writes_json(tiny, tmp_path, capsys):
    out = tmp_path / "results" / "attention.json"
    command = ["--variants", "torch,sdpa-cpu", "--passes", FORWARD, "--seconds", "0.01", "--json", str(out)]
    assert attention.main(command) == 0
    results = json.loads(out.read_text())
    assert list(results["workloads"]) == ["squad384", "packed"]  # the huge one is for GPUs
    assert {row["variant"] for row in results["rows"]} == {"torch", "sdpa-cpu"}
    assert (results["dtype"], results["arguments"]["seed"]) == ("float32", 0)
    printed = capsys.readouterr()
    assert "packed, forward" in printed.out and "sdpa-cpu" in printed.out
    assert "squad384, forward: 4 rows" in printed.err


def test_a_wrong_result_of_the_package_itself_is_a_failure(tiny, tmp_path, monkeypatch, capsys):
    forward = ops._FORWARD["torch"]
    monkeypatch.setitem(ops._FORWARD, "torch", lambda call: (1.01 * forward(call)[0], torch.empty(0)))
    options = ["--workloads", "squad384", "--passes", FORWARD, "--variants", "torch,sdpa-cpu", "--seconds", "0.02"]
    assert attention.main([*options, "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 1
    assert "error: wrong results of torch" in capsys.readouterr().err
    results = json.loads((tmp_path / "out.json").read_text())
    assert {row["variant"] for row in results["rows"]} == {"sdpa-cpu"} and results["absent"][0]["wrong"]


def test_a_workload_that_is_asked_for_is_run(tiny, tmp_path):
    out = tmp_path / "attention.json"
    command = ["--workloads", "huge", "--variants", "sdpa-cpu", "--seconds", "0.01", "--dtype", "bfloat16"]
    assert attention.main([*command, "--masks", "dense", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert {(row["workload"], row["dtype"], row["mask"]) for row in results["rows"]} == {("huge", "bfloat16", "dense")}
    assert attention.main([*command, "--masks", "tile"]) == 1  # nothing to measure


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--device", "cuda"], "--device cuda: no GPU is available"),
        (["--device", "tpu"], "invalid choice"),
        (["--workloads", "squad385"], "--workloads squad385: expected names among squad384, packed, huge"),
        (["--passes", "backward"], "expected names among forward, forward+backward"),
        (["--variants", "sdpa-flash"], "expected names among"),
        (["--variants", ","], "expected names among"),
        (["--masks", "sparse"], "expected names among dense, element, tile"),
        (["--dtype", "float8"], "invalid choice"),
        (["--seconds", "0"], "no finite number above 0"),
        (["--budget", "soon"], "not a number"),
        (["--seed", "-1"], "expected at least 0"),
        (["--json", str(ROOT)], "cannot be written"),
        (["--json", f"{__file__}/out.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tiny, capsys, bad, message):
    try:
        status = attention.main(bad)
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("benchmarks.attention: error: ") and message in error and error.count("\n") == 1


def test_pytest_benchmark_gets_checked_cases(tiny):
    parametrized = {}
    asked = SimpleNamespace(
        fixturenames=["benchmark", "benchmarked"],
        parametrize=lambda name, cases, ids: parametrized.update({name: dict(zip(ids, cases, strict=True))}),
    )
    attention.pytest_generate_tests(asked)
    cases = parametrized["benchmarked"]
    assert {"torch-element-no-bits", "torch-tile-no-bits", "sdpa-cpu-dense-no-bits"} <= cases.keys()
    assert not any(name.startswith(("flex", "sdpa-nested")) for name in cases)
    ran = []
    benchmark = SimpleNamespace(extra_info={}, group=None)
    attention.test_attention(
        type("Benchmark", (), {"__call__": lambda self, call: ran.append(call()), **vars(benchmark)})(),
        cases["torch-tile-no-bits"],
    )
    assert len(ran) == 1
