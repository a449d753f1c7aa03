"""Probabilities of a model's real tokens, collected to fit a table to."""

import copy

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
    patch_model,
    patched,
)
from tests.integrations.conftest import inputs_of, padded_inputs, run
from tests.integrations.test_families import LAYERS, MODELS, make


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


def test_what_is_cut_with_common_padding(model):
    """Positions that all sequences share are, and labels are none of it."""
    batch, mask = padded_inputs((20, 12)), GlobalMask.random(2, 2, 24, sparsity=0.5)
    expected = collect_probabilities(model, [batch], mask, progress=False)
    longer = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in batch.items()}
    longer["position_ids"] = torch.arange(24)[None]
    longer["labels"] = torch.zeros(2, 24)
    assert torch.equal(collect_probabilities(model, [longer], mask, progress=False).counts, expected.counts)


def test_without_a_batch_there_is_nothing_to_collect(model):
    with pytest.raises(ValueError, match="no batch"):
        collect_probabilities(model, [], GlobalMask.random(2, 2, 24, sparsity=0.5), progress=False)
    with pytest.raises(ValueError, match="no probability in 1 batches.*the mask keeps nothing"):
        nothing = GlobalMask(torch.zeros(2, 2, 24, 24, dtype=torch.bool))
        collect_probabilities(model, [padded_inputs()], nothing, progress=False)
    with pytest.raises(ValueError, match="3 layers x 2 heads"):
        collect_probabilities(model, [padded_inputs()], GlobalMask.random(3, 2, 24, sparsity=0.5), progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_has_its_own_histogram_and_levels(name):
    """Also where layers share a module."""
    model, mask = make(name), GlobalMask.random(LAYERS, 2, 32, sparsity=0.5)
    batches = [inputs_of(), inputs_of((9, 9))]
    layers = collect_probabilities(model, batches, mask, by_layer=True, progress=False)
    together = collect_probabilities(model, batches, mask, progress=False)
    assert len(layers) == LAYERS and len({layer.sums.square().sum().item() for layer in layers}) == LAYERS
    torch.testing.assert_close(sum(layer.counts for layer in layers), together.counts)
    torch.testing.assert_close(sum(layer.sums for layer in layers), together.sums)
    rows = together.rows / LAYERS
    assert all(layer.rows == pytest.approx(rows, rel=1e-5) for layer in layers)

    tables, inputs = [log_table(3), calibrated_table(layers[1], 2), None], inputs_of()
    attentions = run(patch_model(model, mask, tables, unpad=False), inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    for table, used in zip(tables, attentions, strict=True):
        values = used.transpose(1, 2)[real].unique()
        if table is None:
            assert len(values) > 2 * 8
        else:
            assert all(min(abs(value - level) for level in table.levels) < 1e-6 for value in values.tolist())
    with patched(model, mask, 1):
        pass
    again = run(model, inputs, output_attentions=True).attentions
    assert all(map(torch.equal, attentions, again)), "afterwards every layer has its own levels again"


def test_levels_for_other_layers_are_refused():
    model = make("BERT")
    with pytest.raises(ValueError, match="bits has 2 values, the mask 3 layers; expected one for each, or for all"):
        patch_model(model, GlobalMask.random(LAYERS, 2, 32, sparsity=0.5), [3, 3])
    with pytest.raises(TypeError, match="by_layer is 1, expected True or False"):
        collect_probabilities(model, [inputs_of()], GlobalMask.random(LAYERS, 2, 32, sparsity=0.5), by_layer=1)
