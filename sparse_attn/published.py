"""Reading the attention patterns that the published Attention Pruning code saved as .npy files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from .averages import AttentionAverages
from .files import expect_file

FORMATS = ("bert", "fairseq", "transformer-xl")


def load_published_averages(path: str | os.PathLike, source: str | None = None) -> AttentionAverages:
    """Averages from a published pattern.

    Shapes: BERT (float32) and fairseq (float64) save [layers, 1, heads, n, n], Transformer-XL (float32)
    [layers, queries, keys, 1, heads]. The files hold no counts: a pair of positions that is zero in every layer and
    head counts as never seen, any other as seen once. `metadata["source"]` tells which of the three it was, since
    `GlobalMask.from_averages(..., strict=True)` treats Transformer-XL differently.

    Args:
        path: the .npy file.
        source: "bert", "fairseq" or "transformer-xl"; None tells them apart by shape and dtype.

    Raises FileNotFoundError, and ValueError for a file that is not such an array.
    """
    path = Path(path).expanduser()
    if source is not None and source not in FORMATS:
        raise ValueError(f"source is {source!r}, expected one of {FORMATS} or None")
    expect_file(path, "a published attention pattern (.npy)")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable .npy array of numbers; pickled objects are not loaded") from error
    if not isinstance(array, np.ndarray) or array.ndim != 5 or array.dtype.kind != "f":
        raise ValueError(
            f"{path}: {getattr(array, 'dtype', type(array).__name__)} of shape {getattr(array, 'shape', None)}; "
            "expected floats [layers, 1, heads, n, n] (BERT, fairseq) or [layers, queries, keys, 1, heads] "
            "(Transformer-XL)"
        )
    source = source or _source_of(path, array)
    expected_one = 3 if source == "transformer-xl" else 1
    if array.shape[expected_one] != 1:
        raise ValueError(
            f"{path}: shape {array.shape} is not a {source} pattern; axis {expected_one} must have length 1"
        )
    pattern = torch.from_numpy(array.astype(np.float64))
    mean = pattern[:, :, :, 0].permute(0, 3, 1, 2) if source == "transformer-xl" else pattern[:, 0]
    return AttentionAverages.from_mean(mean.contiguous(), source=source, file=path.name)


def _source_of(path: Path, array: np.ndarray) -> str:
    if array.shape[1] == 1 and array.shape[3] == array.shape[4]:
        return "fairseq" if array.dtype == np.float64 else "bert"
    if array.shape[3] == 1:
        return "transformer-xl"
    raise ValueError(
        f"{path}: shape {array.shape} fits no published pattern; expected [layers, 1, heads, n, n] (BERT, fairseq) "
        "or [layers, queries, keys, 1, heads] (Transformer-XL)"
    )
