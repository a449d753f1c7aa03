"""What the SQuAD benchmark was asked for, read and checked before anything is trained or measured."""

from __future__ import annotations

import importlib.util
import time
from argparse import Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sparse_attn import AttentionAverages, GlobalMask, patched
from sparse_attn.distributed import rank_and_world
from sparse_attn.extension import how_to_install
from sparse_attn.squad.reading import Question
from sparse_attn.squad.windows import Window, length_sorted_batches, make_windows
from sparse_attn.training import require_accelerate

from ..launched import own_device
from ..options import chosen
from .checkpoints import load_model, load_tokenizer, packaged_model
from .data import choose_questions, own_questions
from .feeding import first_position
from .options import default_of, make_parser
from .recovery import RecoveryText, read_recovery
from .shapes import SHAPES, shape_config
from .variants import NAMES, Variant, default_names, table_variants

_SMALLEST_MASK = 16


@dataclass
class Setting:
    """The checked input.

    Attributes:
        options: of the command line.
        device: to train and to measure on.
        variants: the rows.
        granularities: of the rows' masks; [None] for a mask of --mask that does not say.
        model_source: folder or hub name of the model as given, or the name of a shape.
        model: in float32 on `device`; without a trained head if `head_windows` are there to train it. With a shape, the
            packaged model, whose averages the masks come from.
        layers: of the model that the rows are measured with.
        revision: commit on the hub that the model came from, or None.
        tokenizer: the model's.
        questions: to evaluate on, called `data_name`.
        windows: of the questions, made in `tokenisation_seconds`.
        batches: of them, as indices of windows.
        head_windows: to fine-tune on, each with its answer, or None.
        averages_windows: to collect averages on; where these come from is `averages_from`.
        given_mask: of --mask, or None.
        recovery: text for --recover distil, or None.
        averages: those collected so far, by the seed that their model was trained with.
    """

    options: Namespace
    device: torch.device
    variants: list[Variant]
    granularities: list[str | None]
    model_source: str
    model: PreTrainedModel
    layers: int
    revision: str | None
    tokenizer: object
    questions: list[Question]
    data_name: str
    windows: list[Window]
    batches: list[list[int]]
    tokenisation_seconds: float
    head_windows: list[Window] | None
    averages_windows: list[Window]
    averages_from: str
    given_mask: GlobalMask | None
    recovery: RecoveryText | None
    averages: dict[int, AttentionAverages] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """What the model is called in results."""
        return Path(self.options.model).name if self.options.model else "all-MiniLM-L6-v2"

    @property
    def random_weights(self) -> bool:
        """Whether answers mean nothing."""
        return self.model_source in SHAPES

    @property
    def masked(self) -> bool:
        """Whether any row needs a mask."""
        return any(variant.masked for variant in self.variants) or bool(self.options.sweep)

    @property
    def longest(self) -> int:
        """Length of the longest batch that a row with a mask gets."""
        if any(variant.masked and (variant.padding == "max" or not variant.sparse) for variant in self.variants):
            return self.options.max_length
        return max(len(window.input_ids) for window in self.windows)

    def with_granularity(self, granularity: str | None) -> Setting:
        """The same with one granularity; averages are shared."""
        return replace(self, granularities=[granularity])

    def with_options(self, **changed: object) -> Setting:
        """The same with other options."""
        return replace(self, options=Namespace(**{**vars(self.options), **changed}))


def read_setting(options: Namespace) -> Setting:
    """Reads and checks what `options` name.

    Raises ValueError, TypeError, OSError, RuntimeError or ImportError with a message that says what is wrong.
    """
    _require_packages("matplotlib", "rich", "torchmetrics")
    device = own_device(options.device)
    given_mask = None if options.mask is None else GlobalMask.load(options.mask)
    _check_mask_options(options, given_mask)
    granularities = options.granularity if given_mask is None else [given_mask.metadata.get("granularity")]
    variants = _chosen_variants(options, device, granularities)
    sets = choose_questions(options)
    shape = options.model in SHAPES
    source = packaged_model() if shape or options.model is None else options.model
    tokenizer = load_tokenizer(source, options.trust_remote_code)
    torch.manual_seed(options.seed)  # of a head that is yet to be trained
    model, missing = load_model(source, options.trust_remote_code)
    config = shape_config(options.model) if shape else model.config
    trains = options.finetune or options.model is None
    if shape and (trains or options.recover not in (None, "none") or options.seeds > 1):
        raise ValueError(
            f"--model {options.model} has random weights, which --finetune, --recover and --seeds cannot make better; "
            "leave them out or pass a pretrained --model"
        )
    if trains:
        require_accelerate()
    elif options.epochs != default_of(make_parser(), "epochs"):
        raise ValueError(f"--epochs {options.epochs}: this run trains nothing on labels; add --finetune")
    elif missing and not shape:
        raise ValueError(
            f"--model {options.model}: no trained question-answering head (weights absent: "
            f"{', '.join(missing)}); pass a model fine-tuned on SQuAD, or --finetune to train one"
        )
    _check_positions(config, 0 if shape else first_position(model), options.max_length)

    def windows_of(questions: list[Question]) -> list[Window]:
        return make_windows(questions, tokenizer, options.max_length, options.stride)

    start = time.perf_counter()
    windows = windows_of(sets.evaluation)
    tokenisation_seconds = time.perf_counter() - start
    _check_vocabulary(options.model or source, model, windows)
    batches = _batches(options, windows)
    training_windows = windows_of(sets.training) if sets.training is not None else None
    head_windows = None
    if trains:
        from_training = options.finetune or sets.own_training
        candidates = training_windows if from_training else windows_of(own_questions()[0])
        head_windows = [window for window in candidates if window.end_position > 0]
        if not head_windows:
            raise ValueError(
                f"no window of the {len(candidates)} to train on holds an answer; expected answers that stand where "
                "their records say"
            )
    if given_mask is not None:
        averages_windows, averages_from = [], "none: --mask"
    elif training_windows is not None:
        averages_windows, averages_from = training_windows, sets.training_name
    else:
        averages_windows, averages_from = windows, f"evaluation inputs ({sets.evaluation_name})"
    if shape and given_mask is None:
        made, own = config.num_hidden_layers, model.config.num_hidden_layers
        averages_from += f"; layer i of {made} has the mask of all-MiniLM-L6-v2's layer i * {own} // {made}"
    recovery = read_recovery(options, tokenizer, training_windows, sets.training_name, head_windows, variants)
    setting = Setting(
        options=options,
        device=device,
        variants=variants,
        granularities=granularities,
        model_source=options.model if shape else source,
        model=model.to(device),
        layers=config.num_hidden_layers,
        revision=getattr(model.config, "_commit_hash", None),
        tokenizer=tokenizer,
        questions=sets.evaluation,
        data_name=sets.evaluation_name,
        windows=windows,
        batches=batches,
        tokenisation_seconds=tokenisation_seconds,
        head_windows=head_windows,
        averages_windows=averages_windows,
        averages_from=averages_from,
        given_mask=given_mask,
        recovery=recovery,
    )
    if setting.masked:
        _check_patching(setting, config)
    return setting


