import copy

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)
from transformers.models.electra.modeling_electra import ElectraForPreTrainingOutput
from transformers.utils import ModelOutput

from sparse_attn import GlobalMask, distil, is_patched, patch_bert
from sparse_attn.distillation import hidden_loss, logits_loss, text_windows
from tests.helpers import weights
from tests.integrations.conftest import small_config

SETTINGS = {"epochs": 4, "learning_rate": 2e-3, "batch_size": 8, "progress": False}
TERMS = {"temperature": 1.5, "logits_weight": 1.0, "hidden_weight": 1.0}


def sequences(count: int = 48, fields=("input_ids", "token_type_ids")) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        length = int(torch.randint(6, 24, (), generator=draw))
        tokens = torch.randint(1, 99, (length,), generator=draw).tolist()
        examples.append({name: tokens if name == "input_ids" else [0] * length for name in fields})
    return examples


def teacher_of(head=BertForQuestionAnswering):
    torch.manual_seed(0)
    model = head(small_config()).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embeddings" not in name:
            parameter.data.mul_(6)  # attention that matters
    return model


def student_of(teacher, bits=None):
    return patch_bert(copy.deepcopy(teacher), GlobalMask.random(2, 2, 24, sparsity=0.8), bits)


@pytest.mark.parametrize("bits", [None, 3])
def test_a_pruned_model_comes_closer_to_its_teacher(bits):
    teacher = teacher_of()
    before = weights(teacher).clone()
    student = student_of(teacher, bits)
    held_out = torch.randint(1, 99, (16, 20))

    def distance() -> float:
        with torch.no_grad():
            return (student.eval()(held_out).start_logits - teacher(held_out).start_logits).square().mean().item()

    start = distance()
    losses = distil(student, teacher, sequences(), **SETTINGS)
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    assert distance() < 0.8 * start
    assert torch.equal(weights(teacher), before) and not any(p.grad is not None for p in teacher.parameters())
    assert is_patched(student) and not is_patched(teacher)
    assert not student.training and not any(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("head", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_any_head_class(head):
    teacher = teacher_of(head).train()
    next(teacher.children()).eval()
    modes = [module.training for module in teacher.modules()]
    losses = distil(student_of(teacher), teacher, sequences(24, ["input_ids"]), **{**SETTINGS, "epochs": 2})
    assert 0 < losses[-1] < losses[0]
    assert [module.training for module in teacher.modules()] == modes


def test_the_seed_decides():
    teacher = teacher_of()
    students = [student_of(teacher) for _ in range(3)]
    for student, seed in zip(students, (1, 1, 2)):
        distil(student, teacher, sequences(16), seed=seed, **{**SETTINGS, "epochs": 1})
    first, second, other = map(weights, students)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_loss_has_the_weights_and_the_temperature_given():
    """And neither model drops anything, although both are made to in training mode."""
    config = small_config()
    config.hidden_dropout_prob = 0.5
    teacher = BertForQuestionAnswering(config)
    teacher.qa_outputs.weight.data.mul_(100)  # logits on which the temperature tells
    student = student_of(teacher)
    for parameter in student.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    tokens = torch.randint(1, 99, (4, 20))
    with torch.no_grad():
        found, target = (model.eval()(tokens, output_hidden_states=True) for model in (student, teacher))
    real = torch.ones_like(tokens, dtype=torch.bool)
    first, second = logits_loss(found, target, real, 3.0), hidden_loss(found.hidden_states, target.hidden_states, real)
    losses = distil(
        student, teacher.train(), [{"input_ids": row} for row in tokens], epochs=1, learning_rate=1e-9,
        temperature=3.0, logits_weight=0.5, hidden_weight=4.0, progress=False,
    )  # fmt: skip
    assert losses == pytest.approx([0.5 * first.item() + 4.0 * second.item()], rel=1e-3)


def test_modules_around_models_are_taken():
    """Such as a SentenceTransformer."""
    teacher, settings = teacher_of(), {"epochs": 1, "progress": False}
    alone, inside = student_of(teacher), student_of(teacher)
    losses = distil(alone, teacher, sequences(8), **settings)
    around = [torch.nn.Sequential(model, torch.nn.Identity()) for model in (inside, teacher)]
    assert distil(*around, sequences(8), **settings) == losses
    assert torch.equal(weights(inside), weights(alone))


@pytest.mark.parametrize(("given", "padding"), [(None, 3), (7, 7)])
def test_padding_is_the_token_given_or_the_configs(given, padding):
    teacher = teacher_of()
    teacher.config.pad_token_id = 3
    student, seen = student_of(teacher), []
    student.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    inputs = [{"input_ids": [9] * length, "attention_mask": [1, 0] + [1] * (length - 2)} for length in (3, 5)]
    distil(student, teacher, inputs, epochs=1, pad_token_id=given, progress=False)
    assert sorted(seen[0]["input_ids"].tolist()) == [[9] * 3 + [padding] * 2, [9] * 5]
    assert sorted(seen[0]["attention_mask"].tolist()) == [[1, 0, 1, 0, 0], [1, 0, 1, 1, 1]]


@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_padding_has_no_part_in_the_loss(temperature):
    """A batch with padding gives the mean over the sequences, or tokens, of each alone."""
    lengths, width = (3, 7), 7
    real = torch.arange(width) < torch.tensor(lengths).view(-1, 1)
    shapes = {"start_logits": (2, width), "logits": (2, width, 5), "pooled_logits": (2, 4)}
    found, target = (ModelOutput({name: torch.randn(shape) for name, shape in shapes.items()}) for _ in range(2))

    def expected(name, rows) -> torch.Tensor:
        divergences = []
        for student, teacher in rows(found[name], target[name]):
            p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
            divergences.append((p * (p / q).log()).sum())
        return temperature**2 * torch.stack(divergences).mean()

    start = expected("start_logits", lambda *both: [[t[row, :n] for t in both] for row, n in enumerate(lengths)])
    tokens = expected("logits", lambda *both: zip(*(t[real] for t in both)))
    pooled = expected("pooled_logits", lambda *both: zip(*both))
    torch.testing.assert_close(logits_loss(found, target, real, temperature), start + tokens + pooled)

    layers, targets = [torch.randn(2, width, 8) for _ in range(3)], [torch.randn(2, width, 8) for _ in range(3)]
    relative = [((a[real] - b[real]).norm() / b[real].norm()).square() for a, b in zip(layers, targets, strict=True)]
    torch.testing.assert_close(hidden_loss(layers, targets, real), sum(relative))
    layers[0][~real] += 100
    torch.testing.assert_close(hidden_loss(layers, targets, real), sum(relative))


def test_a_regression_has_its_squared_error():
    found, target = ModelOutput(logits=torch.tensor([[1.0], [2.0]])), ModelOutput(logits=torch.tensor([[0.0], [5.0]]))
    assert logits_loss(found, target, torch.ones(2, 3, dtype=torch.bool), 2.0).item() == pytest.approx(5.0)


def test_one_token_has_one_place_for_an_answer():
    found, target = ModelOutput(start_logits=torch.ones(2, 1)), ModelOutput(start_logits=torch.zeros(2, 1))
    assert logits_loss(found, target, torch.ones(2, 1, dtype=torch.bool), 2.0).item() == 0


def test_a_decision_for_each_token_has_its_own_divergence():
    """ELECTRA's discriminator says for each token whether it was replaced."""
    real = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    found, target = (ElectraForPreTrainingOutput(logits=3 * torch.randn(2, 3)) for _ in range(2))
    q, p = ((each.logits[real] / 2).sigmoid() for each in (found, target))
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(logits_loss(found, target, real, 2.0), expected)


@pytest.mark.parametrize("term", ["logits_weight", "hidden_weight"])
def test_each_term_can_be_left_out(term):
    teacher = teacher_of()
    alone = distil(student_of(teacher), teacher, sequences(8), **{**SETTINGS, **TERMS, term: 0.0, "epochs": 1})
    both = distil(student_of(teacher), teacher, sequences(8), **{**SETTINGS, **TERMS, "epochs": 1})
    assert 0 < alone[0] < both[0]


@pytest.fixture
def tokenizer() -> BertTokenizer:
    words = "the city of paris was built in year 1901 by ada ."
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def test_text_becomes_windows_that_hold_all_of_it(tokenizer):
    text = "the city of paris was built in the year 1901 by ada .\n" * 9
    windows = text_windows(text, tokenizer, max_length=20)
    assert {len(window["input_ids"]) for window in windows[:-1]} == {20} and len(windows) > 4
    assert all(window.keys() == {"input_ids", "token_type_ids"} for window in windows)
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert all((window["input_ids"][0], window["input_ids"][-1]) == ends for window in windows)
    inside = [token for window in windows for token in window["input_ids"][1:-1]]
    assert inside == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_windows_have_the_fields_that_the_model_takes(tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert text_windows("paris", tokenizer)[0].keys() == {"input_ids"}


def test_text_without_tokens_or_room_is_refused(tokenizer):
    with pytest.raises(TypeError, match="text is list, expected one str"):
        text_windows(["paris", "rome"], tokenizer)
    with pytest.raises(ValueError, match="no tokens"):
        text_windows(" \n", tokenizer)
    with pytest.raises(ValueError, match="max_length is 2; expected more than the 2 special tokens"):
        text_windows("paris", tokenizer, max_length=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "no inputs"),
        ({"inputs": [{"token_type_ids": [0]}]}, "input 0 has fields of lengths"),
        ({"inputs": [{"input_ids": []}]}, "input 0 has fields of lengths"),
        ({"inputs": [{"input_ids": [1, 2], "token_type_ids": [0]}]}, "expected input_ids and other fields"),
        ({"inputs": [{"input_ids": [1]}, {"input_ids": [1], "token_type_ids": [0]}]}, "input 1 has the fields"),
        ({"inputs": [{"input_ids": torch.ones(2, 3)}]}, "input 0 has input_ids with several dimensions"),
        ({"inputs": [{"input_ids": [[1, 2], [3, 4]]}]}, "input 0 has input_ids with several dimensions"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"logits_weight": 0.0, "hidden_weight": 0.0}, "not both 0"),
        ({"hidden_weight": -1.0}, "hidden_weight -1.0"),
        ({"logits_weight": float("nan")}, "logits_weight nan"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"warmup_share": 2.0}, "warmup_share 2.0"),
        ({"weight_decay": -1.0}, "weight_decay -1.0"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changes, message):
    arguments = {"inputs": sequences(4), "progress": False, **changes}
    with pytest.raises(ValueError, match=message):
        distil(student_of(teacher_of()), teacher_of(), **arguments)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[1, 2]]}, "inputs is one dict, expected a sequence"),
        (torch.ones(2, 3), "inputs is one Tensor, expected a sequence"),
        ([torch.ones(3)], "input 0 is Tensor, expected fields by name"),
        ((each for each in sequences(2)), "inputs is generator, expected a sequence"),
        ([{"input_ids": [1.5, 2.5]}], "input 0 has input_ids with fractions"),
    ],
)
def test_inputs_of_other_types_are_refused(inputs, message):
    with pytest.raises(TypeError, match=message):
        distil(student_of(teacher_of()), teacher_of(), inputs, progress=False)


