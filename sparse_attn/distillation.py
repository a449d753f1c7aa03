"""Recovering accuracy on unlabelled text: a model teaches another one, such as itself before it was pruned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .arguments import expect_numbers, expect_whole
from .cutting import Cut, expect_fast_tokenizer
from .integrations.models import evaluating, inner_model
from .integrations.transformers import is_patched
from .training import GroupedTrainer, Schedule, train

Example = Mapping[str, Sequence[int]]
_OVER_TOKENS = ("start_logits", "end_logits")  # [batch, length]: a softmax over a sequence's tokens
_YES_OR_NO = "ElectraForPreTrainingOutput"  # its logits [batch, length] are those of a sigmoid for each token


def distil(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Sequence[Example],
    *,
    epochs: int = 5,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    temperature: float = 2.0,
    logits_weight: float = 1.0,
    hidden_weight: float = 1.0,
    warmup_share: float = 0.1,
    weight_decay: float = 0.01,
    dropout: float | None = 0.0,
    seed: int = 0,
    pad_token_id: int | None = None,
    progress: bool = True,
    description: str = "distilling",
) -> list[float]:
    """Trains all weights of `student` to compute what `teacher` computes for `inputs`, which need no labels.

    Made for a student that `patch_bert` gave a mask: it begins as a copy of the dense model, and its kernels run in the
    training loop; where it rounds probabilities, gradients pass straight through. The loss of a batch is

        logits_weight * temperature ** 2 * KL(teacher / temperature || student / temperature)
        + hidden_weight * the sum, over the embeddings' output and every layer's, of
          |student - teacher| ** 2 / |teacher| ** 2

    over real tokens alone. The first term is that of Hinton et al. ("Distilling the Knowledge in a Neural Network",
    arXiv 1503.02531), summed over all outputs whose names end with "logits" and averaged over what each decides about:
    sequences, or tokens. A single value (a regression) has its squared error instead, ELECTRA's discriminator the
    divergence of its decision for each token. The second one is that of
    TinyBERT (Jiao et al., arXiv 1909.10351) for layers of one size, relative to the teacher's, so that layers and
    models count alike. A model without a head has the second term only.

    AdamW with a linear schedule, gradients clipped to norm 1, batches of sequences of similar length, through
    transformers' Trainer: `torchrun` and `accelerate launch` share the batches among processes.

    Args:
        student: a model of transformers in float32, or a module around one, such as a SentenceTransformer, on the
            device to train on; changed in place and left in evaluation mode.
        teacher: a model with the same kind of head, layers and hidden size. It runs without gradients and dropout, and
            is not changed but moved to the student's device.
        inputs: sequences of tokens without padding: what `tokenizer(text)` gives for each, or `text_windows`.
            Fields of one value per token; `input_ids` at least.
        epochs: passes over the inputs.
        learning_rate: its peak.
        batch_size: sequences per step and process.
        temperature: of the softmax of logits.
        logits_weight, hidden_weight: of the two terms.
        warmup_share: share of the steps in which the rate rises.
        weight_decay: of AdamW; biases and layer norms are exempt.
        dropout: of the student, instead of its own; None leaves that as it is.
        seed: of dropout and of the order of the batches, and so of torch's, NumPy's and Python's generators.
        pad_token_id: the tokenizer's padding token; the student's config says it by default.
        progress: show a bar on stderr.
        description: its text.

    Returns:
        The mean loss of each epoch; not finite where training diverged.

    Raises:
        ModuleNotFoundError: accelerate, which transformers' Trainer needs, is not installed.
        ValueError: no inputs, fields of different lengths, an input longer than the student's mask, models that do not
            fit together, a number out of range; all weights are frozen (those that are stay as they are).
        TypeError: weights of a dtype other than float32, inputs that are no sequence of mappings of whole numbers,
            student or teacher that neither are models of transformers nor hold one.

    Warns of a student that is not patched, and where training diverged.
    """
    student, teacher = inner_model(student), inner_model(teacher)
    _check(student, teacher, inputs)
    expect_whole(0, or_none=True, pad_token_id=pad_token_id)
    expect_numbers(temperature=temperature, logits_weight=logits_weight, hidden_weight=hidden_weight)
    weights = (logits_weight, hidden_weight)
    if not 0 < temperature < math.inf or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(
            f"temperature is {temperature}, logits_weight {logits_weight} and hidden_weight {hidden_weight}; expected "
            "a temperature above 0 and weights of at least 0, not both 0"
        )
    schedule = Schedule(epochs, learning_rate, batch_size, None, warmup_share, weight_decay, dropout, seed)
    padding = student.config.pad_token_id if pad_token_id is None else pad_token_id
    with evaluating(teacher):
        return train(
            student, inputs, [len(example["input_ids"]) for example in inputs],
            lambda examples: _collate(examples, padding or 0), schedule,
            progress=progress, description=description, trainer=_DistillationTrainer, teacher=teacher,
            temperature=temperature, logits_weight=logits_weight, hidden_weight=hidden_weight,
        )  # fmt: skip


def text_windows(text: str, tokenizer, max_length: int = 384) -> list[dict[str, list[int]]]:
    """Any text as inputs of `distil`: consecutive windows of at most `max_length` tokens, special tokens included.

    Raises ValueError where the text has no token or `max_length` leaves no room for one, TypeError where it is no str
    or the tokenizer is not a fast one.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}, expected one str; call text_windows for each text")
    expect_whole(max_length=max_length)
    expect_fast_tokenizer(tokenizer)
    names = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]
    encoding = tokenizer([text], truncation=False, verbose=False)
    segments = encoding.sequence_ids(0)
    cut = Cut(segments, 0, max_length)
    if not cut.tokens:
        raise ValueError("the text has no tokens; expected some text to cut into windows")
    if not cut.bounds:
        raise ValueError(f"max_length is {max_length}; expected more than the {segments.count(None)} special tokens")
    return [{name: cut.window(encoding[name][0], bounds) for name in names} for bounds in cut.bounds]


