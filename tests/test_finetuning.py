import math
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from transformers import BertConfig, BertForQuestionAnswering

from sparse_attn import GlobalMask, is_patched, patch_bert
from sparse_attn.finetuning import finetune_question_answering
from sparse_attn.squad.windows import Window
from sparse_attn.training import LengthGroupedBatches
from tests.helpers import weights

BEFORE_ANSWER, AFTER_ANSWER = 3, 4  # two tokens that mark the answer
SETTINGS = {"epochs": 6, "learning_rate": 5e-3, "batch_size": 16, "progress": False}


def marked_windows(count: int) -> list[Window]:
    """Random tokens in which two neighbours, the answer, are always the same."""
    draw = random.Random(0)
    windows = []
    for index in range(count):
        tokens = [draw.randint(5, 39) for _ in range(draw.randint(8, 24))]
        start = draw.randint(1, len(tokens) - 2)
        tokens[start : start + 2] = [BEFORE_ANSWER, AFTER_ANSWER]
        windows.append(Window(index, tokens, [0] * len(tokens), [None] * len(tokens), start, start + 1))
    return windows


def tiny_model() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return BertForQuestionAnswering(
        BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=24,
        )
    )


def test_a_model_learns_and_the_seed_decides():
    models, losses = [tiny_model() for _ in range(3)], []
    for model, seed in zip(models, (1, 1, 2), strict=True):
        losses.append(finetune_question_answering(model, marked_windows(128), 0, seed=seed, **SETTINGS))
    assert len(losses[0]) == 6 and losses[0][-1] < 0.2 * losses[0][0]
    assert losses[0] == losses[1] and torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))
    assert not models[0].training
    assert all(parameter.grad is None for parameter in models[0].parameters())


@pytest.mark.parametrize("bits", [None, 3])
def test_a_patched_model_trains_through_its_mask(bits):
    model = patch_bert(tiny_model(), GlobalMask.random(2, 2, 24, sparsity=0.5), bits)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = finetune_question_answering(model, marked_windows(128), 0, **SETTINGS)
    assert losses[-1] < 0.5 * losses[0]
    assert is_patched(model)
    for layer in range(2):
        for projection in ("query", "key", "value"):
            name = f"bert.encoder.layer.{layer}.attention.self.{projection}.weight"
            assert not torch.equal(before[name], model.get_parameter(name)), name


