"""Rounding of attention probabilities to few bits on a logarithmic scale.

The quantiser is the default one of Ji et al., "On the Distribution, Sparsity, and Inference-time Quantization of
Attention Values in Transformers" (Findings of ACL 2021): probabilities below a threshold become 0, the others the
geometric mid-point of their bin, with bins of equal width in log2(p).
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from .arguments import expect_kind, expect_numbers
from .files import load_tensors, save_tensors

_KIND = "quantization tables"
MAX_BITS = 8
DEFAULT_THRESHOLD = 1e-3
_LARGEST_LEVEL = 65504.0  # of float16, in which kernels may multiply


@dataclass(frozen=True)
class QuantizationTable:
    """2 ** bits values for probabilities: level 0 is zero, level k (from 1) stands for the k-th bin of log2(p).

    The bins share [log2(threshold), 0] evenly; their values are free, so calibrated tables fit the same kernels.
    Instances are hashable constants.

    Attributes:
        threshold: probabilities below it become zero.
        levels: 2 ** bits values, the first of them 0.0.
    """

    threshold: float
    levels: tuple[float, ...]

    def __post_init__(self):
        expect_numbers(threshold=self.threshold)
        expect_kind(Iterable, "2 ** bits numbers", levels=self.levels)
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))  # of any kind of numbers
        object.__setattr__(self, "threshold", float(self.threshold))
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold is {self.threshold}, expected a probability strictly between 0 and 1")
        bits = math.log2(len(self.levels)) if self.levels else 0.0
        if bits != int(bits) or not 1 <= bits <= MAX_BITS:
            raise ValueError(f"levels has {len(self.levels)} values, expected 2 ** bits of them, bits in 1..{MAX_BITS}")
        if self.levels[0] != 0.0 or not all(0.0 <= level <= _LARGEST_LEVEL for level in self.levels):
            raise ValueError(
                f"levels is {self.levels}, expected numbers from 0 to {_LARGEST_LEVEL:g}; the first is 0.0, the value "
                "of pruned probabilities"
            )

    @property
    def bits(self) -> int:
        return int(math.log2(len(self.levels)))

    @property
    def step(self) -> float:
        """Width of a bin in log2(p)."""
        return -math.log2(self.threshold) / (len(self.levels) - 1)

    @cached_property
    def mid_points(self) -> bool:
        """Whether the values are the mid-points of their bins, as published, which kernels need not look up."""
        return self.levels == log_table(self.bits, self.threshold).levels


Bits = int | QuantizationTable | None | Sequence[int | QuantizationTable | None]  # of a model; of each layer


def log_table(bits: int, threshold: float = DEFAULT_THRESHOLD) -> QuantizationTable:
    """The published table: level k is 2 ** (log2(threshold) + (k - 1/2) * step), the mid-point of its bin.

    Raises ValueError for bits outside 1..8 and for a threshold outside (0, 1), TypeError for bits that are no integer.
    """
    if not isinstance(bits, int) and hasattr(bits, "__index__"):  # NumPy's; torch.compile traces no hasattr of an int
        bits = operator.index(bits)
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits is {bits!r}, expected an integer in 1..{MAX_BITS} or None for no rounding")
    expect_numbers(threshold=threshold)
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}, expected 1..{MAX_BITS}, or None for no rounding")
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold is {threshold}, expected a probability strictly between 0 and 1")
    bins = 2**bits - 1
    lowest = math.log2(threshold)
    step = -lowest / bins
    return QuantizationTable(threshold, (0.0, *(2.0 ** (lowest + (k + 0.5) * step) for k in range(bins))))


def as_table(bits: int | QuantizationTable | None) -> QuantizationTable | None:
    """The table that an argument `bits` means: the published one for a number, a table itself, None for none."""
    return bits if bits is None or isinstance(bits, QuantizationTable) else log_table(bits)


def tables_of_layers(bits: Bits, layers: int) -> tuple[QuantizationTable | None, ...]:
    """The table of each of a model's layers that an argument `bits` means: the same for all, or a sequence of theirs.

    Raises ValueError for a sequence of another length.
    """
    if not isinstance(bits, (list, tuple)):
        return (as_table(bits),) * layers
    if len(bits) != layers:
        raise ValueError(f"bits has {len(bits)} values, the mask {layers} layers; expected one for each, or for all")
    return tuple(map(as_table, bits))


def save_tables(path: str | os.PathLike, tables: QuantizationTable | Sequence[QuantizationTable]) -> None:
    """Writes a table, or one for each layer of a model, to a safetensors file. Raises TypeError for others."""
    each = [tables] if isinstance(tables, QuantizationTable) else tables
    expect_kind(Sequence, "a QuantizationTable, or a sequence of one for each layer", tables=each)
    for index, table in enumerate(each):
        expect_kind(QuantizationTable, "a QuantizationTable", **{f"tables[{index}]": table})
    save_tensors(path, _KIND, {}, {"single": each is not tables, "tables": [asdict(table) for table in each]})


def load_tables(path: str | os.PathLike) -> QuantizationTable | list[QuantizationTable]:
    """Reads a file of `save_tables`: what `bits` of `patch_bert` takes. Raises FileNotFoundError or ValueError, naming
    the file and what is wrong with it."""
    _, header = load_tensors(path, _KIND, ())
    try:
        tables = [QuantizationTable(**table) for table in header["tables"]]
        return tables[0] if header["single"] else tables
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged {_KIND} file: {error}") from error


def quantize(probabilities: torch.Tensor, table: int | QuantizationTable | None) -> torch.Tensor:
    """Rounds `probabilities` (any shape, floating point) to the levels of `table`; shape and dtype stay.

    A number of bits means the published table, None no rounding.

    p < threshold becomes 0, everything else levels[1 + min(floor((log2 p - log2 threshold) / step), 2**bits - 2)].
    NaN stays NaN. The gradient passes straight through. Raises TypeError for integers.
    """
    table = as_table(table)
    expect_kind(torch.Tensor, "a tensor", probabilities=probabilities)
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities are {probabilities.dtype}, expected a floating-point dtype")
    return probabilities if table is None else _StraightThroughRounding.apply(probabilities, table)


def level_numbers(probabilities: torch.Tensor, table: QuantizationTable) -> torch.Tensor:
    """Which level of `table` each of `probabilities` rounds to: int64, the same shape; any for NaN."""
    wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    position = (torch.log2(wide) - math.log2(table.threshold)) / table.step
    # log2(0) is -inf: clamp before the conversion to integers.
    level = 1 + position.floor().clamp(0, len(table.levels) - 2).nan_to_num(0.0).to(torch.int64)
    return torch.where(wide < table.threshold, 0, level)


class _StraightThroughRounding(torch.autograd.Function):
    @staticmethod
    def forward(probabilities, table):
        levels = torch.tensor(table.levels, dtype=probabilities.dtype, device=probabilities.device)
        return torch.where(probabilities.isnan(), probabilities, levels[level_numbers(probabilities, table)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent
