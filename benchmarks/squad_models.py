"""The checkpoints and the mask that the rows of the SQuAD table are measured with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from sparse_attn import GlobalMask, collect_averages
from sparse_attn.progress import progress
from sparse_attn.squad.windows import collate, length_sorted_batches

from .squad_checkpoints import Checkpoint, Recipe, finetuned, input_names, load_model
from .squad_setting import Setting


@dataclass
class Models:
    """What the rows load: `dense` for rows without a mask, `sparse` and `mask` for those with one.

    `seconds` says how long fine-tuning, averages and mask took.
    """

    dense: Checkpoint
    sparse: Checkpoint
    mask: GlobalMask | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def make_models(setting: Setting) -> Models:
    """Fine-tunes, collects averages, prunes and fine-tunes with the mask applied, as far as asked for."""
    options = setting.options
    recipe = Recipe(epochs=options.epochs, seed=options.seed)
    dense = Checkpoint(setting.model_source, setting.model_name)
    models = Models(dense, dense)
    if setting.head_windows is not None:
        start = time.perf_counter()
        models.dense = finetuned(setting.model, setting.tokenizer, setting.head_windows, recipe, options.cache)
        models.sparse = models.dense
        setting.model = _loaded(setting, models.dense)
        models.seconds["finetuning_dense"] = time.perf_counter() - start
    if not setting.masked:
        return models
    models.mask = setting.given_mask or _collected_mask(setting, models.seconds)
    if options.finetune:
        start = time.perf_counter()
        models.sparse = finetuned(
            setting.model, setting.tokenizer, setting.head_windows, recipe, options.cache, models.mask
        )
        models.seconds["finetuning_sparse"] = time.perf_counter() - start
    return models


def _loaded(setting: Setting, checkpoint: Checkpoint):
    return load_model(checkpoint.path, setting.options.trust_remote_code)[0].to(setting.device)


def _collected_mask(setting: Setting, seconds: dict[str, float]) -> GlobalMask:
    options = setting.options
    start = time.perf_counter()
    averages = collect_averages(
        setting.model,
        _inputs(setting),
        max_length=options.max_length,
        progress=False,
        model_name=setting.model_name,
        data_name=setting.averages_from,
    )
    averaged = time.perf_counter()
    mask = GlobalMask.from_averages(averages, options.sparsity, granularity=options.granularity)
    seconds["averages"] = averaged - start
    seconds["mask"] = time.perf_counter() - averaged
    return mask


def _inputs(setting: Setting) -> Iterator[dict[str, torch.Tensor]]:
    windows, names = setting.averages_windows, input_names(setting.tokenizer)
    for indices in progress(length_sorted_batches(windows, setting.options.batch_size), "average attention"):
        batch = collate([windows[index] for index in indices], setting.tokenizer.pad_token_id)
        yield {name: batch[name] for name in names}