def _require_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the benchmark needs {', '.join(missing)}, not installed here: {how_to_install('bench')}"
        )


def _chosen_variants(options: Namespace, device: torch.device, granularities: list[str | None]) -> list[Variant]:
    names = default_names(device.type)
    if options.variants is not None:
        names = chosen("--variants", options.variants, NAMES)
    variants = table_variants(names, granularities, options.bits)
    if not variants:
        raise ValueError(f"--variants {','.join(names)}: no such row with --bits none")
    swept = [width for sweep in options.sweep if sweep.name == "bits" for width in sweep.values]
    if options.table != "published" and not any([*(variant.bits for variant in variants), *swept]):
        raise ValueError(f"--table {options.table}: no row rounds probabilities; add rows with +bits to --variants")
    return variants


def _check_mask_options(options: Namespace, mask: GlobalMask | None) -> None:
    if mask is not None and "sparsity" in [sweep.name for sweep in options.sweep]:
        raise ValueError("--sweep sparsity: masks of other sparsities need averages, which --mask leaves out")


def _check_positions(config: PretrainedConfig, first: int, max_length: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions - first:
        raise ValueError(
            f"--max-length {max_length}: the model has {positions - first} positions; expected at most that"
        )


def _check_vocabulary(name: str, model: PreTrainedModel, windows: list[Window]) -> None:
    """Refuses a tokenizer of another model, whose words this one does not have."""
    largest, words = max(max(window.input_ids) for window in windows), model.get_input_embeddings().num_embeddings
    if largest >= words:
        raise ValueError(
            f"--model {name}: its tokenizer has a token {largest}, but the model knows {words} tokens only"
        )


def _batches(options: Namespace, windows: list[Window]) -> list[list[int]]:
    """Batches by length. Raises ValueError for a budget that a window exceeds, and where processes would get none."""
    longest = max(len(window.input_ids) for window in windows)
    if options.tokens_per_batch is not None and options.tokens_per_batch < longest:
        raise ValueError(f"--tokens-per-batch {options.tokens_per_batch}: the longest window has {longest}")
    batch_size = options.batch_size if options.tokens_per_batch is None else None
    batches = length_sorted_batches(windows, batch_size, tokens_per_batch=options.tokens_per_batch)
    _, processes = rank_and_world()
    if len(batches) < processes:
        raise ValueError(
            f"{len(windows)} windows make {len(batches)} batch{'es' if len(batches) > 1 else ''} for {processes} "
            "processes; expected one for each at least: lower --batch-size, or launch fewer processes"
        )
    return batches


def _check_patching(setting: Setting, config: PretrainedConfig) -> None:
    """Refuses a model or mask that cannot be used, before hours are spent on it."""
    mask = setting.given_mask
    if mask is None:
        shape = (setting.model.config.num_hidden_layers, setting.model.config.num_attention_heads)
        mask = GlobalMask(torch.ones(*shape, _SMALLEST_MASK, _SMALLEST_MASK, dtype=torch.bool))
    elif setting.longest > min(mask.query_len, mask.key_len):
        raise ValueError(
            f"--mask {setting.options.mask}: made for {mask.query_len} x {mask.key_len} positions, but "
            f"inputs have {setting.longest}; pass a longer mask or a smaller --max-length"
        )
    elif setting.random_weights:
        if (mask.layers, mask.heads) != (config.num_hidden_layers, config.num_attention_heads):
            raise ValueError(
                f"--mask {setting.options.mask}: {mask.layers} layers x {mask.heads} heads, but {setting.model_source} "
                f"has {config.num_hidden_layers} x {config.num_attention_heads}"
            )
        return
    with patched(setting.model, mask, bits=None):
        pass
