"""Steps in time slots, and the commands of the suite."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_steps, gpu_suite, random_check
from benchmarks.gpu_steps import FAILED, LOG, OK, OUT_OF_TIME, SKIPPED, SUMMARY, Outcome, Step, run_step, run_steps
from tests.helpers import CUDA

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *words)


def test_a_failing_step_stops_no_other(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.json"
    steps = [
        Step("bad", python("import sys; print('it broke'); sys.exit(3)")),
        Step("absent", ("/no/such/program",)),
        Step("later", python("print('never')"), skipped="no model"),
        Step(
            "good",
            python("import os, sys; open(sys.argv[1], 'w').write('{}'); print(os.environ['SOME'])", str(kept)),
            environment={"SOME": "thing"},
            copies=((kept, tmp_path / "copy.json"),),
        ),
    ]
    monkeypatch.setattr(gpu_suite, "_gpu_name", lambda: "Some GPU")
    monkeypatch.setattr(gpu_suite, "make_steps", lambda *_: steps)
    folder = tmp_path / "results"
    assert gpu_suite.main(["--minutes", "1", "--output", str(folder)]) == 1

    summary = json.loads((folder / SUMMARY).read_text())
    assert (summary["device"], summary["minutes"]) == ("Some GPU", 1.0)
    assert {"commit", "date", "versions", "seconds"} <= summary.keys()
    bad, absent, later, good = summary["steps"]
    assert (bad["status"], bad["exit_status"], bad["last_lines"]) == (FAILED, 3, ["it broke"])
    assert absent["status"] == FAILED and "/no/such/program" in absent["reason"]
    assert (later["status"], later["reason"], later["seconds"]) == (SKIPPED, "no model", 0.0)
    assert (good["status"], good["exit_status"], good["last_lines"]) == (OK, 0, ["thing"])
    assert good["command"].startswith("python -c") and good["slot_seconds"] > bad["slot_seconds"] > 10
    assert (tmp_path / "copy.json").read_text() == "{}" and len(good["copied"]) == 1
    log = (folder / LOG).read_text()
    assert log.index("===== bad") < log.index("it broke") < log.index("===== good") and "never" not in log
    assert sorted(path.name for path in folder.iterdir()) == [LOG, SUMMARY]
    printed = capsys.readouterr().out
    assert "it broke" in printed and "exit status 3" in printed and "no model" in printed


def ends_soon(stat: Path) -> bool:
    """Whether a process ends within some seconds: a killed one that nobody waits for takes a moment."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("background", [False, True])
def test_a_slow_step_is_interrupted_with_what_it_started_and_its_copies_are_kept(tmp_path, background):
    """Also where interrupts are ignored, as by what a shell starts in its background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    try:
        check_a_slow_step(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def check_a_slow_step(tmp_path):
    code = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("started", sys.argv[2], sys.argv[3], flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("tidied up", flush=True)
    raise
"""
    pid, copy = tmp_path / "pid", tmp_path / "copy"
    step = Step("slow", python(code, str(pid), "{seconds}", "{minutes}"), copies=((pid, copy),))
    start = time.monotonic()
    outcome = run_step(step, 6.0, tmp_path / LOG, stop_seconds=4.0)
    assert time.monotonic() - start < 10
    assert outcome.status == OUT_OF_TIME and outcome.reason == "stopped after 3 s"
    text = "\n".join(outcome.last_lines)
    assert "started 1.5 0.025" in (tmp_path / LOG).read_text() and "KeyboardInterrupt" in text
    assert "tidied up" in (tmp_path / LOG).read_text()
    assert ends_soon(Path(f"/proc/{copy.read_text()}/stat"))


