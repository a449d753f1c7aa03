"""The command from end to end."""

import errno
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from benchmarks.squad import __main__ as squad
from benchmarks.squad import checkpoints, process, shapes
from benchmarks.squad import data as squad_data
from benchmarks.squad import rows as squad_rows
from benchmarks.squad.models import make_models
from benchmarks.squad.options import parse_options
from benchmarks.squad.rows import Outcome
from benchmarks.squad.setting import read_setting
from benchmarks.squad.table import mask_text, measured_lines
from sparse_attn import GlobalMask

ROOT = Path(__file__).resolve().parents[2]


FIRST_ROWS = "eager-padded,sdpa-unpadded,sparse-unpadded"


def results_of(tmp_path):
    return json.loads((tmp_path / "results" / "results.json").read_text())


def test_a_row_is_measured_in_a_process_of_its_own(arguments, tmp_path):
    command = [*arguments, "--variants", "sparse-unpadded+bits", "--repeats", "1"]
    assert squad.main(command) == 0
    (row,) = results_of(tmp_path)["rows"]
    assert (row["variant"], row["bits"], row["table"]) == ("sparse-unpadded", 3, "published") and row["seconds"] > 0


def test_a_run_prints_the_table_and_writes_its_files(in_process, arguments, tmp_path, capsys):
    rows = ["--variants", FIRST_ROWS + ",flash-unpadded", "--bits", "none", "--sparsity", "0.5", "--device", "cpu"]
    assert squad.main([*arguments, *rows]) == 0

    results = results_of(tmp_path)
    dense, packed, sparse = results["rows"]
    assert (dense["variant"], dense["mask"], dense["sparsity"], dense["bits"]) == ("eager-padded", None, 0.0, None)
    assert (sparse["variant"], sparse["mask"], sparse["bits"]) == ("sparse-unpadded", "element 0.5", None)
    assert (sparse["sparsity"], sparse["granularity"]) == (0.5, "element") and 0 < sparse["density"] < 1
    for row in results["rows"]:
        assert 0 <= row["em"] <= row["f1"] <= 100
        assert len(row["seconds_of_repeats"]) == 2 and min(row["seconds_of_repeats"]) > 0
        assert row["tokens_per_second"] == pytest.approx(results["data"]["tokens"] / row["seconds"])
        assert row["windows_per_second"] == pytest.approx(12 / row["seconds"])
        assert row["speedup"] == pytest.approx(dense["seconds"] / row["seconds"])
        assert row["peak_memory_bytes"] >= row["loaded_memory_bytes"] > 0
        assert (row["model"], row["dtype"]) == ("tiny-answering", "float32")
        assert 0 < row["matrix_share"] < 1
    assert dense["flops"] == packed["flops"] > sparse["flops"] > 0
    assert (dense["em"], dense["f1"]) == (packed["em"], packed["f1"])
    assert dense["padded_tokens"] == 12 * 48 and packed["padded_tokens"] == results["data"]["tokens"]
    assert results["data"]["questions"] == results["data"]["windows"] == 12
    assert results["data"]["misplaced_answers"] == 0
    assert results["averages_from"] == "evaluation inputs (cities.json)"
    assert results["versions"]["torch"] == torch.__version__
    assert results["peak_memory"] in (tmp_path / "results" / "results.md").read_text()
    assert results["arguments"]["sparsity"] == 0.5
    assert {"device", "commit", "date"} <= results.keys()
    assert [(row["variant"], row["reason"]) for row in results["absent"]] == [
        ("flash-unpadded", "flash-attn needs a GPU")
    ]
    assert results["failed"] == results["sweeps"] == []

    printed = capsys.readouterr().out
    page = (tmp_path / "results" / "results.md").read_text()
    for text in (printed, page):
        for shown in (*FIRST_ROWS.split(","), "50% element", "95.41", "6.85 GB", "another model", "576"):
            assert shown in text
        assert "flash-unpadded: absent: flash-attn needs a GPU" in text
    with Image.open(tmp_path / "results" / "results.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    written = sorted(os.listdir(tmp_path / "results"))
    assert [name for name in written if name != "results.html"] == [
        "results.json", "results.md", "results.png", "rows",
    ]  # fmt: skip


def test_sweeps_have_a_row_for_each_value_and_mask_and_a_picture(in_process, arguments, tmp_path, capsys):
    sweeps = ["--sweep", "sparsity", "0,0.9", "--sweep", "bits", "none,1", "--granularity", "tile,element"]
    command = [*arguments, "--variants", "sparse-unpadded", "--sparsity", "0.9", "--repeats", "1", *sweeps]
    assert squad.main(command) == 0
    results = results_of(tmp_path)
    assert [row["granularity"] for row in results["rows"]] == ["tile", "element"]
    by_sparsity, by_bits = results["sweeps"]
    assert (by_sparsity["name"], by_bits["name"]) == ("sparsity", "bits")
    found = [(row["granularity"], row["sparsity"], row["bits"]) for row in by_sparsity["rows"]]
    assert found == [("tile", 0.0, None), ("tile", 0.9, None), ("element", 0.0, None), ("element", 0.9, None)]
    assert mask_text(by_sparsity["rows"][1]) == "66.7% tile", "tiles that hold the diagonal stay"
    found = [(row["granularity"], row["sparsity"], row["bits"]) for row in by_bits["rows"]]
    assert found == [("tile", 0.9, None), ("tile", 0.9, 1), ("element", 0.9, None), ("element", 0.9, 1)]
    # A row that the table, or another sweep, has already is not measured again.
    assert by_sparsity["rows"][1]["seconds"] == by_bits["rows"][0]["seconds"] == results["rows"][0]["seconds"]
    assert by_sparsity["rows"][0]["density"] > by_sparsity["rows"][1]["density"]
    assert len(list((tmp_path / "results" / "rows").iterdir())) == 6
    for name in ("sparsity", "bits"):
        with Image.open(tmp_path / "results" / f"results-{name}.png") as picture:
            assert picture.width > 1000
        assert f"## Sweep over {name}" in (tmp_path / "results" / "results.md").read_text()
    assert "Sweep over bits" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_where_it_was(in_process, arguments, tmp_path, monkeypatch, capsys):
    command = [*arguments, "--variants", FIRST_ROWS, "--repeats", "1"]
    original, measured = squad_rows.run_worker, in_process

    def run_worker(job, folder):
        result = original(job, folder)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(squad_rows, "run_worker", run_worker)
    assert squad.main(command) == 130
    assert "--resume" in capsys.readouterr().err
    assert [row["variant"] for row in results_of(tmp_path)["rows"]] == FIRST_ROWS.split(",")[:2], "what there was"
    assert squad.main([*command, "--resume"]) == 0
    assert measured[3:] == ["sparse-unpadded, element"]
    first = results_of(tmp_path)["rows"]
    assert [row["variant"] for row in first] == FIRST_ROWS.split(",")
    assert squad.main([*command, "--resume"]) == 0
    assert len(measured) == 4 and results_of(tmp_path)["rows"] == first
    damaged = min((tmp_path / "results" / "rows").iterdir())
    damaged.write_text("")
    assert squad.main([*command, "--resume"]) == 0
    assert "is damaged: the row is measured again" in capsys.readouterr().err and len(measured) == 5
    assert squad.main([*command, "--resume", "--variants", "sparse-unpadded", "--sparsity", "0.8"]) == 0
    assert squad.main([*command, "--resume", "--variants", "sdpa-unpadded", "--limit", "11"]) == 0
    assert len(measured) == 7, "what a row depends on has changed"


def test_a_row_that_fails_is_reported_and_the_others_are_measured(in_process, arguments, tmp_path, monkeypatch, capsys):
    original = squad_rows.run_worker

    def run_worker(job, folder):
        if job.attention == "packed":
            raise process.VariantFailed("the process that measured it was killed by signal 9")
        measured, logits = original(job, folder)
        if job.attention == "sdpa":
            logits["start"][9] = float("nan")
        return measured, logits

    monkeypatch.setattr(squad_rows, "run_worker", run_worker)
    assert squad.main([*arguments, "--variants", FIRST_ROWS + ",sdpa-sorted", "--repeats", "1"]) == 1
    captured = capsys.readouterr()
    assert "error: sdpa-unpadded: the process that measured it was killed by signal 9" in captured.err
    assert "sdpa-unpadded: failed: the process" in captured.out
    results = results_of(tmp_path)
    assert [row["variant"] for row in results["rows"]] == ["eager-padded", "sparse-unpadded"]
    failed = {row["variant"]: row["reason"] for row in results["failed"]}
    assert list(failed) == ["sdpa-sorted", "sdpa-unpadded"] and "NaN" in failed["sdpa-sorted"]


def test_a_full_disk_loses_nothing_that_is_printed(in_process, arguments, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(squad_rows.os, "replace", full)
    assert squad.main([*arguments, "--variants", "sdpa-sorted,sdpa-unpadded", "--repeats", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("No space left on device") == 2, "rows once, results once"
    assert "error: rows cannot be written" in captured.err and "error: results cannot be written to" in captured.err
    for name in ("sdpa-sorted", "sdpa-unpadded"):
        assert captured.out.count(name) == 2, "as it was measured, and in the table"
    assert not (tmp_path / "results" / "results.json").exists()


def test_a_checkpoint_that_does_not_fit_the_disk_is_one_line(arguments, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert squad.main([*arguments, "--finetune", "--epochs", "1"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "No space" in line]
    assert line.startswith("benchmarks.squad: error: the checkpoint ")


def test_batches_by_tokens_give_the_same_answers(in_process, arguments, tmp_path):
    command = [*arguments, "--variants", "sdpa-sorted", "--repeats", "1"]
    assert squad.main([*command, "--tokens-per-batch", "70"]) == 0
    by_tokens = results_of(tmp_path)
    assert squad.main(command) == 0
    by_count = results_of(tmp_path)
    assert by_tokens["rows"][0]["f1"] == by_count["rows"][0]["f1"]
    assert by_tokens["rows"][0]["padded_tokens"] < by_count["rows"][0]["padded_tokens"]
    assert by_tokens["arguments"]["tokens_per_batch"] == 70
    assert any("at most 70 tokens" in line for line in measured_lines(by_tokens))


def test_seeds_give_means_and_sweep_once(in_process, arguments, tmp_path, capsys):
    command = [*arguments, "--finetune", "--epochs", "1", "--seeds", "2", "--sweep", "bits", "1", "--repeats", "1"]
    assert squad.main([*command, "--variants", "sdpa-sorted,flash-unpadded,sparse-unpadded", "--device", "cpu"]) == 0
    ours, rounded = "sparse-unpadded, element", "sparse-unpadded, element, 1 bit"
    assert in_process == ["sdpa-sorted", "flash-unpadded", ours, rounded, "sdpa-sorted", ours]
    results = results_of(tmp_path)
    for row in results["rows"]:
        assert len(row["f1_spread"]["values"]) == 2
        assert row["f1"] == pytest.approx(sum(row["f1_spread"]["values"]) / 2)
    assert "f1_spread" not in results["sweeps"][0]["rows"][0]
    assert "±" in (tmp_path / "results" / "results.md").read_text() and "seed 1:" in capsys.readouterr().out


def test_answers_that_are_not_in_their_place_are_counted(in_process, arguments, data_file, tmp_path, capsys):
    content = json.loads(data_file.read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 3
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    command = [*arguments, "--data", str(path), "--variants", "sdpa-sorted", "--repeats", "1"]
    assert squad.main(command) == 0
    assert results_of(tmp_path)["data"]["misplaced_answers"] == 1
    assert "1 answer of the data" in capsys.readouterr().out
    assert "1 answer of the data" in (tmp_path / "results" / "results.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec(checkpoints.PACKAGED_MODEL) is None, reason="no packaged MiniLM")
def test_a_shape_has_time_and_memory_and_no_accuracy(in_process, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(shapes.SHAPES, "bert-base-shape", {**shapes.SHAPES["bert-base-shape"], **SMALL})
    command = [*arguments, "--model", "bert-base-shape", "--variants", "sdpa-sorted,sparse-unpadded", "--repeats", "1"]
    assert squad.main(command) == 0
    results = results_of(tmp_path)
    assert results["random_weights"] and results["model"] == "bert-base-shape"
    assert [(row["em"], row["f1"]) for row in results["rows"]] == [(None, None)] * 2
    assert all(row["seconds"] > 0 and row["peak_memory_bytes"] > 0 for row in results["rows"])
    assert "layer i of 12 has the mask of all-MiniLM-L6-v2's layer i * 6 // 12" in results["averages_from"]
    assert "Random weights" in capsys.readouterr().out
    lines = (tmp_path / "results" / "results.md").read_text().splitlines()
    assert [line.split("|")[3:5] for line in lines if line.startswith("| sdpa-sorted")] == [[" – ", " – "]]


SMALL = {"hidden_size": 192, "intermediate_size": 32, "vocab_size": 30522}


def test_a_short_mask_is_stretched_over_more_layers():
    mask = GlobalMask.random(2, 2, 20, sparsity=0.5)
    stretched = shapes.stretched(mask, 4)
    assert torch.equal(stretched.keep, mask.keep[[0, 0, 1, 1]])
    assert shapes.stretched(mask, 2) is mask


def test_a_shape_is_bert_base_and_its_seed_decides():
    config = shapes.shape_config("bert-base-shape")
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.max_position_embeddings)
    assert sizes == (12, 768, 12, 512)


def test_older_results_are_rendered(tmp_path):
    row = {
        "variant": "sparse-sorted", "attention": "sparse", "sparsity": 0.9, "granularity": "element", "density": 0.06,
        "bits": 3, "dtype": "float32", "padding": "longest", "em": 24.5, "f1": 32.6, "seconds": 5.8,
        "tokens_per_second": 4801.2, "windows_per_second": 34.5, "peak_memory_bytes": 882839552, "speedup": 1.39,
    }  # fmt: skip
    results = {
        "device": "a CPU", "commit": None, "date": "2026", "model": "m", "arguments": {
            "dtype": "float32", "batch_size": 32, "repeats": 3
        }, "data": {"name": "d", "questions": 2, "windows": 2, "tokens": 9}, "peak_memory": "p", "averages_from": "a",
        "checkpoints": {"dense": {"losses": [1.0]}, "sparse": {"losses": [1.0]}}, "rows": [row],
    }  # fmt: skip
    lines = measured_lines(results)
    assert "- float32, batches of 32, sorted by length" in lines
    assert "| sparse-sorted | 90% element | 3 | 24.50 | 32.60 | 5.80 | 34.5 | 4,801 | 0.88 GB | 1.39x |" in lines


@pytest.fixture
def own_set(monkeypatch, headless_folder, data_file):
    """The defaults, made small: a model without a head, and questions of the project's own."""
    monkeypatch.setattr("benchmarks.squad.setting.packaged_model", lambda: str(headless_folder))
    monkeypatch.setattr(squad_data, "OWN_QUESTIONS", data_file)


def test_without_model_and_data_a_head_is_trained_once_and_articles_are_held_out(own_set, arguments):
    command = [*arguments[4:], "--epochs", "2"]
    setting = read_setting(parse_options(command))
    trained_on = {tuple(window.input_ids) for window in setting.head_windows}
    assert not trained_on & {tuple(window.input_ids) for window in setting.windows}
    assert (setting.data_name, setting.averages_from) == (
        "own questions, held-out articles",
        "own questions, training articles",
    )
    first = make_models(setting)
    again = make_models(read_setting(parse_options(command)))
    other = make_models(read_setting(parse_options([*command, "--seed", "1"])))
    assert (first.dense.cached, again.dense.cached, other.dense.cached) == (False, True, False)
    assert first.dense.path == again.dense.path != other.dense.path
    assert len(first.dense.losses) == 2 and first.dense.losses == again.dense.losses
    assert first.sparse == first.dense  # without --finetune the sparse rows use the same weights
    assert first.mask == again.mask


def test_own_head_on_given_data_leaves_its_labels_alone(own_set, arguments, data_file):
    setting = read_setting(parse_options([*arguments[2:], "--limit", "4"]))
    assert len(setting.questions) == len(setting.windows) == 4
    assert setting.averages_windows == setting.windows
    assert len(setting.head_windows) == 9


def test_finetune_trains_dense_and_then_with_the_mask(arguments):
    command = [*arguments, "--finetune", "--epochs", "1", "--sparsity", "0.8", "--granularity", "tile"]
    setting = read_setting(parse_options(command))
    assert setting.averages_from == "cities.json, training articles"
    models = make_models(setting)
    assert Path(models.dense.path).name.startswith("dense-")
    assert Path(models.sparse.path).name.startswith("sparse-")
    dense, _ = checkpoints.load_model(models.dense.path)
    sparse, missing = checkpoints.load_model(models.sparse.path)
    assert not missing
    assert not torch.equal(
        dense.bert.encoder.layer[0].attention.self.query.weight,
        sparse.bert.encoder.layer[0].attention.self.query.weight,
    )


def test_a_mask_file_replaces_averages(arguments, tmp_path):
    path = tmp_path / "mask.safetensors"
    GlobalMask.random(2, 2, 48, sparsity=0.7).save(path)
    models = make_models(read_setting(parse_options([*arguments, "--mask", str(path)])))
    assert models.mask == GlobalMask.load(path) and "averages" not in models.seconds


def test_nothing_is_written_where_no_row_could_be_measured(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.squad.process.sys.executable", "/bin/false")
    assert squad.main([*arguments, "--variants", "eager-padded"]) == 1
    error = capsys.readouterr().err
    assert "eager-padded: the process that measured it ended with exit status 1" in error and "no row" in error
    assert not (tmp_path / "results").exists()


def test_rows_that_fail_under_a_later_seed_are_listed_with_it(arguments):
    asked = read_setting(parse_options([*arguments, "--seed", "4"]))
    failed = [{"variant": "sparse-unpadded", "reason": "killed"}]
    listed = squad._all_failed(asked, [Outcome(failed=failed), Outcome(), Outcome(failed=failed)])
    assert [row["reason"] for row in listed] == ["killed", "seed 6: killed"]
