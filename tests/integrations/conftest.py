"""A small BERT with random weights, and its masked eager twin."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertModel
from transformers.masking_utils import eager_mask

from sparse_attn.integrations import onednn
from tests.helpers import DEVICE

TWIN = "masked_eager_twin"
SIDES = ("right", "left", "holes")  # where padding lies


def _masked_eager(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' eager attention with pruned scores set to the lowest number, in float32."""
    scores = (query.float() @ key.float().transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    lowest = torch.finfo(torch.float32).min
    keep = module.twin_keep[:, : scores.shape[2], : scores.shape[3]]
    probabilities = scores.masked_fill(~keep, lowest).softmax(-1)
    return (probabilities @ value.float()).to(value.dtype).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(TWIN, _masked_eager)
AttentionMaskInterface.register(TWIN, eager_mask)


def small_config(**changes) -> BertConfig:
    settings = dict(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes,
    )  # fmt: skip
    return BertConfig(**settings)


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    model = BertModel(small_config()).eval()
    for parameter in model.parameters():  # attention that is not nearly uniform
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return model


@pytest.fixture
def twin(model):
    """A function that runs an unpatched copy of the model with the mask applied densely: (keep, inputs) -> output."""
    import copy

    dense = copy.deepcopy(model)
    dense.set_attn_implementation(TWIN)

    def run(keep, inputs):
        for layer, block in enumerate(dense.encoder.layer):
            block.attention.self.twin_keep = keep[layer].to(dense.device)
        with torch.no_grad():
            return dense(**inputs)

    return run


@pytest.fixture
def bert() -> BertModel:
    """A BERT on the CPU, as the tests of all families have it."""
    from tests.integrations.test_families import make

    return make("BERT").cpu()


@pytest.fixture
def any_rows(monkeypatch):
    """oneDNN takes the few rows that tests have."""
    monkeypatch.setattr(onednn, "_LEAST_ROWS", 1)
    monkeypatch.setattr(onednn, "_LEAST_CONVERTED_ROWS", 1)


@pytest.fixture
def small_pieces(monkeypatch):
    """Feed-forward parts take 16 rows of the tests' models at a time."""
    monkeypatch.setattr(onednn, "_REUSED_BYTES", 0)
    monkeypatch.setattr(onednn, "_PIECE_BYTES", 31 * 4 * small_config().intermediate_size)


def padded_inputs(lengths=(20, 13, 1), side="right") -> dict[str, torch.Tensor]:
    """Random token ids with padding on one side; lengths[0] is the longest."""
    total = lengths[0]
    real = torch.arange(total) < torch.tensor(lengths).view(-1, 1)
    real = real if side == "right" else real.flip(1)
    return {"input_ids": torch.randint(0, 99, (len(lengths), total)), "attention_mask": real.long()}


def inputs_of(lengths=(20, 13, 1), side="right") -> dict[str, torch.Tensor]:
    """The same on the device, with padding on a side or, "holes", also within."""
    inputs = padded_inputs(lengths, "left" if side == "left" else "right")
    if side == "holes":
        inputs["attention_mask"][0, 3:9] = inputs["attention_mask"][1, 0] = 0
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


def close(ours, theirs, inputs, atol=1e-5):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=atol, rtol=1e-5)
