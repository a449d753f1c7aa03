"""Global masks of the rows: averages are collected once, and pruned to a mask for each sparsity and granularity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sparse_attn import AttentionAverages, GlobalMask, collect_averages
from sparse_attn.progress import with_progress
from sparse_attn.squad.windows import Window, collate, length_sorted_batches

from ..launched import is_first
from ..measure import add_seconds
from .checkpoints import input_names
from .setting import Setting
from .shapes import stretched


def make_mask(setting: Setting, granularity: str | None, sparsity: float, seconds: dict[str, float]) -> GlobalMask:
    """The mask of --mask, or one made from `setting.model`'s averages, with as many layers as the rows' model.

    `seconds` gets how long averages and mask took.
    """
    if setting.given_mask is not None:
        return setting.given_mask
    averages = _averages(setting, seconds)
    with add_seconds(seconds, "mask"):
        return stretched(GlobalMask.from_averages(averages, sparsity, granularity=granularity), setting.layers)


def model_batches(setting: Setting, windows: Sequence[Window], description: str) -> Iterator[dict[str, torch.Tensor]]:
    """What the model is called with for `windows`, batch by batch, with a progress bar."""
    names = input_names(setting.tokenizer)
    batches = length_sorted_batches(windows, setting.options.batch_size)
    for indices in with_progress(batches, description, enabled=is_first()):
        batch = collate([windows[index] for index in indices], setting.tokenizer.pad_token_id)
        yield {name: batch[name] for name in names}


def _averages(setting: Setting, seconds: dict[str, float]) -> AttentionAverages:
    """Those of this seed's dense model; collected when first asked for."""
    seed = setting.options.seed
    if seed not in setting.averages:
        with add_seconds(seconds, "averages"):
            setting.averages[seed] = collect_averages(
                setting.model,
                model_batches(setting, setting.averages_windows, "average attention"),
                max_length=setting.options.max_length,
                progress=False,
                model_name=setting.model_name,
                data_name=setting.averages_from,
            )
    return setting.averages[seed]
