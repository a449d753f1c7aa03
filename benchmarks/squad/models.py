"""The checkpoints, the mask and the table that the rows of the SQuAD table are measured with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from sparse_attn import (
    GlobalMask,
    ProbabilityHistogram,
    QuantizationTable,
    calibrated_table,
    collect_probabilities,
    log_table,
    renormalised_table,
)
from sparse_attn.calibration import merged

from ..measure import add_seconds
from .checkpoints import Checkpoint, DistilRecipe, Recipe, RoundingRecipe, distilled, finetuned, load_model
from .masks import make_mask, model_batches
from .recovery import recover_kind
from .setting import Setting
from .variants import Variant

_CALIBRATION_WINDOWS = 64


@dataclass
class Models:
    """What rows load: `dense` those without a mask; `sparse` or `rounded`, `mask` and tables those with one.

    Attributes:
        dense: as given, or fine-tuned.
        sparse: recovered with `mask`; the dense one if nothing was.
        rounded: recovered further through rounding to --bits, or None.
        mask: of --granularity (the first, if there are several) and --sparsity, or of --mask.
        seconds: how long fine-tuning, averages, mask, recovery and calibration took.
        probabilities: of each layer, with `mask` and the weights of each sparse checkpoint, by its path, for tables
            other than the published one.
        table_kind: "published", "renormalised" (the published bins, rows' sums restored), "calibrated" (bins fitted,
            then rows' sums restored) or "calibrated-by-layer" (likewise, for each layer alone).
    """

    dense: Checkpoint
    sparse: Checkpoint
    rounded: Checkpoint | None = None
    mask: GlobalMask | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    probabilities: dict[str, list[ProbabilityHistogram]] = field(default_factory=dict)
    table_kind: str = "published"

    def checkpoint(self, variant: Variant) -> Checkpoint:
        """The weights of a row."""
        if not (variant.masked and variant.own_weights):
            return self.dense
        return self.rounded if variant.rounded_weights and self.rounded is not None else self.sparse

    def tables(self, bits: int | None, checkpoint: Checkpoint) -> tuple[QuantizationTable, ...] | None:
        """The table of each layer for so many bits with a checkpoint's weights; None for no bits."""
        if bits is None:
            return None
        if self.table_kind == "published":
            return (log_table(bits),) * self.mask.layers
        histograms = self.probabilities[checkpoint.path]
        if self.table_kind == "calibrated-by-layer":
            return tuple(renormalised_table(one, calibrated_table(one, bits)) for one in histograms)
        together = merged(histograms)
        fitted = calibrated_table(together, bits) if self.table_kind == "calibrated" else bits
        return (renormalised_table(together, fitted),) * self.mask.layers


def make_models(setting: Setting, seed: int | None = None) -> Models:
    """Fine-tunes, collects averages, prunes, recovers accuracy and counts probabilities, as far as asked for.

    `seed`, by default that of the options, is of new heads, the order of batches and dropout; `setting` keeps its
    model.
    """
    seed = setting.options.seed if seed is None else seed
    given = Checkpoint(setting.model_source, setting.model_name)
    models = Models(given, given, table_kind=setting.options.table)
    model = _given_model(setting, seed)
    setting = replace(setting.with_options(seed=seed), model=model)
    options = setting.options
    if setting.head_windows is not None:
        with add_seconds(models.seconds, "finetuning_dense"):
            untrained, recipe = copy.deepcopy(model), Recipe(options.epochs, seed)
            models.dense = finetuned(untrained, setting.tokenizer, setting.head_windows, recipe, options.cache)
            setting.model = _loaded(setting, models.dense)
        models.sparse = models.dense
    if not setting.masked:
        return models
    models.mask = make_mask(setting, setting.granularities[0], options.sparsity, models.seconds)
    kind = recover_kind(options)
    if kind != "none":
        with add_seconds(models.seconds, "recovery"):
            models.sparse = _recovered(setting, models.mask)
    _calibrate(setting, models, models.sparse)
    if kind == "distil" and options.rounding_epochs and any(one.rounded_weights for one in setting.variants):
        with add_seconds(models.seconds, "recovery"):
            models.rounded = _recovered_through_rounding(setting, models)
        _calibrate(setting, models, models.rounded)
    return models


def _given_model(setting: Setting, seed: int) -> PreTrainedModel:
    """The model as given; where its head is new, as `seed` draws it."""
    if setting.model is not None and seed == setting.options.seed:
        return setting.model
    torch.manual_seed(seed)
    return _loaded(setting, Checkpoint(setting.model_source, setting.model_name))


def _recovered(setting: Setting, mask: GlobalMask) -> Checkpoint:
    """The sparse checkpoint that --recover makes of `setting.model`, the dense one."""
    options, student = setting.options, copy.deepcopy(setting.model)
    if recover_kind(options) == "retrain":
        recipe = Recipe(options.recover_epochs or options.epochs, options.seed)
        return finetuned(student, setting.tokenizer, setting.head_windows, recipe, options.cache, mask)
    recipe = DistilRecipe(options.seed, options.recover_epochs or DistilRecipe.epochs)
    text, teacher = setting.recovery, setting.model
    return distilled(student, teacher, setting.tokenizer, text.inputs, recipe, options.cache, mask, text.source)


def _recovered_through_rounding(setting: Setting, models: Models) -> Checkpoint:
    """The sparse checkpoint, distilled further with probabilities rounded to --bits."""
    options, student = setting.options, _loaded(setting, models.sparse)
    recipe, tables = RoundingRecipe(options.seed, options.rounding_epochs), models.tables(options.bits, models.sparse)
    text, tokenizer = setting.recovery, setting.tokenizer
    return distilled(
        student, setting.model, tokenizer, text.inputs, recipe, options.cache, models.mask, text.source, tables
    )


def _calibrate(setting: Setting, models: Models, checkpoint: Checkpoint) -> None:
    """Counts the probabilities that tables are fitted to, where any are."""
    if models.table_kind != "published":
        with add_seconds(models.seconds, "calibration"):
            model = _loaded(setting, checkpoint)
            models.probabilities[checkpoint.path] = _probabilities(setting, model, models.mask)


def _probabilities(setting: Setting, model: PreTrainedModel, mask: GlobalMask) -> list[ProbabilityHistogram]:
    """Those of each layer of `model` with `mask`, on some of the windows that averages come from."""
    windows = setting.averages_windows or setting.head_windows or setting.windows
    windows = windows[:: max(1, len(windows) // _CALIBRATION_WINDOWS)][:_CALIBRATION_WINDOWS]
    batches = model_batches(setting, windows, "probabilities")
    return collect_probabilities(model, batches, mask, by_layer=True, progress=False)


def _loaded(setting: Setting, checkpoint: Checkpoint) -> PreTrainedModel:
    return load_model(checkpoint.path, setting.options.trust_remote_code)[0].to(setting.device)
