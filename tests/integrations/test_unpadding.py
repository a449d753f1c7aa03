"""Without padding: the same at real tokens, zeros elsewhere, and less work."""

import copy

import pytest
import torch
from transformers import BertForQuestionAnswering, BertLMHeadModel, BertModel
from transformers.models.bert.modeling_bert import BertEncoder

from sparse_attn import GlobalMask, patch_bert, patched, unpatch
from sparse_attn.integrations.packing import Packing, recurring_rows
from tests.helpers import DEVICE
from tests.integrations.conftest import SIDES, inputs_of, small_config

MASK = GlobalMask.random(2, 2, 32, sparsity=0.6)
ROUNDED_UP = (31, 31, 31, 31, 6)  # lengths whose sum, 130, becomes 132 rows on a CPU


@pytest.fixture
def model(model):
    return model.to(DEVICE)


def both(model, inputs, **arguments):
    """Outputs with padding, and without."""
    with torch.no_grad():
        padded = patch_bert(model, MASK, bits=3, unpad=False)(**inputs, **arguments)
        return padded, patch_bert(model, MASK, bits=3, unpad=True)(**inputs, **arguments)


def assert_same_at_real_tokens(ours, theirs, inputs):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-5, rtol=1e-5)
    assert (ours[~real] == 0).all()


