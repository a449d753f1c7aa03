"""The command under torchrun: two gloo processes find what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import launched
from benchmarks.squad import __main__ as squad
from benchmarks.squad import setting
from benchmarks.squad.process import merged
from benchmarks.squad.worker import Measured

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def commands(command_line, folder):
    """A comparison of two variants, then a training."""
    comparing = ["--variants", "flash-unpadded,sparse-unpadded", "--output", str(folder / "comparing")]
    training = ["--variants", "sparse-unpadded+bits", "--output", str(folder / "training")]
    training += ["--finetune", "--epochs", "1", "--recover-epochs", "1", "--rounding-epochs", "1"]
    training += ["--batch-size", "2", "--repeats", "1", "--table", "renormalised"]
    usual = [*command_line, "--device", "cpu", "--cache", str(folder / "cache")]
    return [*usual, *comparing], [*usual, *training]


@pytest.fixture(scope="module")
def printed(commands):
    """What two processes print that run both commands."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCHER, "tests/benchmarks/launched_squad.py", json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.xdist_group("distributed")
def test_two_processes_find_the_accuracy_of_one(printed, in_process, commands, folder):
    results = folder / "comparing" / "results.json"
    shared = json.loads(results.read_text())
    results.unlink()
    assert squad.main(commands[0]) == 0
    alone = json.loads(results.read_text())
    assert (alone["processes"], shared["processes"]) == (1, 2)
    for row, other in zip(alone["rows"], shared["rows"], strict=True):
        for field in ("variant", "em", "f1", "tokens", "density"):
            assert row[field] == other[field]
        assert len(other["seconds_of_repeats"]) == 2 and other["padded_tokens"] == row["padded_tokens"]
    assert [row["variant"] for row in shared["absent"]] == ["flash-unpadded"]
    assert printed.count("\nsparse-unpadded") == 2, "only the first process prints, once a command"
    assert "2 processes share the batches" in printed
    assert len(list((folder / "comparing" / "rows").iterdir())) == 2


@pytest.mark.xdist_group("distributed")
def test_two_processes_train_one_checkpoint(printed, folder):
    names = sorted(path.name.split("-")[0] for path in (folder / "cache" / "squad").iterdir())
    assert names == ["dense", "rounded", "sparse"]
    (row,) = json.loads((folder / "training" / "results.json").read_text())["rows"]
    assert row["checkpoint"].startswith("rounded-") and row["table"] == "renormalised"


def test_more_processes_than_batches_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(setting, "rank_and_world", lambda: (0, 2))
    assert squad.main([*arguments, "--batch-size", "100", "--device", "cpu"]) != 0
    assert "benchmarks.squad: error: 12 windows make 1 batch for 2 processes" in capsys.readouterr().err


def test_what_processes_find_becomes_one_row():
    lengths, shares = [1, 2, 3, 1], [[0, 2], [1, 3]]
    found = [
        (Measured([1.0, 4.0], 9.0, 10.0, 100, None, 5, 1e6, "flash"), {"start": torch.tensor([0.0, 20, 21, 22])}),
        (Measured([2.0, 3.0], 8.0, 11.0, 300, 7, 6, 2e6, "flash"), {"start": torch.tensor([10.0, 11, 30])}),
    ]
    together, logits = merged(found, shares, lengths, on_gpus=True)
    assert together == Measured([2.0, 4.0], 9.0, 21.0, 300, None, 11, 3e6, "flash")
    assert [row.tolist() for row in logits["start"]] == [[0.0], [10.0, 11.0], [20.0, 21.0, 22.0], [30.0]]
    assert merged(found, shares, lengths, on_gpus=False)[0].joules == 11.0, "counters of a CPU know all processes"
    assert merged(found[:1], [[0, 2]], lengths, on_gpus=False)[0].joules == 10.0


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launched, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU: there are 1"), launched.launched(None):
        pass


def test_alone_it_is_first_and_all():
    assert launched.is_first() and launched.is_first_here()
    assert launched.first_of(3) == 3 and launched.of_all(3) == [3]
