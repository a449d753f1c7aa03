"""Tables fitted to probabilities: least squares in each bin, rows that sum to 1, and a threshold worth its place."""

import math

import pytest
import torch

from sparse_attn import (
    ProbabilityHistogram,
    calibrated_table,
    log_table,
    quantize,
    renormalised_table,
)
from sparse_attn.calibration import BINS_PER_OCTAVE, rounding_error


def rows(sharpness: float = 3.0, count: int = 400, keys: int = 64) -> torch.Tensor:
    """Probabilities [count, keys] in float64, each row summing to 1."""
    return (sharpness * torch.randn(count, keys, dtype=torch.float64)).softmax(-1)


def histogram_of(probabilities: torch.Tensor) -> ProbabilityHistogram:
    histogram = ProbabilityHistogram()
    for part in probabilities.split(100):
        histogram.add(part)
    return histogram


def test_a_histogram_counts_each_probability_above_zero_once():
    probabilities = rows().float()
    probabilities[:, ::2] = 0
    histogram = histogram_of(probabilities)
    assert histogram.counts.sum() == 400 * 32
    assert histogram.sums.sum().item() == pytest.approx(probabilities.double().sum().item())
    used = histogram.counts > 0
    lower = 2.0 ** (torch.arange(len(used), dtype=torch.float64) / BINS_PER_OCTAVE - 40)
    assert (histogram.means()[used] >= lower[used] * (1 - 1e-6)).all()
    assert (histogram.means()[used] <= lower[used] * 2 ** (1 / BINS_PER_OCTAVE) * (1 + 1e-6)).all()


def test_a_histogram_counts_what_a_softmax_rounded_above_one():
    histogram = histogram_of(torch.tensor([1.0, 1.0 + 1e-6]))
    assert histogram.counts[-1] == 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_the_means_of_their_bins(bits):
    probabilities = rows()
    table = calibrated_table(probabilities, bits, threshold=1e-3)
    assert table.threshold == 1e-3 and table.bits == bits
    levels = quantize(probabilities, log_table(bits))
    for index, published in enumerate(log_table(bits).levels[1:], start=1):
        mean = probabilities[levels == published].mean().item()
        assert table.levels[index] == pytest.approx(mean, rel=0.02)


def test_no_other_value_of_a_level_has_a_smaller_squared_error():
    probabilities = rows()
    table = calibrated_table(probabilities, 2, threshold=1e-3)

    def squared_error(levels) -> float:
        rounded = quantize(probabilities, type(table)(table.threshold, tuple(levels)))
        return (rounded - probabilities).square().sum().item()

    least = squared_error(table.levels)
    assert least < squared_error(log_table(2).levels)
    for index in (1, 2, 3):
        for factor in (0.95, 1.05):
            changed = list(table.levels)
            changed[index] *= factor
            assert least < squared_error(changed)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("bits", [1, 3])
def test_the_chosen_threshold_is_at_least_as_good_as_the_published(sharpness, bits):
    histogram = histogram_of(rows(sharpness, 50))
    best = rounding_error(histogram, calibrated_table(histogram, bits))
    assert best <= rounding_error(histogram, calibrated_table(histogram, bits, threshold=2.0**-10))
    assert best <= rounding_error(histogram, log_table(bits, threshold=2.0**-10))


@pytest.mark.parametrize(
    ("probabilities", "threshold"),
    [
        ([*[1.0] * 30, 0.43, 0.43, 0.14], 0.5),  # better to lose the few than to give them the others' level
        ([3.2e-5] * 31_250, 2.0**-15),  # a long row, all of which any higher one would lose
    ],
)
def test_the_chosen_threshold_may_be_high_or_low(probabilities, threshold):
    assert calibrated_table(torch.tensor(probabilities), 1).threshold == threshold


@pytest.mark.parametrize("keys", [20, 500])
def test_the_error_is_that_of_outputs(keys):
    """Values of unit variance and unit mean: half of the error comes from each."""
    probabilities, values = rows(2.0, 2000, keys), torch.randn(keys, 256, dtype=torch.float64)
    for table in (log_table(3), log_table(1), calibrated_table(probabilities, 2)):
        errors = quantize(probabilities, table) - probabilities
        independent = (errors @ values).square().mean().item()
        alike = errors.sum(-1).mean().square().item()
        assert rounding_error(probabilities, table) == pytest.approx(independent + alike, rel=0.1)


@pytest.mark.parametrize("table", [3, 2, log_table(3, threshold=0.02)])
def test_renormalised_rows_sum_to_one_on_average(table):
    probabilities = rows(1.5)
    plain = log_table(table) if isinstance(table, int) else table
    assert abs(quantize(probabilities, plain).sum(-1).mean().item() - 1) > 0.02
    scaled = renormalised_table(probabilities, table)
    assert quantize(probabilities, scaled).sum(-1).mean().item() == pytest.approx(1, rel=5e-3)
    factors = [new / old for new, old in zip(scaled.levels[1:], plain.levels[1:])]
    assert factors == pytest.approx([factors[0]] * len(factors)) and scaled.threshold == plain.threshold


def test_a_bin_without_probabilities_keeps_its_mid_point():
    table = calibrated_table(torch.tensor([0.5, 0.5]), 3, threshold=1e-3)
    assert table.levels[7] == pytest.approx(0.5)
    assert table.levels[:7] == log_table(3).levels[:7]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no probability above zero"):
        calibrated_table(torch.zeros(4), 3)
    with pytest.raises(ValueError, match="from 0 to 1"):
        calibrated_table(torch.tensor([0.5, math.nan]), 3)
    with pytest.raises(ValueError, match="from 0 to 1"):
        calibrated_table(torch.tensor([-1.0, 2.0]), 3)
    with pytest.raises(ValueError, match="below the table's threshold 0.9"):
        renormalised_table(torch.tensor([0.5, 0.5]), log_table(3, threshold=0.9))
    with pytest.raises(ValueError, match="bits is 9"):
        calibrated_table(torch.tensor([0.5]), 9)
    with pytest.raises(ValueError, match="threshold is 2"):
        calibrated_table(torch.tensor([0.5]), 3, threshold=2.0)
    with pytest.raises(TypeError, match="probabilities is list, expected a tensor"):
        ProbabilityHistogram().add([0.5])
    with pytest.raises(TypeError, match="list, expected ProbabilityHistogram or a tensor"):
        calibrated_table([0.5], 3)


def test_tables_do_not_depend_on_the_default_device():
    histogram = ProbabilityHistogram()
    histogram.add(torch.rand(100))
    expected = renormalised_table(histogram, calibrated_table(histogram, 3))
    with torch.device("meta"):
        assert renormalised_table(histogram, calibrated_table(histogram, 3)) == expected
