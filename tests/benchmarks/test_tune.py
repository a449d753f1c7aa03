"""The search for configurations, in Triton's interpreter and with a timer that is told what to find."""

import json
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tune
from benchmarks.attention_workloads import Workload
from benchmarks.timing import HostTimer
from benchmarks.tuning import compiling, sweep
from benchmarks.tuning.bench import Bench, Layouts
from benchmarks.tuning.candidates import neighbours
from benchmarks.tuning.compiling import recorded
from benchmarks.tuning.problems import TuningProblem
from benchmarks.tuning.search import BETTER, Search
from benchmarks.tuning.sweep import Sweep
from benchmarks.tuning.table import TableFile, line, print_outcomes
from benchmarks.verdicts import Wrong
from sparse_attn.kernels import configuration, launch
from sparse_attn.kernels.configuration import BlockConfig, KernelConfig, Problem, read_table
from tests.helpers import CUDA

CPU = torch.device("cpu")
SHARED_LIMIT = 232448
GOOD = KernelConfig(rows=16, columns=32, num_warps=2, num_stages=2)
OTHER = KernelConfig(rows=32, columns=16, num_warps=2, num_stages=3, split=True)
HELD = KernelConfig(rows=16, columns=16, num_warps=2, num_stages=1, held=64)
interpreted = pytest.mark.skipif(CUDA, reason="Triton's interpreter is not chosen where there is a GPU")


class NoCompiler:
    """Leaves compiling to the first run: in Triton's interpreter there is nothing to compile."""

    processes = 1

    def request(self, launches):
        pass

    def outcome(self, launched):
        return ""

    def wait(self, seconds):
        time.sleep(seconds)


