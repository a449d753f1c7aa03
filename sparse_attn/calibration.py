"""Tables for rounding that are fitted to a model's own probabilities, for the kernels that take the published table.

The bins are those of the published quantiser, of equal width in log2(p) (Ji et al., "On the Distribution, Sparsity, and
Inference-time Quantization of Attention Values in Transformers", Findings of ACL 2021). What a bin stands for is free:
the mean of what falls into it is the least-squares choice (Lloyd, "Least squares quantization in PCM", 1982; Max,
"Quantizing for minimum distortion", 1960), and a factor on all levels restores the sum of a row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .arguments import expect_kind
from .quantization import QuantizationTable, level_numbers, log_table, quantize

BINS_PER_OCTAVE = 128
_OCTAVES = 40
_THRESHOLDS = [2.0 ** (-quarter / 4) for quarter in range(4, 61)]


class ProbabilityHistogram:
    """How often probabilities of each size occur: 5,120 bins of equal width in log2(p), however many are added.

    Zeros are left out, so pruned positions, padding and rows without keys do not count.

    Attributes:
        counts: float64 [bins]; bin k holds probabilities from 2 ** (k / 128 - 40) on, the first one also all below.
        sums: float64 [bins], of the probabilities in each bin.
    """

    def __init__(self):
        self.counts = torch.zeros(_OCTAVES * BINS_PER_OCTAVE, dtype=torch.float64, device="cpu")
        self.sums = torch.zeros_like(self.counts)

    def add(self, probabilities: torch.Tensor) -> None:
        """Counts probabilities after the softmax and before rounding: any shape, floating point, on any device.

        Raises ValueError for values outside [0, 1], TypeError for what is no tensor.
        """
        expect_kind(torch.Tensor, "a tensor", probabilities=probabilities)
        values = probabilities.detach().float().flatten()
        if not bool(((values >= 0) & (values <= 1 + 1e-4)).all()):
            raise ValueError("expected probabilities after the softmax, from 0 to 1; some are outside or not finite")
        values = values[values > 0]
        place = (torch.log2(values) + _OCTAVES) * BINS_PER_OCTAVE
        place = place.floor().clamp(0, len(self.counts) - 1).to(torch.int64)
        # Anew, not in place: one that was made in inference mode may go on outside.
        self.counts = self.counts + torch.bincount(place, minlength=len(self.counts)).cpu()
        self.sums = self.sums + torch.bincount(place, values.double(), minlength=len(self.counts)).cpu()

    def __repr__(self) -> str:
        return f"ProbabilityHistogram(probabilities={int(self.counts.sum())}, rows={self.rows:.0f})"

    @property
    def rows(self) -> float:
        """How many rows were added: the probabilities of each sum to 1."""
        return self.sums.sum().item()

    def means(self) -> torch.Tensor:
        """float64 [bins]: the mean of each bin's probabilities, 0 where there are none."""
        return self.sums / self.counts.clamp(min=1)


def merged(histograms: Iterable[ProbabilityHistogram]) -> ProbabilityHistogram:
    """One histogram of all that several have counted."""
    together = ProbabilityHistogram()
    for one in histograms:
        together.counts, together.sums = together.counts + one.counts, together.sums + one.sums
    return together


def calibrated_table(
    probabilities: ProbabilityHistogram | torch.Tensor, bits: int, threshold: float | None = None
) -> QuantizationTable:
    """The table whose levels are the means of the probabilities in their bins; the mid-point for an empty bin.

    Without `threshold`, the one of 57 from 2 ** -15 to 1/2 with the least expected squared error of an attention
    output: the squared errors of a row's probabilities, as for values of independent sign, plus the square of what is
    missing from the row's sum, as for values that are all alike.

    Args:
        probabilities: of the model that will be rounded, after its softmax: `collect_probabilities`, or a tensor of
            any shape.
        bits: 1 to 8.
        threshold: probabilities below it become zero; None chooses it.

    Raises:
        ValueError: bits or threshold out of range, or no probability above zero.
        TypeError: bits that are no integer, probabilities of another type.
    """
    histogram = _histogram(probabilities)
    if threshold is not None:
        return _fitted(histogram, log_table(bits, threshold))
    tables = [_fitted(histogram, log_table(bits, candidate)) for candidate in _THRESHOLDS]
    return min(tables, key=lambda table: rounding_error(histogram, table))


def renormalised_table(
    probabilities: ProbabilityHistogram | torch.Tensor, table: int | QuantizationTable
) -> QuantizationTable:
    """`table` with all levels multiplied by one factor, such that rounded rows sum to 1 on average.

    Args:
        probabilities: as for `calibrated_table`.
        table: what to scale; a number of bits means the published table.

    Raises:
        ValueError: every probability rounds to zero, bits out of range, or no probability above zero.
        TypeError: bits that are no integer, probabilities of another type.
    """
    histogram = _histogram(probabilities)
    table = table if isinstance(table, QuantizationTable) else log_table(table)
    rounded = (quantize(histogram.means(), table) * histogram.counts).sum().item()
    if rounded <= 0:
        raise ValueError(
            f"all probabilities are below the table's threshold {table.threshold}; expected some above it: lower it"
        )
    factor = histogram.rows / rounded
    return QuantizationTable(table.threshold, tuple(level * factor for level in table.levels))


def rounding_error(probabilities: ProbabilityHistogram | torch.Tensor, table: QuantizationTable) -> float:
    """The expected squared error that rounding brings to an attention output; see `calibrated_table`."""
    histogram = _histogram(probabilities)
    means = histogram.means()
    errors = quantize(means, table) - means
    of_sums = (errors * histogram.counts).sum() / histogram.rows
    return ((errors.square() * histogram.counts).sum() / histogram.rows + of_sums.square()).item()


def _histogram(probabilities: ProbabilityHistogram | torch.Tensor) -> ProbabilityHistogram:
    if isinstance(probabilities, torch.Tensor):
        tensor, probabilities = probabilities, ProbabilityHistogram()
        probabilities.add(tensor)
    expect_kind(ProbabilityHistogram, "ProbabilityHistogram or a tensor", probabilities=probabilities)
    if probabilities.rows <= 0:
        raise ValueError("there is no probability above zero to calibrate with; add some of the model's")
    return probabilities


def _fitted(histogram: ProbabilityHistogram, table: QuantizationTable) -> QuantizationTable:
    level = level_numbers(histogram.means(), table)
    values = torch.tensor(table.levels, dtype=torch.float64, device="cpu")
    counts = torch.zeros_like(values).index_add_(0, level, histogram.counts)
    sums = torch.zeros_like(values).index_add_(0, level, histogram.sums)
    means = torch.where(counts > 0, sums / counts.clamp(min=1), values)
    return QuantizationTable(table.threshold, (0.0, *means[1:].tolist()))
