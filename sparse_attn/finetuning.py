"""Fine-tuning for extractive question answering with transformers' Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch

from .arguments import expect_kind, expect_whole
from .squad.windows import MODEL_INPUTS, Window, check_input_names, collate
from .training import Schedule, train

_LABELS = ("start_positions", "end_positions")


def finetune_question_answering(
    model: torch.nn.Module,
    windows: Sequence[Window],
    pad_token_id: int,
    *,
    epochs: int = 2,
    learning_rate: float = 5e-5,
    head_learning_rate: float | None = None,
    batch_size: int = 16,
    warmup_share: float = 0.1,
    weight_decay: float = 0.01,
    dropout: float | None = None,
    seed: int = 0,
    input_names: Sequence[str] = MODEL_INPUTS,
    progress: bool = True,
    description: str = "fine-tuning",
) -> list[float]:
    """Trains all weights of `model` to find the first answers in `windows` (Devlin et al., 2019).

    AdamW with a linear schedule; batches hold windows of similar length, in a random order. A window without
    the answer teaches position 0. A patched model trains through its sparse attention. The same model,
    windows, arguments and number of threads give the same weights.

    Args:
        model: a question-answering model of transformers in float32, on the device to train on; changed in
            place and left in evaluation mode.
        windows: from `make_windows`, at least one.
        pad_token_id: the tokenizer's padding token.
        epochs: passes over the windows.
        learning_rate: its peak.
        head_learning_rate: the peak for weights outside the encoder, which start from nothing when a head is new;
            `learning_rate` if None.
        batch_size: windows per step and process.
        warmup_share: share of the steps in which the rate rises.
        weight_decay: of AdamW; biases and layer norms are exempt.
        dropout: instead of the model's own; None leaves that as it is.
        seed: of dropout and of the order of the batches, and so of torch's, NumPy's and Python's generators.
        input_names: which of "input_ids", "attention_mask" and "token_type_ids" the model takes.
        progress: show a bar on stderr.
        description: its text.

    Returns:
        The mean loss of each epoch; not finite where training diverged.

    Raises:
        ModuleNotFoundError: accelerate, which transformers' Trainer needs, is not installed.
        ValueError: no windows, one longer than the mask of a patched model, a number that is out of range, an unknown
            name of an input; all weights are frozen (those that are stay as they are).
        TypeError: weights of a dtype other than float32, other windows, or a model without answers.

    Warns where training diverged.
    """
    expect_kind(torch.nn.Module, "a question-answering model of transformers", model=model)
    expect_kind(Sequence, "a sequence of Window: from make_windows(questions, ...)", windows=windows)
    expect_whole(0, pad_token_id=pad_token_id)
    if not windows:
        raise ValueError("no windows to train on; expected at least one, from make_windows")
    if not isinstance(windows[0], Window):
        raise TypeError(
            f"windows holds {type(windows[0]).__name__}, expected Window: from make_windows(questions, ...)"
        )
    if "start_positions" not in inspect.signature(model.forward).parameters:
        raise TypeError(f"the model is a {type(model).__name__}, expected one for question answering")
    check_input_names(input_names)
    schedule = Schedule(
        epochs, learning_rate, batch_size, head_learning_rate, warmup_share, weight_decay, dropout, seed
    )
    names = (*input_names, *_LABELS)

    def collate_named(batch: list[Window]) -> dict[str, torch.Tensor]:
        tensors = collate(batch, pad_token_id)
        return {name: tensors[name] for name in names}

    lengths = [len(window.input_ids) for window in windows]
    return train(model, windows, lengths, collate_named, schedule, progress=progress, description=description)
