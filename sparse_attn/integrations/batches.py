"""Batches for a model: what they must be, and how they reach its device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

_BY_POSITION = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
_EXAMPLE = "tokenizer(texts, padding=True, return_tensors='pt')"


def moved_batches(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[dict[str, object]]:
    """Each batch as keyword arguments of a model's forward, its tensors on `device`.

    Raises TypeError for batches that are no mappings, and for tokens that are no tensors; ValueError for empty batches.
    """
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"a batch is {type(batch).__name__}, expected the model's arguments by name, such as {_EXAMPLE} or "
                "{'input_ids': ..., 'attention_mask': ...}"
            )
        for name in ("input_ids", "attention_mask"):
            if name in batch and not isinstance(batch[name], Tensor | None):
                raise TypeError(
                    f"{name} is {type(batch[name]).__name__}, expected a tensor [batch, length]: {_EXAMPLE}"
                )
            if isinstance(batch.get(name), Tensor) and batch[name].numel() == 0:
                raise ValueError(
                    f"{name} has shape {tuple(batch[name].shape)}, expected at least one sequence and token"
                )
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def without_common_padding(batch: dict[str, object]) -> dict[str, object]:
    """A batch without the positions at its end that are padding in every sequence, which a mask need not cover."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return batch
    used = mask.bool().any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return {
        name: value[:, :length] if name in _BY_POSITION and _length(value) == mask.shape[1] else value
        for name, value in batch.items()
    }


def _length(value: object) -> int | None:
    return value.shape[1] if isinstance(value, Tensor) and value.ndim > 1 else None


def expect_several(batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Raises TypeError for one batch in the place of many, and for what is no iterable."""
    try:
        iter(batches)
    except TypeError:
        what = f"batches is {type(batches).__name__}, expected an iterable of batches"
        raise TypeError(f"{what}, each such as {_EXAMPLE}") from None
    if isinstance(batches, Mapping):
        raise TypeError(f"batches is one {type(batches).__name__}, expected an iterable of such: pass [batch]")
    if isinstance(batches, Tensor):
        raise TypeError(f"batches is Tensor, expected an iterable of batches, each such as {_EXAMPLE}")
