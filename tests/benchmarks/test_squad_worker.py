"""What the process behind one row measures."""

import json
import subprocess
from dataclasses import asdict, astuple, replace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import RobertaConfig, RobertaForQuestionAnswering
from transformers.models.bert.modeling_bert import BertIntermediate

from benchmarks.squad import peers, process
from benchmarks.squad.checkpoints import input_names, load_model
from benchmarks.squad.feeding import Inputs, write_inputs
from benchmarks.squad.variants import NAMES, default_names, table_variants
from benchmarks.squad.worker import Job, main, measure
from benchmarks.verdicts import Absent
from sparse_attn import GlobalMask, log_table
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
        padding="longest",
        compiled=False,
        onednn=None,
        mask=None,
        tables=None,
        dtype="float32",
        device="cpu",
        inputs=str(inputs),
        max_length=48,
        repeats=2,
    )


@pytest.fixture
def saved_mask(tmp_path):
    def save(sparsity):
        path = tmp_path / f"mask-{sparsity}.safetensors"
        GlobalMask.random(2, 2, 48, sparsity=sparsity).save(path)
        return str(path)

    return save


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


def assert_equal_logits(logits, expected, tolerance=1e-5):
    torch.testing.assert_close(logits["start"], expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logits["end"], expected[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("attention", "padding"),
    [("eager", "max"), ("eager", "longest"), ("sdpa", "max"), ("sdpa", "longest"), ("packed", "none")],
)
def test_logits_are_those_of_each_window_alone(job, windows, expected, attention, padding):
    measured, logits = measure(replace(job, attention=attention, padding=padding))
    assert_equal_logits(logits, expected)
    assert len(measured.seconds) == 2 and measured.warm_up_seconds > 0
    lengths = [len(window.input_ids) for window in windows]
    places = {
        "none": sum(lengths),
        "max": 48 * len(windows),
        "longest": sum(len(batch) * lengths[batch[0]] for batch in length_sorted_batches(windows, 5)),
    }
    assert measured.processed_tokens == places[padding]
    assert (measured.kernel is not None) == (attention == "packed")


@pytest.mark.parametrize("padding", ["max", "longest", "none"])
def test_a_mask_and_bits_are_applied(job, expected, saved_mask, padding):
    job = replace(job, attention="sparse", padding=padding, mask=saved_mask(0.0), repeats=1)
    assert_equal_logits(measure(job)[1], expected)
    _, rounded = measure(replace(job, tables=[list(astuple(log_table(1)))] * 2))
    assert not torch.allclose(rounded["start"], expected[0], atol=1e-3)
    _, zeros = measure(replace(job, tables=[[0.5, [0.0, 0.0]]] * 2))  # every probability becomes 0
    assert not torch.allclose(zeros["start"], rounded["start"], atol=1e-3)
    _, pruned = measure(replace(job, mask=saved_mask(0.9)))
    assert not torch.allclose(pruned["start"], expected[0], atol=1e-3)


def test_padding_leaves_the_layers_of_the_unpadded_model_only(job, windows, saved_mask, monkeypatch):
    seen = []

    def watch(self, hidden_states, *args, **kwargs):
        seen.append(hidden_states.shape[:2].numel())
        return original(self, hidden_states, *args, **kwargs)

    original = BertIntermediate.forward
    monkeypatch.setattr(BertIntermediate, "forward", watch)
    tokens = sum(len(window.input_ids) for window in windows)
    calls = 2 * len(Inputs.read(job.inputs).batches)  # of both layers in one pass; the timed one is the last
    for attention, padding, places in (
        ("packed", "none", tokens), ("sparse", "none", tokens), ("sparse", "max", 48 * len(windows)),
    ):  # fmt: skip
        seen.clear()
        changed = replace(job, attention=attention, padding=padding, mask=saved_mask(0.5), repeats=1)
        measured, _ = measure(changed)
        assert sum(seen[-calls:]) == 2 * measured.processed_tokens
        assert places <= measured.processed_tokens <= places * (33 / 32 if attention == "sparse" else 1)


@pytest.mark.parametrize("attention", ["eager", "packed", "sparse"])
def test_bfloat16_runs(job, expected, saved_mask, attention):
    padding = "longest" if attention == "eager" else "none"
    _, logits = measure(replace(job, dtype="bfloat16", attention=attention, padding=padding, mask=saved_mask(0.0)))
    assert logits["start"].dtype == torch.float32
    assert_equal_logits(logits, expected, 0.05)


def test_compiled_models_are_compiled_and_equal(job, expected, saved_mask, monkeypatch):
    compiled = []
    original = torch.compile

    def compile_simply(function, **options):
        return original(function, **options, backend=lambda graph, inputs: compiled.append(graph) or graph)

    monkeypatch.setattr(torch, "compile", compile_simply)
    for attention, padding in (("sdpa", "longest"), ("sparse", "none")):
        compiled.clear()
        change = dict(attention=attention, padding=padding, compiled=True, mask=saved_mask(0.0), repeats=1)
        assert_equal_logits(measure(replace(job, **change))[1], expected)
        assert compiled


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_flex_computes_what_the_mask_keeps(job, windows, saved_mask, sparsity, monkeypatch):
    monkeypatch.setattr(peers, "_flex", flex_attention)  # not compiled: the same function, slowly
    mask = saved_mask(sparsity)
    _, ours = measure(replace(job, attention="sparse", mask=mask, repeats=1))
    measured, flex = measure(replace(job, attention="flex", mask=mask, repeats=1))
    assert_equal_logits(flex, (ours["start"], ours["end"]))
    assert measured.processed_tokens == 48 * len(windows) and "flex_attention" in measured.kernel


def test_a_worker_is_told_nothing_of_a_launch(job, tmp_path, monkeypatch):
    """It would wait for the other processes."""
    environments = []

    def run(command, env):
        environments.append(env)
        return subprocess.CompletedProcess(command, 1)

    of_a_launch = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    for name in (*of_a_launch, "ANOTHER"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(process.subprocess, "run", run)
    with pytest.raises(process.VariantFailed):
        process.run_worker(job, tmp_path)
    assert "ANOTHER" in environments[0] and not of_a_launch & set(environments[0])


def test_flash_attention_is_absent_on_a_cpu(job, tmp_path):
    with pytest.raises(Absent, match="needs a GPU"):
        measure(replace(job, attention="flash", padding="none"))
    (tmp_path / "spec.json").write_text(json.dumps(asdict(replace(job, attention="flash", padding="none"))))
    main([str(tmp_path / "spec.json"), str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == {"absent": "flash-attn needs a GPU"}
    assert not (tmp_path / "out.safetensors").exists()


def test_packed_attention_on_nested_tensors_is_the_same():
    query, key, value = torch.randn(3, 1, 11, 2, 16).transpose(2, 3)
    lengths = [5, 4, 2]
    bounds = torch.tensor([0, 5, 9, 11], dtype=torch.int32)
    outputs = [function(query, key, value, 0.25, bounds, 5, lengths) for function in (peers._one_by_one, peers._nested)]
    assert outputs[0].shape == (1, 11, 2, 16)
    torch.testing.assert_close(*outputs)


def test_roberta_positions_begin_after_its_padding_token(tmp_path, tokenizer, windows, job):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, type_vocab_size=2,
    )  # fmt: skip
    RobertaForQuestionAnswering(config).save_pretrained(tmp_path / "roberta")
    job = replace(job, checkpoint=str(tmp_path / "roberta"), repeats=1)
    _, padded = measure(job)
    _, packed = measure(replace(job, attention="packed", padding="none"))
    assert_equal_logits(packed, (padded["start"], padded["end"]))


def test_a_job_survives_json(job):
    assert Job(**json.loads(json.dumps(asdict(job)))) == job


def test_peers_come_first_and_then_ours_mask_by_mask():
    rows = table_variants(NAMES, ["element", "tile"], 3)
    assert [(row.name, row.granularity, row.bits) for row in rows] == [
        *((name, None, None) for name in ("eager-padded", "sdpa-padded", "sdpa-sorted", "sdpa-unpadded")),
        *(
            ("flash-unpadded", None, None),
            ("compiled", None, None),
            ("compiled-unpadded", None, None),
            ("flex", "element", None),
            ("flex", "tile", None),
        ),
        *(
            (f"sparse-{kind}", granularity, bits)
            for granularity in ("element", "tile")
            for kind in ("padded", "sorted", "unpadded", "unpadded-plain", "compiled")
            for bits in (None, 3)
        ),
    ]
    names = ["sparse-unpadded+bits", "sparse-sorted"]
    assert [row.label for row in table_variants(names, ["tile"], 1)] == [
        "sparse-sorted, tile",
        "sparse-unpadded, tile, 1 bit",
    ]
    assert [row.name for row in table_variants(names, ["tile"], None)] == ["sparse-sorted"]


def test_a_cpu_leaves_out_what_compiles_for_minutes():
    left_out = {"compiled", "compiled-unpadded", "flex", "sparse-compiled"}
    assert set(default_names("cuda")) - set(default_names("cpu")) == left_out
    assert set(default_names("cuda")) < set(NAMES)