def tiny_masks(granularity: str, device: torch.device) -> torch.Tensor:
    keep = torch.rand(3, 2, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    keep[..., 7] = keep[..., 9, :] = True  # something to split, transposed or not
    keep |= torch.eye(40, dtype=torch.bool)
    return keep.to(device)


TINY = Workload("tiny", 1, 2, 40, 16, tiny_masks)


def tiny_problem(kernel: str = "forward", **fields) -> TuningProblem:
    return TuningProblem(kernel, TINY, "element", head_dim=16, **{"dtype": torch.float32, **fields})


def sweep_of(times: dict, first=(GOOD, OTHER), clock=None, compiler=None, log=None) -> Sweep:
    """A sweep whose timer takes milliseconds from `times`, 1 where they say nothing."""
    layouts = Layouts(CPU)

    def measure(calls, seconds):
        if log is not None:
            log.append([call.args[0] for call in calls])
        for call in calls:
            call()
        return [times.get(call.args[0], 1.0) for call in calls]

    more = {} if clock is None else {"clock": clock}
    return Sweep(
        lambda problem: Bench(problem, CPU, layouts.of(problem)),
        compiler or NoCompiler(), measure, SHARED_LIMIT, first, **more,
    )  # fmt: skip


@interpreted
@pytest.mark.parametrize("kernel", ["forward", "rounded", "grad_query", "grad_key_value"])
def test_the_fastest_right_configuration_wins(kernel, tmp_path, monkeypatch, capsys):
    """Every kernel runs with every candidate; what is fastest gets into the table that `choose` reads."""
    bits = 3 if kernel == "rounded" else None
    problem = tiny_problem("forward" if bits else kernel, bits=bits)
    log = []
    (tuned,) = sweep_of({OTHER: 0.5, GOOD: 0.7}, log=log).run([problem], 100.0)
    found = tuned.found
    assert (found.winner, found.milliseconds, found.default_milliseconds) == (OTHER, 0.5, 1.0)
    assert found.runner_up == (GOOD, 0.7) and found.tried == 3 and found.failed == {}
    assert log[-1] == [OTHER, GOOD, tuned.default]  # once more, in turns, the default among them

    path = tmp_path / "table.json"
    TableFile(path, "cpu", "").add(tuned)
    ((key, config),) = read_table(path).entries
    assert (key, config) == (tuned.problem, OTHER)
    assert (key.kernel, key.rounded, key.head_dim, key.element_bytes, key.key_len) == (
        problem.kernel, bits is not None, 16, 4, 40,
    )  # fmt: skip
    layouts = Layouts(CPU).of(problem)
    assert key.spread == pytest.approx(sum(one.work(64) for one in layouts) / sum(one.work(16) for one in layouts))
    entry = json.loads(path.read_text())["entries"][0]
    assert (entry["p50_ms"], entry["default_p50_ms"], entry["layers"]) == (0.5, 1.0, len(layouts))
    assert entry["runner_up"]["p50_ms"] == 0.7 and entry["tuned_on"] == problem.name
    monkeypatch.setattr(configuration, "_used", {})
    configuration.use_table(read_table(path))
    assert configuration.choose(replace(key, key_len=50, spread=1.5, head_dim=10), CPU) == OTHER
    print_outcomes([tuned])
    assert "2.00x" in capsys.readouterr().out and "32 x 16, 2 warps, 3 stages, split" in line(tuned)


@interpreted
@pytest.mark.parametrize("mistake", ["wrong", "incomplete", "changing", "failing"])
def test_candidates_that_compute_something_else_are_dropped(mistake, monkeypatch):
    forward, runs = launch.forward, []

    def broken(call, output, lse, lists, config):
        forward(call, output, lse, lists, config)
        if config == OTHER:
            runs.append(config)
            if mistake == "failing":
                raise MemoryError("no room")
            # The first four runs check it: both layers, before and after the timer ran it.
            if mistake != "changing" or len(runs) > 2:
                output[0, 1, 5:9] = float("nan") if mistake == "incomplete" else 0.0

    monkeypatch.setattr(launch, "forward", broken)
    (tuned,) = sweep_of({OTHER: 0.1, GOOD: 0.7}).run([tiny_problem()], 100.0)
    assert tuned.found.winner == GOOD and tuned.found.tried == 2
    assert tuned.found.failed == {"MemoryError" if mistake == "failing" else "wrong": 1}


@interpreted
def test_a_wrong_default_ends_a_problem_and_not_the_others(monkeypatch):
    query = launch.backward_query

    def broken(call, output, lse, delta, grad_output, grad_query, *rest):
        query(call, output, lse, delta, grad_output, grad_query, *rest)
        grad_query.mul_(1.1)

    monkeypatch.setattr(launch, "backward_query", broken)
    wrong, right = sweep_of({GOOD: 0.1}).run([tiny_problem("grad_query"), tiny_problem()], 100.0)
    assert wrong.found is None and "wrong" in wrong.reason and "default configuration" in wrong.reason
    assert right.found.winner == GOOD


@interpreted
def test_a_default_that_is_hardly_slower_stays():
    (tuned,) = sweep_of({GOOD: BETTER + 0.005, OTHER: 1.2}).run([tiny_problem()], 100.0)
    assert tuned.found.winner == tuned.default and tuned.found.milliseconds == 1.0
    assert tuned.found.runner_up == (GOOD, BETTER + 0.005)


@interpreted
def test_time_is_kept_and_what_does_not_compile_is_counted():
    """A look at the clock takes a second: the first problem ends before its last candidate, for the second there is no
    time at all."""
    ticks = iter(range(10**6))
    problems = [tiny_problem(share=9), tiny_problem()]
    (tuned,) = sweep_of({}, clock=lambda: float(next(ticks))).run(problems, 12.0)
    assert tuned.found.tried == 2

    class Refusing(NoCompiler):
        def outcome(self, launched):
            return "OutOfResources: shared memory" if dict(launched[2])["COLUMNS"] == OTHER.columns else ""

    (tuned,) = sweep_of({}, compiler=Refusing()).run([tiny_problem()], 100.0)
    assert tuned.found.failed == {"OutOfResources": 1} and tuned.found.tried == 2


@interpreted
def test_a_recorded_launch_says_what_is_compiled():
    problem = tiny_problem(dtype=torch.float16)
    bench = Bench(problem, CPU, Layouts(CPU).of(problem))
    (launched,) = recorded(bench.caller(HELD))
    name, arguments, constants = launched
    assert name == "forward_kernel" and arguments[:4] == (torch.float16,) * 4 and torch.int32 in arguments
    assert {"HELD": 64, "ROWS": 16, "num_warps": 2}.items() <= dict(constants).items()
    assert all(isinstance(value, (int, float, torch.dtype)) for value in arguments)
    hash(launched)
    with pytest.raises(Wrong):  # nothing was run
        bench.prepare()
        bench.check(GOOD)
        recorded(bench.caller(GOOD))
        for layer in bench._layers:
            layer.output.zero_()
        bench.compare()


def test_a_table_keeps_other_entries_and_refuses_other_devices(tmp_path):
    class Outcome:
        tuned, layers, default = tiny_problem(), 1, GOOD
        problem = Problem("forward", False, 16, 4, 40, 2.0)
        found = Search(GOOD, [], neighbours, lambda config: None, 5).found({GOOD: 1.0})

    path = tmp_path / "some-gpu.json"
    TableFile(path, "Some GPU", "sm_90").add(Outcome)
    second = Outcome()
    second.problem = replace(Outcome.problem, spread=1.0)
    again = TableFile(path, "Some GPU", "sm_90")
    again.add(second)
    second.found = replace(Outcome.found, winner=OTHER)
    again.add(second)
    assert read_table(path).entries == ((Outcome.problem, GOOD), (second.problem, OTHER))
    assert [item.name for item in tmp_path.iterdir()] == ["some-gpu.json"]
    native = BlockConfig(4, 2, faster=True)
    again.add_native(Outcome.problem, BlockConfig(12), 2.0, 1.0, "squad384")
    TableFile(path, "Some GPU", "sm_90").add_native(Outcome.problem, native, 1.0, 2.0, "squad384")
    assert read_table(path).native == ((Outcome.problem, native),) and len(read_table(path).entries) == 2
    assert read_table(path).architecture == "sm_90"
    with pytest.raises(ValueError, match="holds the table of Some GPU, this is Another"):
        TableFile(path, "Another", "sm_90")


class FakePool(NoCompiler):
    """Stands in for processes that compile."""

    def __init__(self, processes: int):
        self.processes = processes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_until_started(self, seconds: float):
        pass


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """The command's GPU is the CPU, and searches are short."""
    monkeypatch.setattr(tune, "_gpu", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED_LIMIT)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(compiling, "CompilePool", FakePool)
    monkeypatch.setattr(sweep, "device_measure", lambda device: partial(sweep.measured, HostTimer()))
    monkeypatch.setattr(sweep, "GRID_MOST", 2)
    monkeypatch.setattr(sweep, "FINAL_SECONDS", 0.002)


@interpreted
def test_the_command_writes_a_table(cpu_as_gpu, monkeypatch, tmp_path, capsys):
    """From end to end, on the CPU in the place of a GPU."""
    monkeypatch.setattr(tune, "chosen_problems", lambda patterns: [tiny_problem("grad_query")])
    path = tmp_path / "table.json"
    assert tune.main(["--minutes", "2", "--output", str(path)]) == 0
    table = read_table(path)
    assert table.device == "Some GPU" and [key.kernel for key, _ in table.entries] == ["grad_query"]
    printed = capsys.readouterr()
    assert "entries written: 1" in printed.out and "1 of 1" in printed.err
    assert tune.main(["--minutes", "0.05", "--output", str(path)]) == 1  # less than what the last steps take
    assert "not tuned: 1 of 1 problems" in capsys.readouterr().out
    assert read_table(path) == table


@interpreted
@pytest.mark.parametrize("breaks", ["a candidate", "the default"])
def test_a_new_process_goes_on_where_the_gpu_is_lost(breaks, cpu_as_gpu, monkeypatch, tmp_path):
    """The new process is this one, called again: it tunes what is left, without what broke the GPU."""
    problems = {problem.name: problem for problem in (tiny_problem("forward"), tiny_problem("grad_query"))}
    first, second = problems
    default = configuration.default_table().nearest(Problem("forward", False, 16, 4, 40, 2.0))
    forward, broken, gpu, begun_again = launch.forward, [], {"lost": False}, []

    def breaking(call, output, lse, lists, config):
        run = not isinstance(launch.forward_kernel, compiling._Recorder)
        if run and not broken and (config == default) == (breaks == "the default"):
            broken.append(config)
            gpu["lost"] = True
            raise RuntimeError("illegal memory access")
        forward(call, output, lse, lists, config)

    def synchronize():
        if gpu["lost"]:
            raise RuntimeError("lost")

    def execute(program, words):
        gpu["lost"] = False
        begun_again.append(words[words.index("--problems") + 1])
        assert words[1:3] == ["-m", "benchmarks.tune"] and tune.main(words[3:]) == 0
        raise SystemExit(0)

    monkeypatch.setattr(tune, "chosen_problems", lambda names: [problems[name] for name in names or problems])
    monkeypatch.setattr(launch, "forward", breaking)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(tune.os, "execv", execute)
    path = tmp_path / "table.json"
    with pytest.raises(SystemExit) as ended:
        tune.main(["--minutes", "2", "--output", str(path), "--processes", "1"])
    assert ended.value.code == 0 and len(broken) == 1
    content, table = json.loads(path.read_text()), read_table(path)
    if breaks == "the default":
        assert begun_again == [second] and [entry["tuned_on"] for entry in content["entries"]] == [second]
        assert "broken" not in content
    else:
        assert begun_again == [f"{first},{second}"] and len(table.entries) == 2
        (noted,) = content["broken"]
        assert "illegal memory access" in noted["reason"] and KernelConfig(**_part(noted, KernelConfig)) == broken[0]
        kept = TableFile(path, "Some GPU", "sm_90")
        assert kept.broke(table.entries[0][0], broken[0]) and not kept.broke(table.entries[0][0], default)
        assert not kept.broke(replace(table.entries[0][0], head_dim=32), broken[0])


def _part(noted: dict, fields: type) -> dict:
    return {name: noted[name] for name in fields.__dataclass_fields__}


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_there_is_one_line(capsys):
    assert tune.main(["--minutes", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("benchmarks.tune: error: no GPU is available") and printed.err.count("\n") == 1
    assert not printed.out
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--minutes", "0"])
    assert stopped.value.code == 2
