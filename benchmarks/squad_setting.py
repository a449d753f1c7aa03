"""What the SQuAD benchmark was asked for, read and checked before anything is trained or measured."""

from __future__ import annotations

import importlib.util
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparse_attn import GlobalMask, patched
from sparse_attn.squad.reading import Question
from sparse_attn.squad.windows import Window, make_windows
from sparse_attn.training import require_accelerate

from .device import pick_device
from .options import chosen
from .squad_checkpoints import load_model, load_tokenizer, packaged_model
from .squad_data import choose_questions, own_questions
from .squad_variants import Variant, table_variants

_SMALLEST_MASK = 16


@dataclass
class Setting:
    """The checked input.

    Attributes:
        options: of the command line.
        device: to train and to measure on.
        variants: the rows.
        model_source: folder or hub name of the model as given.
        model: in float32 on `device`; without a trained head if `head_windows` are there to train it.
        tokenizer: the model's.
        questions: to evaluate on, called `data_name`.
        windows: of the questions, made in `tokenisation_seconds`.
        head_windows: to fine-tune on, each with its answer, or None.
        averages_windows: to collect averages on; where these come from is `averages_from`.
        given_mask: of --mask, or None.
    """

    options: Namespace
    device: torch.device
    variants: list[Variant]
    model_source: str
    model: PreTrainedModel
    tokenizer: object
    questions: list[Question]
    data_name: str
    windows: list[Window]
    tokenisation_seconds: float
    head_windows: list[Window] | None
    averages_windows: list[Window]
    averages_from: str
    given_mask: GlobalMask | None

    @property
    def model_name(self) -> str:
        """What the model is called in results."""
        return Path(self.options.model).name if self.options.model else "all-MiniLM-L6-v2"

    @property
    def pad_to(self) -> int | None:
        """Length that batches are padded to; None: the longest window of each."""
        return self.options.max_length if self.options.padding == "max" else None

    @property
    def masked(self) -> bool:
        """Whether any row needs a mask."""
        return any(variant.masked for variant in self.variants)


def read_setting(options: Namespace) -> Setting:
    """Reads and checks what `options` name.

    Raises ValueError, TypeError, OSError, RuntimeError or ImportError with a message that says what is wrong.
    """
    _require_packages("matplotlib", "rich", "torchmetrics")
    device = pick_device(options.device)
    variants = _chosen_variants(options)
    sets = choose_questions(options)
    source = options.model or packaged_model()
    tokenizer = load_tokenizer(source, options.trust_remote_code)
    torch.manual_seed(options.seed)  # of a head that is yet to be trained
    model, missing = load_model(source, options.trust_remote_code)
    trains = options.finetune or options.model is None
    if trains:
        require_accelerate()
    elif missing:
        raise ValueError(
            f"--model {options.model}: no trained question-answering head (weights absent: "
            f"{', '.join(missing)}); pass a model fine-tuned on SQuAD, or --finetune to train one"
        )
    _check_positions(model, options.max_length)

    def windows_of(questions: list[Question]) -> list[Window]:
        return make_windows(questions, tokenizer, options.max_length, options.stride)

    start = time.perf_counter()
    windows = windows_of(sets.evaluation)
    tokenisation_seconds = time.perf_counter() - start
    training_windows = windows_of(sets.training) if sets.training is not None else None
    head_windows = None
    if trains:
        from_training = options.finetune or sets.own_training
        candidates = training_windows if from_training else windows_of(own_questions()[0])
        head_windows = [window for window in candidates if window.end_position > 0]
    if options.mask is not None:
        averages_windows, averages_from = [], "none: --mask"
    elif training_windows is not None:
        averages_windows, averages_from = training_windows, sets.training_name
    else:
        averages_windows, averages_from = windows, f"evaluation inputs ({sets.evaluation_name})"
    setting = Setting(
        options=options,
        device=device,
        variants=variants,
        model_source=source,
        model=model.to(device),
        tokenizer=tokenizer,
        questions=sets.evaluation,
        data_name=sets.evaluation_name,
        windows=windows,
        tokenisation_seconds=tokenisation_seconds,
        head_windows=head_windows,
        averages_windows=averages_windows,
        averages_from=averages_from,
        given_mask=None if options.mask is None else GlobalMask.load(options.mask),
    )
    if setting.masked:
        _check_patching(setting)
    return setting


def _require_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the benchmark needs {', '.join(missing)}, not installed here: pip install 'sparse-attn[bench]'"
        )


def _chosen_variants(options: Namespace) -> list[Variant]:
    variants = table_variants(options.padding, options.dtype, options.bits)
    names = chosen("--variants", options.variants, list(dict.fromkeys(variant.name for variant in variants)))
    return [variant for variant in variants if variant.name in names]


def _check_positions(model: PreTrainedModel, max_length: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"--max-length {max_length}: the model has {positions} positions; expected at most that")


def _check_patching(setting: Setting) -> None:
    """Refuses a model or mask that cannot be used, before hours are spent on it."""
    mask, longest = setting.given_mask, max(len(window.input_ids) for window in setting.windows)
    longest = setting.pad_to or longest
    if mask is None:
        shape = (setting.model.config.num_hidden_layers, setting.model.config.num_attention_heads)
        mask = GlobalMask(torch.ones(*shape, _SMALLEST_MASK, _SMALLEST_MASK, dtype=torch.bool))
    elif longest > min(mask.query_len, mask.key_len):
        raise ValueError(
            f"--mask {setting.options.mask}: made for {mask.query_len} x {mask.key_len} positions, but "
            f"inputs have {longest}; pass a longer mask or a smaller --max-length"
        )
    with patched(setting.model, mask, bits=None):
        pass
