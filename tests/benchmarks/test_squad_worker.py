"""What the process behind one row measures."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.squad_checkpoints import input_names, load_model
from benchmarks.squad_variants import table_variants
from benchmarks.squad_worker import Job, measure, write_inputs
from sparse_attn import GlobalMask
from sparse_attn.squad.reading import read_squad
from sparse_attn.squad.windows import collate, length_sorted_batches, make_windows


@pytest.fixture
def windows(data_file, tokenizer):
    return make_windows(read_squad(data_file), tokenizer, max_length=20, stride=4)


@pytest.fixture
def job(tmp_path, windows, tokenizer, model_folder):
    inputs = tmp_path / "inputs.json"
    batches = length_sorted_batches(windows, 5)
    write_inputs(inputs, windows, batches, tokenizer.pad_token_id, input_names(tokenizer))
    return Job(
        label="row",
        checkpoint=str(model_folder),
        attention="eager",
        mask=None,
        bits=None,
        dtype="float32",
        device="cpu",
        inputs=str(inputs),
        pad_to=None,
        repeats=2,
    )


@pytest.fixture
def expected(windows, model_folder):
    """Start and end logits of every window alone, in the windows' order."""
    model, _ = load_model(str(model_folder))
    starts, ends = [], []
    for window in windows:
        batch = collate([window], 0)
        with torch.no_grad():
            outputs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
        starts.append(outputs.start_logits[0])
        ends.append(outputs.end_logits[0])
    return torch.cat(starts), torch.cat(ends)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pad_to", [None, 48])
def test_logits_are_those_of_each_window_alone(job, expected, attention, pad_to):
    measured, logits = measure(replace(job, attention=attention, pad_to=pad_to))
    torch.testing.assert_close(logits["start"], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits["end"], expected[1], atol=1e-5, rtol=1e-5)
    assert len(measured.seconds) == 2


def test_a_mask_and_bits_are_applied(job, expected, tmp_path):
    path = tmp_path / "mask.safetensors"
    GlobalMask.random(2, 2, 48, sparsity=0.0).save(path)
    _, whole = measure(replace(job, attention="sdpa", mask=str(path)))
    torch.testing.assert_close(whole["start"], expected[0], atol=1e-5, rtol=1e-5)
    _, rounded = measure(replace(job, attention="sdpa", mask=str(path), bits=1))
    assert not torch.allclose(rounded["start"], expected[0], atol=1e-3)
    GlobalMask.random(2, 2, 48, sparsity=0.9).save(path)
    _, pruned = measure(replace(job, attention="sdpa", mask=str(path)))
    assert not torch.allclose(pruned["start"], expected[0], atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_runs(job, expected, tmp_path, masked):
    path = tmp_path / "mask.safetensors"
    GlobalMask.random(2, 2, 48, sparsity=0.0).save(path)
    _, logits = measure(replace(job, dtype="bfloat16", mask=str(path) if masked else None))
    assert logits["start"].dtype == torch.float32
    torch.testing.assert_close(logits["start"], expected[0], atol=0.05, rtol=0.05)


def test_a_job_survives_json(job):
    from dataclasses import asdict

    assert Job(**json.loads(json.dumps(asdict(job)))) == job


def test_variants_are_dense_first_and_named_after_their_padding():
    assert [(row.name, row.bits) for row in table_variants("longest", "float32", 3)] == [
        ("eager-sorted", None),
        ("sdpa-sorted", None),
        ("sparse-sorted", None),
        ("sparse-sorted", 3),
    ]
    assert [row.name for row in table_variants("max", "float32", None)] == [
        "eager-padded",
        "sdpa-padded",
        "sparse-padded",
    ]