def test_models_that_do_not_fit_together_are_refused():
    teacher = teacher_of()
    with pytest.raises(ValueError, match="the teacher is patched and the student is not"):
        distil(teacher_of(), patch_bert(teacher_of(), GlobalMask.random(2, 2, 64, sparsity=0.5)), sequences(4))
    with pytest.raises(ValueError, match=r"are frozen; .*requires_grad_\(True\)"):
        distil(student_of(teacher).requires_grad_(False), teacher, sequences(4), progress=False)
    with pytest.raises(TypeError, match="Linear is not a transformers model and holds none"):
        distil(student_of(teacher), torch.nn.Linear(2, 2), sequences(4))
    short = patch_bert(teacher_of(), GlobalMask.random(2, 2, 16, sparsity=0.5))
    with pytest.raises(ValueError, match="example 1 has 17 tokens, the model's mask covers 16; cut it"):
        distil(short, teacher, [{"input_ids": [9] * length} for length in (16, 17)], progress=False)
    with pytest.raises(ValueError, match="one object"):
        distil(teacher, teacher, sequences(4))
    for name, value, sizes in (
        ("num_hidden_layers", 3, "3 layers of size 64"),
        ("hidden_size", 32, "2 layers of size 32"),
    ):
        config = small_config()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=f"{sizes}, the teacher 2 of size 64"):
            distil(BertForQuestionAnswering(config), teacher, sequences(4))
    with pytest.raises(ValueError, match="the student is a BertModel, the teacher a BertForQuestionAnswering"):
        distil(BertModel(small_config()), teacher, sequences(4))
    with pytest.raises(TypeError, match="torch.bfloat16.*model.float"):
        distil(student_of(teacher).bfloat16(), teacher, sequences(4))


def test_a_student_that_nobody_patched_is_warned_of():
    with pytest.warns(UserWarning, match=r"the student is not patched.*call patch_bert\(student, mask\)") as warned:
        distil(teacher_of(), teacher_of(), sequences(4), epochs=1, progress=False)
    assert [one.filename for one in warned if "not patched" in str(one.message)] == [__file__]
