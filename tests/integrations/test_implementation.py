"""Which attention transformers runs in a model: set, given back, never that of another model with the same config."""

import copy
import pickle

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)
from transformers.masking_utils import causal_mask_function
from transformers.models.bert import modeling_bert

from sparse_attn import GlobalMask, collect_averages, is_patched, patch_bert, patched, unpatch
from sparse_attn.integrations import routing
from tests.helpers import DEVICE
from tests.integrations.conftest import close, inputs_of, run, small_config

MASK = GlobalMask.random(2, 2, 32, sparsity=0.7)


@pytest.fixture
def model(model):
    """The small BERT on the GPU where there is one, else on the CPU with Triton's interpreter."""
    return model.to(DEVICE)


def test_two_models_from_one_config_are_independent():
    config = small_config()
    first, second = BertModel(config).eval().to(DEVICE), BertModel(config).eval().to(DEVICE)
    inputs = inputs_of()
    before = run(second, inputs).last_hidden_state
    patch_bert(first, MASK)
    assert second.config._attn_implementation == config._attn_implementation != first.config._attn_implementation
    torch.testing.assert_close(run(second, inputs).last_hidden_state, before)


def with_head(config):
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval().to(DEVICE)


@pytest.mark.parametrize("first_inner", [True, False])
@pytest.mark.parametrize("then_inner", [True, False])
@pytest.mark.parametrize("unpatched_inner", [True, False])
def test_a_model_and_the_one_inside_it(first_inner, then_inner, unpatched_inner):
    """Either may be patched, again and unpatched; another model built from the same config notices nothing."""
    config, inputs = small_config(), inputs_of()
    model, other = with_head(config), with_head(config)
    dense = run(other, inputs).logits

    def part(inner):
        return model.bert if inner else model

    for _ in range(2):
        patch_bert(part(first_inner), MASK)
        patch_bert(part(then_inner), MASK)
        assert not torch.allclose(run(model, inputs).logits, dense)
        assert torch.equal(run(other, inputs).logits, dense)
        unpatch(part(unpatched_inner))
        assert not is_patched(model) and model.bert.config._attn_implementation == "sdpa"
        torch.testing.assert_close(run(model, inputs).logits, dense)


def test_an_encoder_and_a_decoder_have_configs_of_their_own():
    decoder = small_config(is_decoder=True, add_cross_attention=True, decoder_start_token_id=0)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(small_config(), decoder)
    model, other = (EncoderDecoderModel(config).eval().to(DEVICE) for _ in range(2))
    other.load_state_dict(model.state_dict())
    inputs = inputs_of()
    inputs = inputs | {"decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": inputs["attention_mask"]}
    inputs.pop("token_type_ids", None)
    dense = run(other, inputs).logits
    patch_bert(model, GlobalMask.random(4, 2, 32, sparsity=0.7))
    assert model.config.encoder is model.encoder.config and model.config.decoder is model.decoder.config
    assert not torch.allclose(run(model, inputs).logits, dense)
    assert torch.equal(run(other, inputs).logits, dense)
    torch.testing.assert_close(run(unpatch(model), inputs).logits, dense)


def test_layers_whose_config_is_not_their_models_follow_it(model):
    """As in an EncoderDecoderModel made of two loaded models."""
    inputs, expected = inputs_of(), copy.deepcopy(model)
    dense = run(model, inputs).last_hidden_state
    model.config = copy.deepcopy(model.config)
    averages = collect_averages(model, [inputs], progress=False)
    assert torch.equal(averages.sums, collect_averages(expected, [inputs], progress=False).sums)
    found = run(patch_bert(model, MASK), inputs).last_hidden_state
    assert torch.equal(found, run(patch_bert(expected, MASK), inputs).last_hidden_state)
    assert torch.equal(run(unpatch(model), inputs).last_hidden_state, dense)


