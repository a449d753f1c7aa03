"""`patch_bert`: the same outputs as a masked eager BERT, and none of transformers' traps."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn
from transformers import (
    BertModel,
    GPT2Config,
    GPT2Model,
    StaticCache,
)
from transformers.models.bert import modeling_bert

from sparse_attn import GlobalMask, is_patched, patch_bert, patched, unpatch
from tests.helpers import DEVICE
from tests.integrations.conftest import SIDES, close, inputs_of, run, small_config

MASK = GlobalMask.random(2, 2, 32, sparsity=0.7)
HEAD_CLASSES = [
    cls
    for name, cls in inspect.getmembers(modeling_bert, inspect.isclass)
    if issubclass(cls, modeling_bert.BertPreTrainedModel) and cls is not modeling_bert.BertPreTrainedModel
]


@pytest.fixture
def model(model):
    """The small BERT on the GPU where there is one, else on the CPU with Triton's interpreter."""
    return model.to(DEVICE)


@pytest.mark.parametrize("granularity", ["element", "tile"])
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("side", [*SIDES, "none"])
def test_equals_masked_eager(model, twin, granularity, backend, side):
    mask = GlobalMask.random(2, 2, 32, sparsity=0.7, granularity=granularity)
    inputs = inputs_of(side=side)
    if side == "none":
        inputs["attention_mask"][:] = 1
    theirs = twin(mask.keep, inputs).last_hidden_state
    patch_bert(model, mask, backend=backend)
    close(run(model, inputs).last_hidden_state, theirs, inputs)
    if side == "none":
        del inputs["attention_mask"]
        without = run(model, inputs).last_hidden_state
        torch.testing.assert_close(without, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, twin, dtype):
    inputs = inputs_of()
    theirs = twin(MASK.keep, inputs).last_hidden_state
    patch_bert(model, MASK).to(dtype)
    ours = run(model, inputs).last_hidden_state
    assert ours.dtype == dtype
    real = inputs["attention_mask"].bool()
    assert (ours.float() - theirs)[real].norm() / theirs[real].norm() < 0.05
    assert is_patched(model)


def test_bits_are_applied(model):
    inputs = inputs_of()
    plain = run(patch_bert(model, MASK), inputs).last_hidden_state
    outputs = {bits: run(patch_bert(model, MASK, bits), inputs).last_hidden_state for bits in (8, 3)}
    real = inputs["attention_mask"].bool()
    errors = {bits: (output - plain)[real].norm().item() for bits, output in outputs.items()}
    assert 0 < errors[8] < errors[3]


@pytest.mark.parametrize("cls", HEAD_CLASSES, ids=lambda cls: cls.__name__)
def test_every_head_class(cls):
    torch.manual_seed(0)
    model = cls(small_config(is_decoder=cls.__name__ == "BertLMHeadModel")).eval().to(DEVICE)
    mask = GlobalMask.random(2, 2, 32, sparsity=0.0)
    inputs = inputs_of()
    inputs["input_ids"] = torch.randint(0, 99, (3, 20), device=DEVICE)
    if cls.__name__ == "BertForMultipleChoice":
        inputs = {name: value.unsqueeze(1).repeat(1, 2, 1) for name, value in inputs.items()}
    dense = run(model, inputs)
    sparse = run(patch_bert(model, mask), inputs)
    assert is_patched(model)
    real = inputs["attention_mask"].bool()
    for name, value in dense.items():
        if isinstance(value, torch.Tensor):
            per_token = value.shape[:2] == real.shape and cls.__name__ != "BertForMultipleChoice"
            ours, theirs = (sparse[name][real], value[real]) if per_token else (sparse[name], value)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_mask_as_tensor_and_path(model, twin, tmp_path):
    inputs = inputs_of()
    theirs = twin(MASK.keep, inputs).last_hidden_state
    MASK.save(tmp_path / "mask.safetensors")
    for mask in (MASK.keep, tmp_path / "mask.safetensors", str(tmp_path / "mask.safetensors")):
        assert patch_bert(model, mask) is model
        close(run(model, inputs).last_hidden_state, theirs, inputs)


def test_patching_twice_replaces_and_unpatching_restores(model, twin):
    inputs = inputs_of()
    dense = run(model, inputs).last_hidden_state
    before, keys = model.config._attn_implementation, list(model.state_dict())
    patch_bert(model, MASK, bits=2)
    patch_bert(model, MASK)
    close(run(model, inputs).last_hidden_state, twin(MASK.keep, inputs).last_hidden_state, inputs)
    assert list(model.state_dict()) == keys
    assert unpatch(model) is model and not is_patched(model)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(run(model, inputs).last_hidden_state, dense)
    with pytest.raises(ValueError, match="is not patched"):
        unpatch(model)


def test_layers_that_were_taken_out_since_do_not_matter(model):
    """What belongs to the patch is known to every layer that is left."""
    inputs = inputs_of()
    shorter = copy.deepcopy(model)
    shorter.encoder.layer = shorter.encoder.layer[1:]
    patch_bert(model, MASK)
    model.encoder.layer = model.encoder.layer[1:]
    unpatch(model)
    assert torch.equal(run(model, inputs).last_hidden_state, run(shorter, inputs).last_hidden_state)


def test_adapters_around_projections(model):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(64, 4, device=DEVICE)

        def forward(self, hidden):
            return self.base(hidden) + self.down(hidden).sum(-1, keepdim=True)

    for layer in model.encoder.layer:
        layer.attention.self.query = Adapter(layer.attention.self.query)
    inputs = inputs_of()
    dense = run(model, inputs).last_hidden_state
    full = GlobalMask.random(2, 2, 32, sparsity=0.0)
    close(run(patch_bert(model, full), inputs).last_hidden_state, dense, inputs)


def test_context_manager_restores_what_was_there(model):
    inputs = inputs_of()
    dense = run(model, inputs).last_hidden_state
    with pytest.raises(KeyError), patched(model, MASK) as inside:
        assert inside is model and is_patched(model)
        raise KeyError
    assert not is_patched(model)
    torch.testing.assert_close(run(model, inputs).last_hidden_state, dense)
    patch_bert(model, MASK, 3, backend="reference")
    outer = run(model, inputs).last_hidden_state
    with patched(model, ~MASK | MASK):
        assert not torch.allclose(run(model, inputs).last_hidden_state, outer)
    torch.testing.assert_close(run(model, inputs).last_hidden_state, outer)
    assert model.encoder.layer[0].attention.self.sparse_attention.backend == "reference"


def test_output_attentions_are_those_used(model, twin):
    inputs = inputs_of()
    patch_bert(model, MASK)
    output = run(model, inputs, output_attentions=True)
    theirs = twin(MASK.keep, inputs)
    close(output.last_hidden_state, theirs.last_hidden_state, inputs)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (3, 2, 20, 20)
    real = inputs["attention_mask"].bool()
    pruned = ~MASK.keep[0, :, :20, :20].expand(3, -1, -1, -1)
    assert (output.attentions[0][pruned] == 0).all()
    rows = output.attentions[0].sum(-1).transpose(1, 2)[real]
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert "attentions" not in run(model, inputs)
    patch_bert(model, MASK, bits=3)
    levels = run(model, inputs, output_attentions=True).attentions[1].unique()
    assert len(levels) <= 8


def test_output_attentions_asked_for_by_the_config(model):
    inputs = inputs_of()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    patch_bert(model, MASK)
    from_config, from_argument = run(model, inputs), run(model, inputs, output_attentions=True)
    assert len(from_config.attentions) == 2
    for one, other in zip(from_config.attentions, from_argument.attentions, strict=True):
        assert torch.equal(one, other)
    assert "attentions" not in run(model, inputs, output_attentions=False)


def test_dropout_applies_in_training_only(model):
    for module in model.modules():
        if hasattr(module, "dropout") and hasattr(module, "query"):
            module.dropout.p = 0.5
    inputs = inputs_of()
    patch_bert(model, MASK)
    torch.testing.assert_close(run(model, inputs).last_hidden_state, run(model, inputs).last_hidden_state)
    model.train()
    assert not torch.allclose(run(model, inputs).last_hidden_state, run(model, inputs).last_hidden_state)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(model, dropout):
    for block in model.encoder.layer:
        block.attention.self.dropout.p = dropout
    inputs = inputs_of()
    patch_bert(model, MASK, bits=3).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(**inputs).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_equal_masked_eager(model, backend):
    """Training through the sparse kernels: gradients of the dense formula."""
    inputs = inputs_of()
    real = inputs["attention_mask"].bool()
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("masked_eager_twin")
    for layer, block in enumerate(dense.encoder.layer):
        block.attention.self.twin_keep = MASK.keep[layer].to(DEVICE)
    patch_bert(model, MASK, backend=backend)
    for each in (model, dense):
        each(**inputs).last_hidden_state[real].square().sum().backward()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)


def layers_with_lists_for_gradients(mask):
    layouts = [mask.layout(layer, DEVICE) for layer in range(mask.layers)]
    return sum(any(form[1] for form in (*each._lists, *each._step_lists)) for each in layouts)


def test_a_frozen_model_holds_no_lists_for_gradients_until_it_trains(model):
    """They take as much memory as the others, or several times as much."""
    mask = GlobalMask(MASK.keep)
    patch_bert(model.requires_grad_(False), mask)
    run(model, inputs_of())
    assert layers_with_lists_for_gradients(mask) == 0
    model.requires_grad_(True).train()
    assert layers_with_lists_for_gradients(mask) == 2


def test_a_frozen_model_patched_in_training_mode_has_lists_for_gradients(model):
    mask = GlobalMask(MASK.keep)
    patch_bert(model.requires_grad_(False).train(), mask)
    assert layers_with_lists_for_gradients(mask) == 2


def test_follows_the_model(model, tmp_path):
    """Deep copies, dtype changes, saving and loading, meta devices."""
    inputs = inputs_of()
    patch_bert(model, MASK, bits=3)
    output = run(model, inputs).last_hidden_state
    torch.testing.assert_close(run(copy.deepcopy(model), inputs).last_hidden_state, output)
    torch.testing.assert_close(run(model.double().float(), inputs).last_hidden_state, output)
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path).eval().to(DEVICE)
    assert not is_patched(loaded) and loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(run(patch_bert(loaded, MASK, bits=3), inputs).last_hidden_state, output)
    state = model.to("meta").encoder.layer[0].attention.self.sparse_attention
    assert [layout.device.type for layout in state.layouts.values()] == ["meta"]


def test_decoder_with_cache_uses_absolute_positions():
    torch.manual_seed(0)
    model = BertModel(small_config(is_decoder=True)).eval().to(DEVICE)
    patch_bert(model, MASK)
    tokens = torch.randint(0, 99, (2, 12), device=DEVICE)
    whole = run(model, {"input_ids": tokens}).last_hidden_state
    cache, steps = None, []
    for piece in tokens.split([5, 1, 4, 1, 1], dim=1):
        output = run(model, {"input_ids": piece}, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_is_refused(padded):
    """Its empty places would be keys, and queries be at its end."""
    model = patch_bert(BertModel(small_config(is_decoder=True)).eval().to(DEVICE), MASK)
    inputs = inputs_of((9, 5))
    inputs = inputs if padded else {"input_ids": inputs["input_ids"]}
    with pytest.raises(ValueError, match="dynamic key-value caches only"):
        run(model, inputs, past_key_values=StaticCache(config=model.config, max_cache_len=20))


def test_cross_attention_stays_dense():
    torch.manual_seed(0)
    model = BertModel(small_config(is_decoder=True, add_cross_attention=True)).eval().to(DEVICE)
    encoder_mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3], device=DEVICE)
    more = dict(encoder_hidden_states=torch.randn(2, 7, 64, device=DEVICE), encoder_attention_mask=encoder_mask)
    inputs = {"input_ids": torch.randint(0, 99, (2, 9), device=DEVICE), **more}
    dense = run(model, inputs).last_hidden_state
    full = GlobalMask.random(2, 2, 32, sparsity=0.0)
    torch.testing.assert_close(run(patch_bert(model, full), inputs).last_hidden_state, dense, atol=1e-5, rtol=1e-5)


def test_cross_attention_has_its_dropout_in_training():
    torch.manual_seed(0)
    model = BertModel(small_config(is_decoder=True, add_cross_attention=True)).train().to(DEVICE)
    for layer in model.encoder.layer:
        layer.crossattention.self.dropout.p = 0.5
    inputs = inputs_of((9, 9)) | {"encoder_hidden_states": torch.randn(2, 7, 64, device=DEVICE)}
    patch_bert(model, MASK)
    assert not torch.allclose(run(model, inputs).last_hidden_state, run(model, inputs).last_hidden_state)