@pytest.mark.parametrize("side", SIDES)
def test_equals_the_padded_model(model, side):
    inputs = inputs_of(side=side)
    padded, packed = both(model, inputs)
    assert_same_at_real_tokens(packed.last_hidden_state, padded.last_hidden_state, inputs)
    if side != "left":  # the first token is real
        torch.testing.assert_close(packed.pooler_output[:1], padded.pooler_output[:1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lengths", [(20, 13, 1), ROUNDED_UP])
@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_and_attentions(model, side, lengths, return_dict):
    inputs = inputs_of(lengths, side)
    wanted = dict(output_hidden_states=True, output_attentions=True, return_dict=return_dict)
    padded, packed = both(model, inputs, **wanted)
    if return_dict:
        padded, packed = padded.to_tuple(), packed.to_tuple()
    assert len(packed) == len(padded) and len(packed[2]) == 3 and len(packed[3]) == 2
    for ours, theirs in zip(packed[2], padded[2], strict=True):
        assert_same_at_real_tokens(ours, theirs, inputs)
    real = inputs["attention_mask"].bool()
    for ours, theirs in zip(packed[3], padded[3], strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], atol=1e-5, rtol=1e-5)


def test_hidden_states_asked_for_by_the_config(model):
    model.config.output_hidden_states = True
    inputs = inputs_of()
    padded, packed = both(model, inputs)
    for ours, theirs in zip(packed.hidden_states, padded.hidden_states, strict=True):
        assert_same_at_real_tokens(ours, theirs, inputs)


def test_layers_work_on_real_tokens_alone(model):
    inputs, seen = inputs_of(side="holes"), []
    for layer in model.encoder.layer:
        layer.intermediate.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    tokens = int(inputs["attention_mask"].sum())
    with torch.no_grad():
        patch_bert(model, MASK)(**inputs)
    assert seen == [(1, tokens, 64)] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_gradients_are_those_of_the_padded_model(model, side, checkpointing):
    inputs, head = inputs_of(side=side), torch.randn(64, device=DEVICE)
    real = inputs["attention_mask"].bool()
    gradients = []
    for unpad in (False, True):
        trained = patch_bert(copy.deepcopy(model), MASK, unpad=unpad).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        (trained(**inputs).last_hidden_state @ head)[real].square().mean().backward()
        gradients.append({name: one.grad for name, one in trained.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, theirs in gradients[0].items():
        if not name.endswith("key.bias"):  # nothing but rounding: a softmax does not see it
            limit = 1e-4 * theirs.abs().max().item()
            torch.testing.assert_close(gradients[1][name], theirs, atol=limit, rtol=1e-3)


def test_is_the_default_in_eval_mode_alone(model):
    seen = []
    model.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    inputs = inputs_of()
    patch_bert(model, MASK)
    for training in (False, True):
        model.train(training)(**inputs)
    patch_bert(model, MASK, unpad=False).eval()(**inputs)
    assert seen == [1, 3, 3]
    with patched(model, MASK, unpad=True):
        model.train()(**inputs)
    model(**inputs)
    unpatch(model)(**inputs)
    assert seen[3:] == [1, 3, 3]
    assert not model.encoder._forward_pre_hooks and not model.encoder._forward_hooks


def test_nothing_to_drop(model):
    inputs = inputs_of()
    inputs["attention_mask"][:] = 1
    padded, packed = both(model, inputs)
    torch.testing.assert_close(packed.last_hidden_state, padded.last_hidden_state)
    del inputs["attention_mask"]
    torch.testing.assert_close(both(model, inputs)[1].last_hidden_state, padded.last_hidden_state, atol=2e-5, rtol=1e-5)
    inputs["attention_mask"] = torch.zeros(3, 20, dtype=torch.long, device=DEVICE)
    assert both(model, inputs)[1].last_hidden_state.isfinite().all()


def test_a_copy_of_the_model_drops_its_own_padding(model):
    inputs = inputs_of()
    with torch.no_grad():
        expected = patch_bert(model, MASK)(**inputs).last_hidden_state
        twin = copy.deepcopy(model)
        unpatch(model)
        torch.testing.assert_close(twin(**inputs).last_hidden_state, expected)
    unpatch(twin)
    assert not twin.encoder._forward_pre_hooks


@pytest.mark.parametrize("kind", ["cache", "chunks", "cross-attention"])
def test_what_needs_padded_tensors_keeps_them(kind):
    torch.manual_seed(0)
    cross = dict(use_cache=False, encoder_hidden_states=torch.randn(3, 7, 64, device=DEVICE))
    cls, settings, arguments = {
        "cache": (BertLMHeadModel, dict(is_decoder=True), dict(use_cache=True)),
        "chunks": (BertModel, dict(chunk_size_feed_forward=5), {}),
        "cross-attention": (BertModel, dict(is_decoder=True, add_cross_attention=True), cross),
    }[kind]
    model, seen = cls(small_config(**settings)).eval().to(DEVICE), []
    encoder = next(module for module in model.modules() if isinstance(module, BertEncoder))
    encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    padded, packed = both(model, inputs_of(), **arguments)
    assert seen == [3, 3] and torch.equal(padded[0], packed[0])


def test_a_decoder_without_cache(model):
    torch.manual_seed(0)
    model = BertLMHeadModel(small_config(is_decoder=True)).eval().to(DEVICE)
    inputs = inputs_of()
    padded, packed = both(model, inputs, use_cache=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(packed.logits[real], padded.logits[real], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["layers", "model"])
def test_compiled(what):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = BertForQuestionAnswering(small_config()).eval().to(DEVICE)
    batches = [inputs_of(side=side) for side in SIDES]
    expected = [both(model, inputs)[1].start_logits for inputs in batches]
    compiled = model
    if what == "layers":
        for layer in model.bert.encoder.layer:
            layer.compile(backend="eager", fullgraph=True, dynamic=True)
    else:
        compiled = torch.compile(model, backend="eager", dynamic=True)
    with torch.no_grad():
        for inputs, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(compiled(**inputs).start_logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [-1, 0, 40])
def test_one_sequence_with_hardly_any_padding(place):
    """As many rows as recur would be as many as with padding."""
    torch.manual_seed(0)
    config = small_config()
    config.max_position_embeddings = 80
    model = BertModel(config, add_pooling_layer=False).eval().to(DEVICE)
    inputs = inputs_of((66,))
    inputs["attention_mask"][0, place] = 0
    outputs = []
    for unpad in (False, True):
        patch_bert(model, GlobalMask.random(2, 2, 72, sparsity=0.6), unpad=unpad)
        with torch.no_grad():
            outputs.append(model(**inputs, output_hidden_states=True))
    padded, unpadded = outputs
    assert_same_at_real_tokens(unpadded.last_hidden_state, padded.last_hidden_state, inputs)
    for ours, theirs in zip(unpadded.hidden_states, padded.hidden_states, strict=True):
        assert_same_at_real_tokens(ours, theirs, inputs)


def test_packing_there_and_back():
    real = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    packing = Packing.of(real)
    assert (packing.longest, packing.tokens, packing.real) == (3, 5, None)
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5] and packing.cu_seqlens.dtype == torch.int32
    padded = torch.randn(3, 4, 2)
    assert torch.equal(packing.padded(packing.packed(padded)[0]), padded * real[..., None])
    assert Packing.of(real.flip(1)).real is not None
    with torch.no_grad():
        assert Packing.of(torch.arange(140).view(1, -1) < 130).rows == 132
        assert Packing.of(torch.arange(131).view(1, -1) < 130).rows == 130  # never the shape that it has with padding
        assert Packing.of(torch.arange(262).view(2, -1) < 260).rows == 262  # never more
    assert Packing.of(torch.ones_like(real)) is True and Packing.of(torch.zeros_like(real)) is False


def test_layers_see_no_mask_where_nothing_is_padding(model):
    patch_bert(model, MASK)
    seen = []
    model.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    inputs = inputs_of((9, 9))
    with torch.no_grad():
        whole = model(**inputs).last_hidden_state
        alone = model(**{**inputs, "attention_mask": None}).last_hidden_state
    assert seen == [None, None] and torch.equal(whole, alone)


def test_numbers_of_rows_recur():
    sizes = [recurring_rows(tokens) for tokens in range(1, 5000)]
    assert sizes[:64] == list(range(1, 65))
    for tokens, size in enumerate(sizes, 1):
        assert tokens <= size <= tokens * (1 + 1 / 32) and recurring_rows(size) == size
    assert len({size for size in sizes if 1024 < size <= 2048}) == 32


@pytest.mark.parametrize("gradients", [False, True])
def test_rows_that_a_cpu_computes(model, gradients):
    inputs, seen = inputs_of(ROUNDED_UP), []
    model.encoder.layer[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    patch_bert(model, MASK, unpad=True)
    with torch.set_grad_enabled(gradients):
        model(**inputs)
    assert seen == [130 if gradients or DEVICE == "cuda" else 132]
