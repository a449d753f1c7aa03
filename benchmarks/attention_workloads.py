"""What the attention benchmark computes: shapes and masks, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .masks import real_mask
from .synthetic_masks import synthetic_mask

MASKS = ("dense", "element", "tile")
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)

# Tokens of 32 of the 1,219 windows that the real masks come from (see benchmarks/masks/make.py), tokenised by the
# packaged MiniLM and drawn by random.Random(0).sample(lengths, 32). All windows average 180 tokens.
SQUAD_LENGTHS = (
    161, 190, 140, 208, 180, 178, 177, 199, 130, 179, 227, 158, 153, 263, 236, 267,
    147, 264, 159, 124, 201, 178, 149, 176, 363, 237, 169, 139, 198, 179, 384, 113,
)  # fmt: skip

# Passes and masks for peers that compile for seconds for every shape; workloads without any leave those peers out.
COMPILED_MASKED = ((FORWARD, "element"), (FORWARD, "tile"))
COMPILED_TRAINED = (*COMPILED_MASKED, (FORWARD_BACKWARD, "element"), (FORWARD_BACKWARD, "tile"))
COMPILED_ALL = (*COMPILED_TRAINED, (FORWARD, "dense"), (FORWARD_BACKWARD, "dense"))


@dataclass(frozen=True)
class Workload:
    """One problem: self-attention of a layer.

    Attributes:
        name: what it is called.
        batch, heads, length, head_dim: of query, key and value; `length` is that of the longest sequence.
        masks: (granularity, device) -> bool [layers, heads, >= length, >= length], true = kept. Inputs shorter than
            the mask use its top-left corner.
        lengths: tokens of each sequence of a packed batch, or None where all have `length`.
        bits: widths that probabilities are rounded to in the forward pass; None = not at all.
        compiled: (pass, mask) pairs for peers that compile for every shape.
        cpu_batch: sequences on a CPU; None leaves the workload out there unless it is asked for.
    """

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    masks: Callable[[str, torch.device], Tensor]
    lengths: tuple[int, ...] | None = None
    bits: tuple[int | None, ...] = (None,)
    compiled: tuple[tuple[str, str], ...] = ()
    cpu_batch: int | None = None

    @property
    def packed(self) -> bool:
        return self.lengths is not None

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return (self.length,) * self.batch if self.lengths is None else self.lengths

    @property
    def tokens(self) -> int:
        """Real tokens of the batch."""
        return sum(self.sequence_lengths)

    def on(self, device: torch.device) -> Workload:
        """The workload as measured on `device`: smaller on a CPU, where compiling peers have no backward pass."""
        if device.type == "cuda":
            return self
        batch = self.cpu_batch or self.batch
        lengths = None if self.lengths is None else self.lengths[:batch]
        compiled = tuple(entry for entry in self.compiled if entry[0] == FORWARD)
        length = self.length if lengths is None else max(lengths)
        return replace(self, batch=batch, length=length, lengths=lengths, compiled=compiled)

    def description(self) -> dict[str, object]:
        """What results say about it."""
        shape = {name: getattr(self, name) for name in ("batch", "heads", "length", "head_dim")}
        return {**shape, "lengths": None if self.lengths is None else list(self.lengths), "tokens": self.tokens}


def _real(granularity: str, device: torch.device) -> Tensor:
    return real_mask(granularity).keep.to(device)


WORKLOADS = (  # those with goals first: time may be short
    Workload("squad384", 32, 12, 384, 64, _real, bits=(None, 3), compiled=COMPILED_ALL, cpu_batch=8),
    Workload(
        "long4096", 2, 12, 4096, 64, partial(synthetic_mask, heads=12, length=4096),
        bits=(None, 3), compiled=COMPILED_TRAINED,
    ),
    Workload(
        "packed-squad", len(SQUAD_LENGTHS), 12, max(SQUAD_LENGTHS), 64, _real,
        lengths=SQUAD_LENGTHS, bits=(None, 3), compiled=COMPILED_MASKED, cpu_batch=8,
    ),
    Workload("short128", 64, 12, 128, 64, _real, cpu_batch=16),
    Workload("mid1024", 8, 12, 1024, 64, partial(synthetic_mask, heads=12, length=1024), cpu_batch=2),
    Workload("long2048", 4, 12, 2048, 64, partial(synthetic_mask, heads=12, length=2048), cpu_batch=1),
    Workload("long16384", 1, 12, 16384, 64, partial(synthetic_mask, heads=12, length=16384), compiled=COMPILED_MASKED),
)  # fmt: skip


def default_workloads(device: torch.device) -> list[Workload]:
    """Those measured on `device` unless others are asked for."""
    return [workload for workload in WORKLOADS if device.type == "cuda" or workload.cpu_batch is not None]