def logits_loss(student: ModelOutput, teacher: ModelOutput, real: Tensor, temperature: float) -> Tensor:
    """The first term of `distil`, for outputs of a batch whose real tokens are `real`, bool [batch, length]."""
    total = real.new_zeros((), dtype=torch.float32)
    for name in teacher:
        if not name.endswith("logits"):
            continue
        target, found = teacher[name].float(), student[name].float()
        if type(teacher).__name__ == _YES_OR_NO:
            target, found = (torch.stack((torch.zeros_like(logits), logits), -1) for logits in (target, found))
        if target.ndim == 3:
            target, found = target[real], found[real]
        if target.shape[-1] == 1 and name not in _OVER_TOKENS:
            total = total + mse_loss(found, target)
            continue
        target, found = target / temperature, found / temperature
        if name in _OVER_TOKENS:
            lowest = torch.finfo(torch.float32).min
            target, found = target.masked_fill(~real, lowest), found.masked_fill(~real, lowest)
        target, found = target.log_softmax(-1), found.log_softmax(-1)
        total = total + temperature**2 * kl_div(found, target, reduction="batchmean", log_target=True)
    return total


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor) -> Tensor:
    """The second term of `distil`: hidden states [batch, length, hidden] of each layer, `real` bool [batch, length]."""
    total = real.new_zeros((), dtype=torch.float32)
    for found, target in zip(student, teacher, strict=True):
        found, target = found[real].float(), target[real].float()
        total = total + (found - target).square().sum() / target.square().sum()
    return total


class _DistillationTrainer(GroupedTrainer):
    def __init__(self, *, teacher, temperature: float, logits_weight: float, hidden_weight: float, **arguments):
        super().__init__(**arguments)
        self.teacher = teacher.to(self.args.device)
        self.temperature, self.logits_weight, self.hidden_weight = temperature, logits_weight, hidden_weight

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        wanted = {"output_hidden_states": True, "return_dict": True}
        with torch.no_grad():
            target = self.teacher(**inputs, **wanted)
        found = model(**inputs, **wanted)
        real = inputs["attention_mask"].bool()
        loss = self.logits_weight * logits_loss(found, target, real, self.temperature)
        loss = loss + self.hidden_weight * hidden_loss(found.hidden_states, target.hidden_states, real)
        return (loss, found) if return_outputs else loss


def _collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """int64 [examples, longest] for each field, padded on the right, and the attention mask."""
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {}
    for name in examples[0].keys() | {"attention_mask"}:
        padding = pad_token_id if name == "input_ids" else 0
        rows = torch.full((len(examples), longest), padding, dtype=torch.int64)
        for row, example in zip(rows, examples):
            length = len(example["input_ids"])
            row[:length] = torch.as_tensor(example[name]) if name in example else 1
        batch[name] = rows
    return batch


def _check(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Sequence[Example]) -> None:
    if is_patched(teacher) and not is_patched(student):
        raise ValueError(
            "the teacher is patched and the student is not; expected the dense model as teacher: swap them"
        )
    if student is teacher:
        raise ValueError("student and teacher are one object; expected two models: load or copy the student")
    sizes = [(model.config.num_hidden_layers, model.config.hidden_size) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has {sizes[0][0]} layers of size {sizes[0][1]}, the teacher {sizes[1][0]} of size "
            f"{sizes[1][1]}; expected the same, since hidden states are compared layer by layer"
        )
    if type(student) is not type(teacher):
        raise ValueError(
            f"the student is a {type(student).__name__}, the teacher a {type(teacher).__name__}; expected one class, "
            "since their outputs are compared"
        )
    if isinstance(inputs, (Mapping, Tensor)):
        raise TypeError(
            f"inputs is one {type(inputs).__name__}, expected a sequence of examples: "
            "[tokenizer(text) for text in texts]"
        )
    if not (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")):
        raise TypeError(f"inputs is {type(inputs).__name__}, expected a sequence of examples: list(...) makes one")
    if not len(inputs):
        raise ValueError("no inputs to distil on; expected at least one sequence of tokens")
    for index, example in enumerate(inputs):
        if not isinstance(example, Mapping):
            raise TypeError(
                f"input {index} is {type(example).__name__}, expected fields by name, as tokenizer(text) gives"
            )
        nested = [name for name, values in example.items() if _is_nested(values)]
        if nested:
            raise ValueError(
                f"input {index} has {nested[0]} with several dimensions; expected one sequence without padding and "
                "with one value per token, as tokenizer(text) gives without return_tensors"
            )
        lengths = {name: len(values) for name, values in example.items()}
        if "input_ids" not in lengths or len(set(lengths.values())) != 1 or lengths["input_ids"] == 0:
            raise ValueError(
                f"input {index} has fields of lengths {lengths}; expected input_ids and other fields with one value "
                "per token, as tokenizer(text) gives"
            )
        fractions = [name for name, values in example.items() if torch.as_tensor(values[:1]).is_floating_point()]
        if fractions:
            raise TypeError(
                f"input {index} has {fractions[0]} with fractions; expected whole numbers, as tokenizer(text) gives"
            )
        if lengths.keys() != inputs[0].keys():
            raise ValueError(
                f"input {index} has the fields {sorted(lengths)}, the first one {sorted(inputs[0])}; expected the same"
            )
    if not is_patched(student):
        warnings.warn(
            "the student is not patched: it attends to all positions, as its teacher does. To recover what pruning "
            "costs, call patch_bert(student, mask) first",
            stacklevel=3,
        )


def _is_nested(values: Sequence | Tensor) -> bool:
    if isinstance(values, Tensor):
        return values.ndim != 1
    return len(values) > 0 and (isinstance(values[0], (list, tuple)) or getattr(values[0], "ndim", 0) > 0)