def test_wrong_masks_and_models_are_named(model, tmp_path):
    def refused(match, mask, error=ValueError, target=model, **arguments):
        with pytest.raises(error, match=match):
            patch_bert(target, mask, **arguments)
        assert not is_patched(target)

    refused("the mask has 3 layers x 2 heads, BertModel has 2 x 2", GlobalMask.random(3, 2, 32, sparsity=0.5))
    refused("the mask has 2 layers x 4 heads", GlobalMask.random(2, 4, 32, sparsity=0.5))
    refused("the mask has 2 layers x 1 heads", GlobalMask.random(2, 1, 32, sparsity=0.5))
    refused("covers 32 queries and 16 keys", GlobalMask.random(2, 2, 32, 16, sparsity=0.5))
    refused("covers 16 queries and 32 keys", GlobalMask.random(2, 2, 16, 32, sparsity=0.5))
    refused("boolean tensor", torch.ones(2, 2, 8, 8))
    refused("mask is list", [True], error=TypeError)
    refused("no such file", tmp_path / "missing.safetensors", error=FileNotFoundError)
    refused("bits is 9", MASK, bits=9)
    refused("unpad is 'no', expected True, False or None", MASK, error=TypeError, unpad="no")
    refused("onednn is 1, expected True, False or None", MASK, error=TypeError, onednn=1)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).cpu(), {nn.Linear}, dtype=torch.qint8)
    refused("projection is .*Linear, whose weight is no tensor", MASK, error=TypeError, target=quantised)
    refused("backend is 'cuda'", MASK, backend="cuda")
    refused("Linear is not a transformers model", MASK, error=TypeError, target=nn.Linear(2, 2))
    gpt = GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=9))
    refused(
        "GPT2Model has no attention that can be patched; expected a model of BERT", MASK, error=TypeError, target=gpt
    )


def test_wrong_inputs_are_named(model):
    patch_bert(model, GlobalMask.random(2, 2, 16, sparsity=0.5))
    with pytest.raises(ValueError, match="longest packed sequence has 20 tokens .* the mask, which covers 16"):
        run(model, inputs_of())
    patch_bert(model, GlobalMask.random(2, 2, 16, sparsity=0.5), unpad=False)
    with pytest.raises(ValueError, match="queries end at position 20 and keys at 20, the mask covers 16.*unpad=True"):
        run(model, inputs_of())
    inputs = inputs_of((8, 8))
    inputs["attention_mask"] = torch.ones(2, 1, 8, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 8, 8\)"):
        run(model, inputs)
    inputs["attention_mask"] = torch.ones(2, 8, 8, device=DEVICE)
    inputs["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask has shape"):
        run(model, inputs)


@pytest.mark.parametrize("unpad", [None, False])
def test_a_padding_mask_of_another_shape_than_the_batch_is_named(model, unpad):
    patch_bert(model, MASK, unpad=unpad)
    inputs = inputs_of((30, 30, 30))
    for shape in ((3, 20), (3, 32), (2, 30), (3, 1)):
        inputs["attention_mask"] = torch.ones(shape, device=DEVICE)
        with pytest.raises(ValueError, match=rf"attention_mask has shape {re.escape(str(shape))}.*\(3, 30\)"):
            run(model, inputs)


@pytest.mark.parametrize("unpad", [None, False])
def test_one_padding_mask_for_all_sequences(model, unpad):
    """transformers' attention broadcasts it."""
    patch_bert(model, MASK, unpad=unpad)
    each = inputs_of((9, 9, 9))
    each["attention_mask"][:, 6:] = 0
    short = each | {"attention_mask": each["attention_mask"][:1]}
    ours, theirs = (run(model, inputs, output_hidden_states=True) for inputs in (short, each))
    for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(one, other, each)


def test_padding_beyond_the_mask_leaves_in_training_mode_when_asked(model):
    inputs = inputs_of((20, 20))
    inputs["attention_mask"][:, 12:] = 0
    mask = GlobalMask.random(2, 2, 16, sparsity=0.5)
    with pytest.raises(ValueError, match="the mask covers 16.*max_length=16.*longer.*unpad=True"):
        patch_bert(model, mask).train()(**inputs)
    patch_bert(model, mask, unpad=True).train()(**inputs)