def test_a_file_of_an_earlier_run_is_none_of_this_one(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("{}")
    copies = tuple((source, source.with_suffix(".copy")) for source in (old, new))
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{}'); sys.exit(1)"
    outcome = run_step(Step("fails", python(write, str(new)), copies=copies), 20.0, tmp_path / LOG)
    assert outcome.status == FAILED and len(outcome.copied) == 1
    assert not old.with_suffix(".copy").exists() and new.with_suffix(".copy").exists()


def test_unused_time_goes_to_later_steps(tmp_path):
    steps = [Step("first", python("pass")), Step("second", python("pass"), share=3)]
    first, second = run_steps(steps, 40.0, tmp_path)
    assert first.slot_seconds == pytest.approx(10, abs=0.1)
    assert second.slot_seconds == pytest.approx(40 - first.seconds, abs=0.5)
    (late,) = run_steps(steps[:1], 0.5, tmp_path)
    assert (late.status, late.reason) == (SKIPPED, "0 s were left")


def slots(steps, seconds, monkeypatch, used=1.0):
    """The slots of steps that take `used` of theirs, without running anything."""
    now = [0.0]
    monkeypatch.setattr(gpu_steps.time, "monotonic", lambda: now[0])

    def run(step, slot, log):
        now[0] += used * slot
        return Outcome(step.name, OK, slot_seconds=slot)

    monkeypatch.setattr(gpu_steps, "run_step", run)
    return [outcome.slot_seconds for outcome in run_steps(steps, seconds, Path())]


def test_steps_get_their_least_before_shares_are_dealt_out(monkeypatch):
    def step(share, least):
        return Step("step", (), share=share, least=least)

    assert slots([step(1, 60), step(9, 0)], 100, monkeypatch) == [60, 40], "more than its share"
    assert slots([step(9, 0), step(1, 60)], 100, monkeypatch) == [40, 60], "a share leaves later steps theirs"
    assert slots([step(9, 10), step(1, 10)], 100, monkeypatch) == [90, 10], "shares where they are enough"
    assert slots([step(1, 60), step(1, 60)], 100, monkeypatch) == [60, 40], "the last one gets what is left"
    assert slots([step(1, 60), step(1, 60)], 50, monkeypatch)[0] == 50
    assert slots([step(1, 60), step(1, 60)], 100, monkeypatch, used=0.5) == [60, 70]
    skipped = Step("skipped", (), least=90, skipped="no GPU")
    assert slots([step(1, 0), skipped], 100, monkeypatch) == [100, 0]


def test_the_commands_of_the_suite_exist(tmp_path, monkeypatch):
    """Every module is there and takes the options that it gets."""
    from benchmarks import attention, counters, long, tune, tune_native
    from benchmarks.squad.options import parse_options as squad_options

    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: f"/some/{name}")
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: name)
    parsers = {"tune": tune, "tune_native": tune_native, "attention": attention, "random_check": random_check}
    parsers |= {"long": long, "counters": counters}
    options = gpu_suite.parse_options(["--output", str(tmp_path), "--model", "some/model"])
    usual = gpu_suite.make_steps(options, "Some GPU")
    assert [step.name for step in usual] == list(gpu_suite.USUAL)
    options.steps = []
    with pytest.raises(ValueError, match="--steps"):
        gpu_suite.make_steps(options, "Some GPU")
    options.steps = ["all"]
    steps = gpu_suite.make_steps(options, "Some GPU")
    assert [step.name for step in steps] == list(gpu_suite.NAMES) and not any(step.skipped for step in steps)
    assert all(step.least >= 40 for step in steps)
    assert sum(step.least for step in usual) < 60 * 9.5, "of ten minutes, and its start"
    commands = {step.name: step.command for step in steps}
    assert commands["build"][1] == "setup.py" and commands["tests"][2] == "pytest"
    for step in steps:
        command = step.command[step.command.index(sys.executable) :]
        if not command[2].startswith("benchmarks."):
            continue
        module = command[2].removeprefix("benchmarks.")
        words = [word if not word.startswith("{") else "1.5" for word in command[3:]]
        parse = parsers[module].parse_options if module in parsers else squad_options
        assert parse(words) is not None
    assert all((ROOT / path).exists() for path in gpu_suite._IGNORED_TESTS)
    assert steps[2].copies == steps[3].copies and steps[2].copies[0][0] == tmp_path / "some-gpu.json"
    for step in steps:
        if step.name.startswith("squad"):
            assert step.command[step.command.index("--output") + 1] == str(tmp_path / step.name)
            assert step.copies == ((tmp_path / step.name / "results.json", tmp_path / f"{step.name}.json"),)
    options.steps = ["squad", "tests"]
    assert [step.name for step in gpu_suite.make_steps(options, "Some GPU")] == ["tests", "squad"]


def test_tuning_goes_on_from_the_table_of_the_gpu(tmp_path, monkeypatch):
    """Entries that there is no time for stay; a table of an earlier run in the same folder comes first."""
    table = tmp_path / "some-gpu.json"
    monkeypatch.setattr(gpu_suite, "TABLES", tmp_path / "package")
    gpu_suite._begin_table(table)
    assert not table.exists()
    gpu_suite.TABLES.mkdir()
    (gpu_suite.TABLES / table.name).write_text("known")
    gpu_suite._begin_table(table)
    assert table.read_text() == "known"
    table.write_text("tuned since")
    gpu_suite._begin_table(table)
    assert table.read_text() == "tuned since"


@pytest.mark.parametrize("bad", [["--data", "absent.json"], ["--model", "./absent"]])
def test_what_the_last_steps_want_is_looked_at_first(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "_gpu_name", lambda: "Some GPU")
    assert gpu_suite.main(["--output", str(tmp_path / "results"), *bad]) == 2
    assert bad[1] in capsys.readouterr().err and not (tmp_path / "results").exists()


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_there_is_one_line(tmp_path, capsys):
    assert gpu_suite.main(["--output", str(tmp_path / "results")]) == 2
    assert "gpu_suite: error: no GPU is available" in capsys.readouterr().err
    assert random_check.main(["--device", "cuda"]) == 2
    assert "random_check: error: --device cuda: no GPU is available" in capsys.readouterr().err
