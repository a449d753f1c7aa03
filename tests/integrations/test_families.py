"""`patch_model` on every supported architecture: the same outputs as attention with the mask applied densely."""

import copy

import pytest
import torch
import transformers
from torch import nn

from sparse_attn import GlobalMask, is_patched, patch_bert, patch_model, unpatch
from sparse_attn.integrations.models import FAMILIES, encoder_of
from tests.helpers import DEVICE
from tests.integrations.conftest import SIDES, TWIN, inputs_of

LAYERS = 3
SIZES = dict(
    vocab_size=99, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
DISTIL = dict(vocab_size=99, dim=64, n_layers=LAYERS, n_heads=2, hidden_dim=64, max_position_embeddings=40)
MODELS = {
    "BERT": ("Bert", SIZES),
    "RoBERTa": ("Roberta", SIZES),
    "XLM-RoBERTa": ("XLMRoberta", SIZES),
    "CamemBERT": ("Camembert", SIZES),
    "ELECTRA": ("Electra", SIZES | {"embedding_size": 32}),
    "DistilBERT": ("DistilBert", DISTIL | {"dropout": 0.0, "attention_dropout": 0.0}),
    "ALBERT": ("Albert", SIZES | {"embedding_size": 32, "num_hidden_groups": 1}),
    "ALBERT, 2 groups": ("Albert", SIZES | {"embedding_size": 32, "num_hidden_groups": 2}),
}
MASK = GlobalMask.random(LAYERS, 2, 32, sparsity=0.6)


def make(name: str, head: str = "Model") -> nn.Module:
    torch.manual_seed(0)
    prefix, settings = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model = getattr(transformers, f"{prefix}{head}")(config).eval().to(DEVICE)
    for parameter in model.parameters():  # attention that is not nearly uniform
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    return model


def dense_twin(model: nn.Module, inputs: dict[str, torch.Tensor], keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The hidden states of an unpatched copy with the mask applied densely; layers count their calls."""
    dense = copy.deepcopy(model)
    dense.set_attn_implementation(TWIN)
    attention, calls = encoder_of(dense).attention, iter(range(LAYERS))

    def use_next_layer(module, args, kwargs):
        module.twin_keep = keep[next(calls)].to(DEVICE)

    for module in dict.fromkeys(attention):
        module.register_forward_pre_hook(use_next_layer, with_kwargs=True)
    with torch.no_grad():
        return dense(**inputs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(("unpad", "side"), [(False, "right"), *((True, side) for side in SIDES)])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_mask(name, unpad, side):
    model, inputs = make(name), inputs_of(side=side)
    plain = model(**inputs).last_hidden_state
    expected = dense_twin(model, inputs, MASK.keep)
    with torch.no_grad():
        found = patch_model(model, MASK, unpad=unpad)(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    assert len(found.hidden_states) == LAYERS + 1
    for ours, theirs in zip(found.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=5e-5, rtol=1e-4)
    assert torch.equal(found.last_hidden_state, found.hidden_states[-1])
    assert (found.last_hidden_state - plain)[real].abs().max() > 1e-3
    if unpad:
        assert all((state[~real] == 0).all() and state.shape == plain.shape for state in found.hidden_states)
    torch.testing.assert_close(unpatch(model)(**inputs).last_hidden_state, plain)
    assert not is_patched(model)


@pytest.mark.parametrize("name", MODELS)
def test_question_answering_heads_train(name):
    model = patch_model(make(name, "ForQuestionAnswering"), MASK, bits=3, unpad=True).train()
    inputs = inputs_of()
    positions = torch.tensor([3, 1, 0], device=DEVICE)
    loss = model(**inputs, start_positions=positions, end_positions=positions).loss
    loss.backward()
    query = encoder_of(model).query_of(encoder_of(model).attention[0]).weight
    assert loss.isfinite() and query.grad.abs().max() > 0


def test_every_family_is_tested():
    assert {name.partition(",")[0] for name in MODELS} == {family.name for family in FAMILIES}


def test_a_module_around_a_model():
    """As a SentenceTransformer holds one."""

    class Wrapper(nn.Module):
        def __init__(self, auto_model):
            super().__init__()
            self.auto_model = auto_model

    outer, inputs = nn.Sequential(Wrapper(make("BERT"))), inputs_of()
    expected = patch_model(make("BERT"), MASK)(**inputs).last_hidden_state
    assert patch_model(outer, MASK) is outer and is_patched(outer)
    torch.testing.assert_close(outer[0].auto_model(**inputs).last_hidden_state, expected)
    assert not is_patched(unpatch(outer))
    with pytest.raises(TypeError, match="Sequential holds 2 transformers models; expected one"):
        patch_model(nn.Sequential(make("BERT"), make("BERT")), MASK)
    with pytest.raises(TypeError, match="Linear is not a transformers model and holds none"):
        patch_model(nn.Linear(2, 2), MASK)


class BertSelfAttention(nn.Module):
    """Has the name of transformers' class."""


def test_modules_of_others_with_the_same_name_do_not_count():
    model = make("BERT")
    model.extra = BertSelfAttention()
    assert len(encoder_of(model).attention) == LAYERS


def test_refusals():
    with pytest.raises(TypeError, match="RobertaModel is a RoBERTa, not a BERT; patch_model patches it"):
        patch_bert(make("RoBERTa"), MASK)
    config = transformers.AlbertConfig(**MODELS["ALBERT"][1] | {"inner_group_num": 2})
    with pytest.raises(ValueError, match="has 2 layers in 1 groups .* expected groups of one layer"):
        patch_model(transformers.AlbertModel(config), MASK)