def test_nothing_is_left_in_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finetune_question_answering(tiny_model(), marked_windows(8), 0, epochs=1, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    losses = finetune_question_answering(tiny_model(), marked_windows(8), 0, epochs=1, description="learning")
    bar = capsys.readouterr().err
    assert "learning: 100%" in bar and f"loss={losses[0]:.3f}" in bar


def test_a_model_gets_the_inputs_that_it_takes():
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    names = ("input_ids", "attention_mask")
    finetune_question_answering(model, marked_windows(4), 0, epochs=1, input_names=names, progress=False)
    assert seen == [{*names, "start_positions", "end_positions"}]
    with pytest.raises(ValueError, match="input_names holds 'tokens'"):
        finetune_question_answering(model, marked_windows(4), 0, input_names=("tokens",), progress=False)


def test_batches_hold_similar_lengths_in_a_new_order_each_pass():
    lengths = torch.randint(5, 400, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = LengthGroupedBatches(lengths, 16, seed=0)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 63
    assert sorted(index for batch in first for index in batch) == list(range(1000))
    assert first != second and first == list(LengthGroupedBatches(lengths, 16, seed=0))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in first)
    assert padded < 1.1 * sum(lengths)


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("examples", [14, 301, 320])
def test_processes_share_all_batches(processes, examples):
    """As accelerate deals them out: no example is left out, and all processes have as many steps."""
    for seed in range(20):
        shares = [
            list(BatchSamplerShard(LengthGroupedBatches(range(examples), 4, seed), processes, index))
            for index in range(processes)
        ]
        assert {index for share in shares for batch in share for index in batch} == set(range(examples))
        assert {len(share) for share in shares} == {math.ceil(examples / (4 * processes))}


def test_trains_in_float32_whatever_accelerate_is_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model, seen = tiny_model(), set()
    model.bert.encoder.layer[0].register_forward_hook(lambda module, inputs, output: seen.add(output[0].dtype))
    finetune_question_answering(model, marked_windows(8), 0, epochs=1, progress=False)
    assert seen == {torch.float32} and "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": []}, "no windows"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"head_learning_rate": -1.0}, "head_learning_rate is -1.0"),
        ({"warmup_share": 1.5}, "warmup_share 1.5"),
        ({"weight_decay": float("nan")}, "weight_decay nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, message):
    arguments = {"windows": marked_windows(4), "pad_token_id": 0, "progress": False, **changes}
    with pytest.raises(ValueError, match=message):
        finetune_question_answering(tiny_model(), **arguments)


@pytest.mark.parametrize("changes", [{"epochs": 1.5}, {"seed": "0"}, {"learning_rate": "1e-4"}, {"dropout": "0.1"}])
def test_settings_of_the_wrong_kind_are_refused(changes):
    ((name, value),) = changes.items()
    with pytest.raises(TypeError, match=f"{name} is {value!r}, expected a"):
        finetune_question_answering(tiny_model(), marked_windows(4), 0, progress=False, **changes)


def test_training_that_diverges_says_so():
    settings = {**SETTINGS, "epochs": np.int64(3), "learning_rate": 1e30}
    with pytest.warns(UserWarning, match="training diverged.*Lower learning_rate, which was 1e") as warned:
        losses = finetune_question_answering(tiny_model(), marked_windows(32), 0, **settings)
    assert [one.filename for one in warned if "diverged" in str(one.message)] == [__file__]
    assert len(losses) == 3 and not any(map(math.isfinite, losses[1:]))


def test_a_failed_step_leaves_evaluation_mode_and_no_gradients():
    model, steps = tiny_model(), []

    def fail(*_):
        steps.append(1)
        if len(steps) == 3:
            raise KeyError("a failure")

    model.register_forward_hook(fail)
    with pytest.raises(KeyError, match="a failure"):
        finetune_question_answering(model, marked_windows(64), 0, **SETTINGS)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_has_gradients_wherever_it_is_called(mode):
    model, same, settings = tiny_model(), tiny_model(), {**SETTINGS, "epochs": 1}
    with mode():
        losses = finetune_question_answering(model, marked_windows(32), 0, **settings)
    assert losses == finetune_question_answering(same, marked_windows(32), 0, **settings)


def test_other_windows_and_models_are_refused():
    with pytest.raises(TypeError, match="windows holds str, expected Window"):
        finetune_question_answering(tiny_model(), "questions.json", 0)
    with pytest.raises(TypeError, match="windows is NoneType, expected a sequence of Window"):
        finetune_question_answering(tiny_model(), None, 0)
    with pytest.raises(TypeError, match="model is NoneType, expected a question-answering model"):
        finetune_question_answering(None, marked_windows(4), 0)
    with pytest.raises(TypeError, match="pad_token_id is 'x', expected a whole number"):
        finetune_question_answering(tiny_model(), marked_windows(4), "x")
    with pytest.raises(TypeError, match="input_names is the text 'input_ids'"):
        finetune_question_answering(tiny_model(), marked_windows(4), 0, input_names="input_ids")
    with pytest.raises(TypeError, match="a BertModel, expected one for question answering"):
        finetune_question_answering(tiny_model().bert, marked_windows(4), 0)


def test_low_precision_weights_are_refused():
    with pytest.raises(TypeError, match="torch.bfloat16.*model.float"):
        finetune_question_answering(tiny_model().bfloat16(), marked_windows(4), 0)


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("sparse_attn.training.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"accelerate.*project.s folder.*\.\[bench\]"):
        finetune_question_answering(tiny_model(), marked_windows(4), 0)
