"""What the sparse rows' weights are recovered on: `--recover`, and the unlabelled text of `--recover distil`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_attn.distillation import text_windows
from sparse_attn.squad.windows import Window

from .shapes import SHAPES
from .variants import Variant

KINDS = ("none", "retrain", "distil")


@dataclass(frozen=True)
class RecoveryText:
    """Sequences of tokens to distil on, one field name -> values for each, and where they come from."""

    inputs: list[dict[str, list[int]]]
    source: str


def recover_kind(options: Namespace) -> str:
    """Which of `KINDS` is asked for: --recover, and without it, what --finetune stands for."""
    return options.recover or ("distil" if options.finetune else "none")


def read_recovery(
    options: Namespace,
    tokenizer,
    training: Sequence[Window] | None,
    training_name: str | None,
    head_windows: Sequence[Window] | None,
    variants: Sequence[Variant],
) -> RecoveryText | None:
    """The text of `--recover distil`; None for the other kinds.

    It is --recover-text, or else the windows of the training questions, or else those that the head is trained on.
    Nothing of what will be evaluated is among them.

    Raises FileNotFoundError or ValueError where something is absent that the kind needs, and for options that would
    change nothing.
    """
    kind = recover_kind(options)
    _check_recovery_options(options, kind, variants)
    if options.model in SHAPES and (kind != "none" or options.table != "published"):
        raise ValueError(
            f"--recover {kind}, --table {options.table}: {options.model} has random weights; leave them out"
        )
    if options.seeds > 1 and kind == "none" and head_windows is None:
        raise ValueError(f"--seeds {options.seeds}: nothing is trained here; add --finetune or --recover distil")
    if options.recover_text is not None and kind != "distil":
        raise ValueError(
            f"--recover-text is for --recover distil; this run has --recover {kind}: add it, or --finetune"
        )
    if kind == "retrain" and head_windows is None:
        raise ValueError("--recover retrain needs questions with answers to train on; add --finetune")
    if kind != "distil":
        return None
    if options.recover_text is not None:
        return RecoveryText(_windows_of_file(options, tokenizer), options.recover_text.name)
    windows, source = training, training_name
    if windows is None:
        windows, source = head_windows, "own questions, training articles"
    if windows is None:
        raise ValueError(
            "--recover distil needs text that is not evaluated: pass --recover-text FILE or --train-data, or add "
            "--finetune, which keeps two thirds of the articles of --data for training"
        )
    names = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]
    return RecoveryText([{name: getattr(window, name) for name in names} for window in windows], source)


def _check_recovery_options(options: Namespace, kind: str, variants: Sequence[Variant]) -> None:
    if options.recover not in (None, "none") and not (options.sweep or any(variant.masked for variant in variants)):
        raise ValueError(f"--recover {kind}: no row has a mask; add one of this package's to --variants")
    if options.recover_epochs is not None and kind == "none":
        raise ValueError("--recover-epochs: this run recovers nothing; add --recover distil, or --finetune")
    if options.rounding_epochs and (kind != "distil" or not any(variant.rounded_weights for variant in variants)):
        raise ValueError(
            "--rounding-epochs is for --recover distil and rows with bits, as sparse-unpadded+bits; this run has "
            f"--recover {kind} and {', '.join(dict.fromkeys(variant.label for variant in variants))}"
        )


def _windows_of_file(options: Namespace, tokenizer) -> list[dict[str, list[int]]]:
    path = Path(options.recover_text)
    if not path.is_file():
        raise FileNotFoundError(f"--recover-text {path}: no such file; expected a text file")
    try:
        return text_windows(path.read_text(encoding="utf-8"), tokenizer, options.max_length)
    except UnicodeDecodeError as error:
        raise ValueError(f"--recover-text {path}: not UTF-8 text ({error}); expected a text file") from error
    except ValueError as error:
        raise ValueError(f"--recover-text {path}: {error}") from error