def test_another_attention_set_after_patching_is_named(model):
    inputs = inputs_of()
    before = run(patch_bert(model, MASK), inputs).last_hidden_state
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"patched, but its attention implementation was set to 'eager'.*unpatch"):
        run(model, inputs)
    model.set_attn_implementation("sparse_attn")
    assert torch.equal(run(model, inputs).last_hidden_state, before)
    model.set_attn_implementation("eager")
    run(unpatch(model), inputs)


def test_a_model_that_keeps_its_attention_is_named(model, monkeypatch):
    """transformers only logs that."""
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    with pytest.raises(RuntimeError, match="left BertModel with attention 'sdpa' when asked for 'sparse_attn'"):
        patch_bert(model, MASK)


def test_the_implementation_without_a_mask_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path, attn_implementation="sparse_attn").to(DEVICE)
    with pytest.raises(ValueError, match=r"has no mask: patch_bert\(model, mask\) patches it"):
        run(loaded, inputs_of())
    run(patch_bert(loaded, MASK), inputs_of())
    run(unpatch(loaded), inputs_of())


def test_loaded_with_any_attention_implementation(model, twin, tmp_path):
    model.save_pretrained(tmp_path)
    inputs = inputs_of()
    for implementation in ("eager", "sdpa"):
        loaded = BertModel.from_pretrained(tmp_path, attn_implementation=implementation).eval().to(DEVICE)
        patch_bert(loaded, MASK)
        close(run(loaded, inputs).last_hidden_state, twin(MASK.keep, inputs).last_hidden_state, inputs)
        assert unpatch(loaded).config._attn_implementation == implementation


def test_registered_name_is_accepted_by_transformers(model):
    """Both registries know the name; without the mask function, padding would be ignored silently."""
    assert routing.ATTENTION_NAME in modeling_bert.ALL_ATTENTION_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    assert routing.ATTENTION_NAME in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping


@pytest.mark.parametrize(
    ("asked_for", "message"),
    [
        ({"use_vmap": True}, "packed position_ids are not supported"),
        ({"mask_function": lambda *places: causal_mask_function(*places)}, "packed position_ids are not supported"),
        ({"kv_offset": 2}, "dynamic key-value caches only"),
    ],
)
def test_what_a_padding_mask_cannot_say_is_refused(asked_for, message):
    assert routing.padding_mask(1, 4, 4) is None
    with pytest.raises(ValueError, match=message):
        routing.padding_mask(1, 4, 4, **asked_for)


def test_a_callers_padding_mask_may_change_between_passes(model):
    patch_bert(model, MASK, unpad=False)
    inputs = inputs_of((20, 20))
    mask = inputs["attention_mask"] = inputs["attention_mask"].bool()
    for length in (8, 12):
        mask[:] = torch.arange(20, device=DEVICE) < length
        fresh = inputs | {"attention_mask": mask.clone()}
        close(run(model, inputs).last_hidden_state, run(model, fresh).last_hidden_state, fresh)


def test_a_pickled_model_waits_for_no_device_that_its_reader_may_lack(model):
    """As if it had been on a GPU: its layouts' device is none that weights can come back from."""
    inputs, weights = inputs_of(), copy.deepcopy(model.state_dict())
    expected = run(patch_bert(model, MASK), inputs).last_hidden_state
    read = pickle.loads(pickle.dumps(model.to("meta")))
    states = [module for module in read.modules() if isinstance(module, routing.SparseAttentionState)]
    assert {state.device.type for state in states} == {"cpu"} and not states[0].mask._layouts
    read.to_empty(device=DEVICE).load_state_dict(weights)
    read.embeddings.position_ids = torch.arange(read.embeddings.position_ids.shape[1], device=DEVICE)[None]
    read.embeddings.token_type_ids = torch.zeros_like(read.embeddings.position_ids)
    torch.testing.assert_close(run(read.eval(), inputs).last_hidden_state, expected)


def test_a_model_may_be_unpatched_within_the_block_that_patched_it(model):
    with patched(model, MASK):
        unpatch(model)
    assert not is_patched(model)
