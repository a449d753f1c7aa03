"""Fine-tuning for extractive question answering with transformers' Trainer."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .squad.windows import Window, collate

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_LABELS = ("start_positions", "end_positions")
_BATCHES_SORTED_TOGETHER = 16


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
        seed: of dropout and of the order of the batches.
        input_names: which of "input_ids", "attention_mask" and "token_type_ids" the model takes.
        progress: show a bar on stderr.
        description: its text.

    Returns:
        The mean loss of each epoch.

    Raises:
        ModuleNotFoundError: accelerate, which transformers' Trainer needs, is not installed.
        ValueError: no windows, or a number that is out of range.
        TypeError: weights of a dtype other than float32.
    """
    require_accelerate()
    _check(model, windows, epochs, learning_rate, batch_size, warmup_share)
    names = (*input_names, *_LABELS)

    def collate_named(batch: list[Window]) -> dict[str, torch.Tensor]:
        tensors = collate(batch, pad_token_id)
        return {name: tensors[name] for name in names}

    device = next(model.parameters()).device
    steps = epochs * math.ceil(len(windows) / batch_size)
    with tempfile.TemporaryDirectory(prefix="sparse_attn-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=round(warmup_share * steps),
            seed=seed,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = _WindowTrainer(
            model=model,
            args=arguments,
            data_collator=collate_named,
            train_dataset=list(windows),
            callbacks=[_Bar(description, shown=progress)],
            optimizers=(_optimizer(model, learning_rate, head_learning_rate, weight_decay), None),
        )
        trainer.remove_callback(PrinterCallback)
        with _dropout(model, dropout):
            trainer.train()
    model.eval()
    model.zero_grad(set_to_none=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def require_accelerate() -> None:
    """Raises ModuleNotFoundError where accelerate, which transformers' Trainer needs, is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise ModuleNotFoundError(
            'fine-tuning needs accelerate, which is not installed: pip install "sparse-attn[bench]"'
        )


class LengthGroupedBatches:
    """Batch sampler: random batches of windows of similar length, drawn anew for every pass.

    Windows are shuffled, each run of 16 batches is sorted by length, and the batches are shuffled again:
    hardly any padding, and still a random order.
    """

    drop_last = False

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = torch.randperm(len(self.lengths), generator=self.generator)
        batches = []
        for run in shuffled.split(_BATCHES_SORTED_TOGETHER * self.batch_size):
            longest_first = run[self.lengths[run].argsort(descending=True, stable=True)]
            batches.extend(longest_first.split(self.batch_size))
        for index in torch.randperm(len(batches), generator=self.generator):
            yield batches[index].tolist()


class _WindowTrainer(Trainer):
    """Trainer whose training batches hold windows of similar length."""

    def get_train_dataloader(self) -> DataLoader:
        lengths = [len(window.input_ids) for window in self.train_dataset]
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=LengthGroupedBatches(lengths, self.args.per_device_train_batch_size, self.args.seed),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


class _Bar(TrainerCallback):
    """A progress bar with a description and the epoch's loss, on the first process."""

    def __init__(self, description: str, shown: bool):
        self.description, self.shown = description, shown

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = not self.shown or not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, desc=self.description, disable=hidden, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _optimizer(
    model: torch.nn.Module, learning_rate: float, head_learning_rate: float | None, weight_decay: float
) -> torch.optim.AdamW:
    encoder = {id(parameter) for parameter in getattr(model, "base_model", model).parameters()}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        rate = learning_rate if head_learning_rate is None or id(parameter) in encoder else head_learning_rate
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()], fused=True
    )


@contextmanager
def _dropout(model: torch.nn.Module, share: float | None) -> Iterator[None]:
    """Sets the share that the model's dropout modules drop; None changes nothing."""
    before = {module: module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    for module, own in before.items():
        module.p = own if share is None else share
    try:
        yield
    finally:
        for module, own in before.items():
            module.p = own


def _check(model, windows, epochs, learning_rate, batch_size, warmup_share) -> None:
    if not windows:
        raise ValueError("no windows to train on; expected at least one, from make_windows")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs is {epochs} and batch_size {batch_size}; expected at least 1 each")
    if not learning_rate > 0 or not 0 <= warmup_share <= 1:
        raise ValueError(
            f"learning_rate is {learning_rate} and warmup_share {warmup_share}; expected a rate above 0 and "
            "a share from 0 to 1"
        )
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if dtypes:
        raise TypeError(f"the model has weights of {sorted(map(str, dtypes))}; train in float32: model.float()")
