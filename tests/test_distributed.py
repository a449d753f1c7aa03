"""Two real processes over gloo, started the way users start them: they get what one process gets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sparse_attn import collect_averages, collect_probabilities
from sparse_attn.distributed import agree, rank_and_world, share_of, sums_over_processes
from sparse_attn.squad import best_answers, exact_match_and_f1
from sparse_attn.squad.evaluation import predict
from tests import distributed_work as work

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Per process: the tensors and the error messages that it wrote."""
    out = tmp_path_factory.mktemp("processes")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "tests" / "distributed_work.py"), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "predicting" not in done.stderr and "collecting" not in done.stderr
    results = []
    for rank in range(2):
        with safe_open(out / f"{rank}.safetensors", framework="pt") as file:
            results.append(({name: file.get_tensor(name) for name in file.keys()}, file.metadata()))
    return results


@pytest.mark.parametrize(("name", "count", "side"), [("shared", 5, 31), ("single", 1, 10), ("own", 5, 40)])
def test_averages_are_those_of_one_process(processes, name, count, side):
    """Five batches on two processes, a single one that leaves a process nothing, and shares that a caller made."""
    batches = work.batches(count)
    expected = collect_averages(work.model(), batches, max_length=40 if name == "own" else None, progress=False)
    assert expected.counts.shape == (side, side)
    for tensors, _ in processes:
        torch.testing.assert_close(tensors[f"{name}.sums"], expected.sums, atol=1e-6, rtol=1e-6)
        assert torch.equal(tensors[f"{name}.counts"], expected.counts)
        assert tensors[f"{name}.seen"].tolist() == [expected.sequences, expected.tokens]
    assert torch.equal(processes[0][0][f"{name}.sums"], processes[1][0][f"{name}.sums"])


def test_probabilities_are_counted_as_in_one_process(processes):
    expected = collect_probabilities(work.model(), work.batches(5), work.mask(), progress=False)
    for tensors, _ in processes:
        assert torch.equal(tensors["histogram.counts"], expected.counts)
        torch.testing.assert_close(tensors["histogram.sums"], expected.sums, atol=0, rtol=1e-6)


def test_logits_and_scores_are_those_of_one_process(processes):
    questions, windows = work.questions(), work.windows()
    assert len(windows) > len(questions)
    starts, ends = predict(work.model(), windows, work.TOKENIZER.pad_token_id, batch_size=3, progress=False)
    lengths = [len(window.input_ids) for window in windows]
    assert [len(row) for row in starts] == [len(row) for row in ends] == lengths
    expected = exact_match_and_f1(best_answers(questions, windows, starts, ends), questions)
    for tensors, _ in processes:
        torch.testing.assert_close(tensors["starts"], torch.cat(starts), atol=1e-6, rtol=0)
        torch.testing.assert_close(tensors["ends"], torch.cat(ends), atol=1e-6, rtol=0)
        answers = best_answers(questions, windows, tensors["starts"].split(lengths), tensors["ends"].split(lengths))
        assert exact_match_and_f1(answers, questions) == expected


def test_a_failure_reaches_every_process(processes):
    """Nobody is left waiting, and the error keeps its type where it happened."""
    (_, first), (_, second) = processes
    for call in ("disk", "batch"):
        assert second[call] == "OSError: the disk is gone"
        assert first[call] == "RuntimeError: another process failed; its own message says why"
    for messages in (first, second):
        assert messages["empty"].startswith("ValueError: there was no batch")
    assert first["long"] == "ValueError: a window has 24 tokens, more than pad_to (20); raise pad_to"
    assert second["long"].startswith("RuntimeError: another process failed")


def test_fine_tuning_gives_both_processes_the_same_weights(processes):
    (first, _), (second, _) = processes
    assert torch.equal(first["weights"], second["weights"])
    before = torch.cat([parameter.detach().flatten() for parameter in work.model().parameters()])
    assert (first["weights"] - before).abs().max() > 1e-3
    assert first["losses"][-1] < first["losses"][0]


def test_one_process_is_the_plain_case():
    assert rank_and_world() == (0, 1)
    assert list(share_of(range(5))) == list(range(5))
    tensor = torch.ones(2)
    assert sums_over_processes([tensor])[0] is tensor
    assert agree(7) == 7
    with pytest.raises(KeyError, match="mine"):
        agree(7, KeyError("mine"))


def test_logits_follow_the_windows_whatever_the_batches():
    windows, model, pad = work.windows(), work.model().train(), work.TOKENIZER.pad_token_id
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    expected = predict(model, windows, pad, progress=False)
    order = list(range(len(windows)))[::-1]
    batches = [order[first : first + 5] for first in range(0, len(order), 5)]
    found = predict(model, windows, pad, batches=iter(batches), pad_to=30, progress=False)
    for rows, expected_rows in zip(found, expected, strict=True):
        for row, expected_row in zip(rows, expected_rows, strict=True):
            torch.testing.assert_close(row, expected_row, atol=1e-5, rtol=0)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match=f"each of the {len(windows)} windows once"):
        predict(model, windows, pad, batches=batches[1:], progress=False)
    with pytest.raises(ValueError, match="no windows to predict"):
        predict(model, [], pad, progress=False)


def test_a_model_predicts_from_what_it_takes():
    model, windows, seen = work.model(), work.windows()[:5], []
    names, quiet = ("input_ids", "attention_mask"), {"progress": False}

    def note(module, args, kwargs):
        seen.append({name: tuple(tensor.shape) for name, tensor in kwargs.items()})

    model.register_forward_pre_hook(note, with_kwargs=True)
    predict(model, windows, work.TOKENIZER.pad_token_id, batch_size=2, pad_to=30, input_names=names, **quiet)
    assert seen == [dict.fromkeys(names, (rows, 30)) for rows in (2, 2, 1)]
    with pytest.raises(ValueError, match="input_names holds 'tokens'"):
        predict(model, windows, work.TOKENIZER.pad_token_id, input_names=("tokens",), **quiet)
