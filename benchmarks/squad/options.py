"""Options of `python -m benchmarks.squad`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..options import DTYPES, OneLineParser, at_least, folder_to_write, names, number
from .checkpoints import DistilRecipe
from .recovery import KINDS
from .shapes import SHAPES
from .sweeps import SWEEPS, Sweep
from .variants import COMPILED, DEFAULT, NAMES

_MADE_MASKS = {"sparsity": 0.9, "granularity": ["element"]}  # options that --mask leaves no room for


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m benchmarks.squad",
        description="Measures dense and sparse attention on SQuAD: exact match, F1, time and memory. "
        "Without --model and --data it runs offline, on the packaged MiniLM and the project's own questions.",
    )
    _add_inputs(parser.add_argument_group("model and data"))
    _add_mask(parser.add_argument_group("mask"))
    _add_measurement(parser.add_argument_group("measurement"))
    _add_training(parser.add_argument_group("fine-tuning"))
    return parser


def default_of(parser: argparse.ArgumentParser, name: str) -> Any:
    """What an option is that nobody passes, as results record it."""
    return _MADE_MASKS.get(name, parser.get_default(name))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; a bad one ends the program with one line on stderr and exit status 2."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    given = [name for name in _MADE_MASKS if getattr(options, name) is not None]
    if options.mask is not None and given:
        parser.error(f"argument --mask: --{given[0]} is of masks that are made; this one stays as it is")
    for name in _MADE_MASKS:
        setattr(options, name, default_of(parser, name) if getattr(options, name) is None else getattr(options, name))
    return options


def _add_inputs(group) -> None:
    group.add_argument(
        "--model",
        help=f"folder or hub name of a question-answering model; {' or '.join(SHAPES)}: random weights in that shape, "
        "for time and memory alone",
    )
    group.add_argument("--data", help="SQuAD v1.1 file, or hub name, to evaluate on")
    group.add_argument("--train-data", help="SQuAD v1.1 file, or hub name, for averages and --finetune")
    group.add_argument("--limit", type=at_least(1), help="evaluate on the first questions only")
    group.add_argument(
        "--max-length",
        type=at_least(16),
        default=384,
        help="tokens of a window, and mask side (default: %(default)s)",
    )
    group.add_argument(
        "--stride",
        type=at_least(0),
        default=128,
        help="context tokens that windows share (default: %(default)s)",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with --model")


def _add_mask(group) -> None:
    group.add_argument(
        "--sparsity",
        type=_sparsity,
        help=f"share of positions to prune, in [0, 1) (default: {_MADE_MASKS['sparsity']})",
    )
    group.add_argument(
        "--granularity",
        type=_granularities,
        help="element, tile (16 queries x 1 key together), or both, by a comma: rows for each mask (default: element)",
    )
    group.add_argument(
        "--bits",
        type=_bits,
        default=3,
        help="1 to 8, or none: no row with rounded probabilities (default: %(default)s)",
    )
    group.add_argument("--mask", type=Path, help="file of a global mask, instead of collecting averages")


def _add_measurement(group) -> None:
    group.add_argument(
        "--variants",
        type=names,
        help=f"names of the rows to measure, by commas, among {', '.join(NAMES)} (default: {', '.join(DEFAULT)}; on "
        f"a CPU without {', '.join(COMPILED)}, which compile for minutes there)",
    )
    group.add_argument(
        "--sweep",
        nargs=2,
        action=_AddSweep,
        default=[],
        metavar=("NAME", "VALUES"),
        help="more rows of sparse-unpadded, and curves: sparsity 0,0.5,0.9 or bits none,8,4,3,2,1; repeatable",
    )
    group.add_argument("--batch-size", type=at_least(1), default=32, help="windows a batch (default: %(default)s)")
    group.add_argument(
        "--tokens-per-batch",
        type=at_least(1),
        help="instead of --batch-size: most tokens a batch, as its number of windows times its longest one",
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    group.add_argument(
        "--repeats",
        type=at_least(1),
        default=3,
        help="timed passes after one to warm up (default: %(default)s)",
    )
    group.add_argument(
        "--output",
        type=folder_to_write,
        default="results/squad",
        help="folder for the results (default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="take rows that an interrupted run has measured from --output, if nothing they depend on has changed",
    )
    group.add_argument(
        "--cache",
        type=folder_to_write,
        default="~/.cache/sparse_attn",
        help="folder for fine-tuned models (default: %(default)s)",
    )


def _add_training(group) -> None:
    group.add_argument(
        "--finetune",
        action="store_true",
        help="train on --train-data, or on two thirds of the articles of --data: dense, then masked",
    )
    group.add_argument(
        "--epochs",
        type=at_least(1),
        default=3,
        help="of --finetune, and of training a head (default: %(default)s)",
    )
    group.add_argument("--seed", type=at_least(0, 2**31), default=0, help="of training (default: %(default)s)")
    group.add_argument(
        "--seeds",
        type=at_least(1),
        default=1,
        help="train so often, with --seed and the seeds after it; EM and F1 are means (default: %(default)s)",
    )
    group.add_argument(
        "--recover",
        choices=KINDS,
        help="weights of the sparse rows: retrain on the labels, or distil from the dense model on unlabelled text "
        "(default: distil with --finetune, else none)",
    )
    group.add_argument(
        "--recover-text",
        type=Path,
        help="text file to distil on (default: the training questions' windows)",
    )
    group.add_argument(
        "--recover-epochs",
        type=at_least(1),
        help=f"(default: {DistilRecipe.epochs} to distil, --epochs to retrain)",
    )
    group.add_argument(
        "--rounding-epochs",
        type=at_least(0),
        default=0,
        help="of --recover distil, after the others, through the rounding of rows with bits, which so get weights of "
        "their own (default: none)",
    )
    group.add_argument(
        "--table",
        choices=("published", "renormalised", "calibrated", "calibrated-by-layer"),
        default="published",
        help="values that --bits rounds to: published, these renormalised, or calibrated ones, renormalised too, for "
        "all layers or each; fitted to the sparse model's probabilities (default: %(default)s)",
    )


class _AddSweep(argparse.Action):
    """Appends a `Sweep`, its values checked like those of the option that is swept."""

    def __call__(self, parser, options, values, option_string=None):
        name, texts = values
        types = {"sparsity": _sparsity, "bits": _bits}
        if name not in SWEEPS:
            parser.error(f"argument --sweep: {name!r} cannot be swept; expected {' or '.join(SWEEPS)}")
        try:
            swept = [types[name](text) for text in names(texts)]
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --sweep: {error}")
        sweeps = getattr(options, self.dest)
        if not swept or name in [sweep.name for sweep in sweeps]:
            parser.error(f"argument --sweep: expected values for {name} once, separated by commas")
        setattr(options, self.dest, [*sweeps, Sweep(name, list(dict.fromkeys(swept)))])


def _granularities(text: str) -> list[str]:
    found = list(dict.fromkeys(names(text)))
    if not found or set(found) - {"element", "tile"}:
        raise argparse.ArgumentTypeError(f"{text!r}: invalid choice; expected element, tile or element,tile")
    return found


def _sparsity(text: str) -> float:
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is outside [0, 1): the share of positions to prune")
    return value


def _bits(text: str) -> int | None:
    if text == "none":
        return None
    if text not in tuple("12345678"):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, or outside 1 to 8; expected bits, or none")
    return int(text)
