"""Tables fitted to probabilities: least squares in each bin, rows that sum to 1, and a threshold worth its place."""

import copy
import math

import pytest
import torch

from sparse_attn import (
    GlobalMask,
    ProbabilityHistogram,
    calibrated_table,
    collect_probabilities,
    is_patched,
    log_table,
    patch_bert,
    quantize,
    renormalised_table,
)
from sparse_attn.calibration import BINS_PER_OCTAVE, rounding_error
from tests.integrations.conftest import padded_inputs, small_config


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
    with pytest.raises(TypeError, match="list, expected ProbabilityHistogram or a tensor"):
        calibrated_table([0.5], 3)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("already_patched", [False, True])
def test_collected_probabilities_are_those_of_real_tokens(model, side, already_patched):
    mask = GlobalMask.random(2, 2, 24, sparsity=0.5)
    batches = [padded_inputs((20, 13, 1), "left" if side == "left" else "right"), padded_inputs((9, 9))]
    if side == "holes":
        batches[0]["attention_mask"][0, 4:8] = 0
    expected = ProbabilityHistogram()
    exact = patch_bert(copy.deepcopy(model), mask, unpad=False)
    for batch in batches:
        with torch.no_grad():
            attentions = exact(**batch, output_attentions=True).attentions
        for attention in attentions:
            for row, real in zip(attention, batch["attention_mask"].bool()):
                expected.add(row[:, real][:, :, real])
    if already_patched:
        patch_bert(model, mask, bits=1)
    found = collect_probabilities(model.train(), batches, mask, progress=False)
    torch.testing.assert_close(found.counts, expected.counts, atol=2, rtol=0)
    torch.testing.assert_close(found.sums.sum(), expected.sums.sum())
    assert model.training and is_patched(model) == already_patched
    before = model.eval()(**batches[1])[0]
    if already_patched:
        again = patch_bert(model, mask, bits=1)(**batches[1])[0]
    else:
        assert model.config._attn_implementation == "sdpa"
        again = copy.deepcopy(model)(**batches[1])[0]
    assert torch.equal(before, again)


def test_a_calibrated_table_goes_through_the_kernels(model):
    """Its levels are used, and it is nearer to no rounding than the published table."""
    mask = GlobalMask.random(2, 2, 40, sparsity=0.0)
    batch = padded_inputs((40, 31))
    table = calibrated_table(collect_probabilities(model, [batch], mask, progress=False), 2)
    with torch.no_grad():
        exact = patch_bert(model, mask)(**batch)[0]
        fitted, published = (patch_bert(model, mask, bits)(**batch)[0] for bits in (table, 2))
    assert 0 < (fitted - exact).norm() < (published - exact).norm()


def test_padding_that_all_sequences_share_may_be_longer_than_the_mask(model):
    """As batches padded to a model's greatest length are; through a module around the model, and in inference mode."""

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, features):
            return self.inner(**features)

    batch, mask = padded_inputs((30, 12)), GlobalMask.random(2, 2, 16, sparsity=0.5)
    batch["attention_mask"][:, 12:] = 0
    with torch.inference_mode():
        found = collect_probabilities(Around(), [batch], mask, progress=False)
    cut = {name: value[:, :12] for name, value in batch.items()}
    expected = collect_probabilities(model, [cut], mask, progress=False)
    assert torch.equal(found.counts, expected.counts)
    found.add(torch.rand(3))


def test_tables_do_not_depend_on_the_default_device():
    histogram = ProbabilityHistogram()
    histogram.add(torch.rand(100))
    expected = renormalised_table(histogram, calibrated_table(histogram, 3))
    with torch.device("meta"):
        assert renormalised_table(histogram, calibrated_table(histogram, 3)) == expected


def test_without_a_batch_there_is_nothing_to_collect(model):
    with pytest.raises(ValueError, match="no batch"):
        collect_probabilities(model, [], GlobalMask.random(2, 2, 24, sparsity=0.5), progress=False)
    with pytest.raises(ValueError, match="no probability in 1 batches.*the mask keeps nothing"):
        nothing = GlobalMask(torch.zeros(2, 2, 24, 24, dtype=torch.bool))
        collect_probabilities(model, [padded_inputs()], nothing, progress=False)
    with pytest.raises(ValueError, match="3 layers x 2 heads"):
        collect_probabilities(model, [padded_inputs()], GlobalMask.random(3, 2, 24, sparsity=0.5), progress=False)


@pytest.fixture
def model():
    from transformers import BertModel

    model = BertModel(small_config()).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return model
