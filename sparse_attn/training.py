"""The training loop that fine-tuning and distillation share: transformers' Trainer on batches of similar length."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .arguments import expect_flags, expect_numbers, expect_shares, expect_whole
from .extension import how_to_install
from .integrations.transformers import longest_input

_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, a linear rise and fall of the rate, gradients clipped to norm 1.

    Attributes:
        epochs: passes over the examples.
        learning_rate: its peak.
        batch_size: examples per step and process.
        head_learning_rate: the peak for weights outside the encoder; `learning_rate` if None.
        warmup_share: share of the steps in which the rate rises.
        weight_decay: of AdamW; biases and layer norms are exempt.
        dropout: instead of the model's own; None leaves that as it is.
        seed: of dropout and of the order of the batches.

    Raises ValueError for a number that is out of range, TypeError for what is no number.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    head_learning_rate: float | None = None
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    dropout: float | None = None
    seed: int = 0

    def __post_init__(self):
        expect_whole(epochs=self.epochs, batch_size=self.batch_size)
        expect_whole(0, seed=self.seed)
        expect_numbers(learning_rate=self.learning_rate, warmup_share=self.warmup_share, weight_decay=self.weight_decay)
        expect_numbers(or_none=True, head_learning_rate=self.head_learning_rate)
        expect_shares(or_none=True, dropout=self.dropout)
        if not 0 < self.learning_rate < math.inf or not 0 <= self.warmup_share <= 1:
            raise ValueError(
                f"learning_rate is {self.learning_rate} and warmup_share {self.warmup_share}; expected a rate above "
                "0 and a share from 0 to 1"
            )
        if not 0 <= (self.head_learning_rate or 0) < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"head_learning_rate is {self.head_learning_rate} and weight_decay {self.weight_decay}; expected "
                "numbers from 0 on"
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}, expected a whole number from 0 to 2 ** 32 - 1")


def require_accelerate() -> None:
    """Raises ModuleNotFoundError where accelerate, which transformers' Trainer needs, is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise ModuleNotFoundError(f"training needs accelerate, which is not installed: {how_to_install('bench')}")


class LengthGroupedBatches:
    """Batch sampler: random batches of examples of similar length, drawn anew for every pass.

    Examples are shuffled, each run of 16 batches is sorted by length, and the batches are shuffled again:
    hardly any padding, and still a random order. A batch of fewer examples comes last: elsewhere, accelerate would
    leave out the batches that other processes have at the same time.
    """

    drop_last = False

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths = torch.as_tensor(lengths, device="cpu")
        self.batch_size = batch_size
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = torch.randperm(len(self.lengths), generator=self.generator, device="cpu")
        batches = []
        for run in shuffled.split(_BATCHES_SORTED_TOGETHER * self.batch_size):
            longest_first = run[self.lengths[run].argsort(descending=True, stable=True)]
            batches.extend(longest_first.split(self.batch_size))
        order = torch.randperm(len(batches), generator=self.generator, device="cpu").tolist()
        for index in sorted(order, key=lambda index: len(batches[index]) < self.batch_size):
            yield batches[index].tolist()


class GroupedTrainer(Trainer):
    """Trainer whose training batches hold examples of similar length.

    `lengths` are those of the examples of `train_dataset`; the other arguments are Trainer's.
    """

    def __init__(self, *, lengths: Sequence[int], **arguments):
        super().__init__(**arguments)
        self.lengths = lengths

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=LengthGroupedBatches(self.lengths, self.args.per_device_train_batch_size, self.args.seed),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


def train(
    model: torch.nn.Module,
    examples: Sequence[Any],
    lengths: Sequence[int],
    collate: Callable[[list], dict[str, torch.Tensor]],
    schedule: Schedule,
    *,
    progress: bool,
    description: str,
    trainer: type[GroupedTrainer] = GroupedTrainer,
    **parts: Any,
) -> list[float]:
    """Trains all weights of `model`, in float32 on the device to train on, and leaves it in evaluation mode.

    The same model, examples, schedule and number of threads give the same weights; the generators of torch, NumPy and
    Python are seeded. Started by `torchrun` or `accelerate launch`, every process takes its share of the batches.

    Args:
        model: changed in place.
        examples: what to train on; `lengths` are their numbers of tokens, and `collate` makes a batch of some.
        schedule: how.
        progress: show a bar on stderr, with `description` as its text.
        trainer: which loss; `parts` are further arguments of its constructor.

    Returns:
        The mean loss of each epoch; not finite where training diverged.

    Raises:
        ModuleNotFoundError: accelerate is not installed.
        TypeError: weights of a dtype other than float32.
        ValueError: all weights are frozen, or an example is longer than the mask of a patched model.

    Warns where training diverged.
    """
    require_accelerate()
    expect_flags(progress=progress)
    _expect_to_fit(model, lengths)
    dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if dtypes:
        raise TypeError(f"the model has weights of {sorted(map(str, dtypes))}; train in float32: model.float()")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("all weights of the model are frozen; expected some to train: model.requires_grad_(True)")
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory(prefix="sparse_attn-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=int(schedule.epochs),
            per_device_train_batch_size=int(schedule.batch_size),
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            seed=int(schedule.seed),
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="epoch",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
        )
        steps = schedule.epochs * math.ceil(len(examples) / (schedule.batch_size * arguments.world_size))
        arguments.warmup_steps = round(schedule.warmup_share * steps)
        arguments.mixed_precision = "no"  # whatever accelerate is configured to
        running = trainer(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=list(examples),
            lengths=lengths,
            callbacks=[_Bar(description, shown=progress)],
            optimizers=(_optimizer(model, schedule), None),
            **parts,
        )
        running.remove_callback(PrinterCallback)
        try:
            with _dropout(model, schedule.dropout), torch.inference_mode(False), torch.enable_grad():
                running.train()
        finally:
            model.eval()
            model.zero_grad(set_to_none=True)
    losses = [entry["loss"] for entry in running.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, losses)):
        warnings.warn(
            f"training diverged, its losses are {losses}: the weights are of no use. Lower learning_rate, which was "
            f"{schedule.learning_rate}",
            stacklevel=3,
        )
    return losses


def _expect_to_fit(model: torch.nn.Module, lengths: Sequence[int]) -> None:
    longest = longest_input(model)
    for index, length in enumerate(lengths if longest is not None else ()):
        if length > longest:
            raise ValueError(
                f"example {index} has {length} tokens, the model's mask covers {longest}; cut it "
                f"(tokenizer(..., truncation=True, max_length={longest})), or patch with a mask for longer inputs"
            )


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


def _optimizer(model: torch.nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    encoder = {id(parameter) for parameter in getattr(model, "base_model", model).parameters()}
    head_rate = schedule.learning_rate if schedule.head_learning_rate is None else schedule.head_learning_rate
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        rate = schedule.learning_rate if id(parameter) in encoder else head_rate
        decay = schedule.weight_decay if parameter.ndim > 1 else 0.0
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
