"""Linear layers by oneDNN: the same outputs, where nobody needs what it lacks."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertModel
from transformers.models.bert.modeling_bert import BertLayer

from sparse_attn import GlobalMask, is_patched, patch_model, patched, unpatch
from sparse_attn.backends import native_cpu
from sparse_attn.integrations import onednn
from sparse_attn.integrations.models import encoder_of
from sparse_attn.integrations.onednn import onednn_dtypes
from tests.integrations.conftest import padded_inputs, small_config
from tests.integrations.onednn_operators import GELU, LINEAR, ONEDNN, TANH, Operators, operators_of
from tests.integrations.test_families import MASK, MODELS, make

pytestmark = [
    pytest.mark.skipif(not onednn_dtypes(), reason="torch is built without oneDNN"),
    pytest.mark.usefixtures("any_rows"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_every_family(name, dtype):
    if dtype not in onednn_dtypes():
        pytest.skip(f"oneDNN does not compute {dtype} on this processor")
    model, inputs = make(name).cpu().to(dtype), padded_inputs()
    theirs, usual = operators_of(patch_model(model, MASK, onednn=False), inputs)
    ours, counts = operators_of(patch_model(model, MASK, onednn=True), inputs)
    limits = dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.1, rtol=0.1)
    torch.testing.assert_close(ours, theirs, **limits)
    # All but what stands before and after the layers: ELECTRA's projection of embeddings, BERT's pooler.
    assert usual[ONEDNN] == 0 and counts[ONEDNN] >= 6 * MASK.layers and counts[LINEAR] <= 1
    assert counts[ONEDNN] + counts[LINEAR] == usual[LINEAR]
    assert counts[GELU] == 0 and counts[TANH] <= 1


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "_LEAST_ROWS"), (torch.bfloat16, "_LEAST_CONVERTED_ROWS")])
def test_few_rows_are_left_to_torch(dtype, name, bert, monkeypatch):
    """The operator costs more than it gains there."""
    inputs = padded_inputs()
    rows = int(inputs["attention_mask"].sum())
    patch_model(bert.to(dtype), MASK, onednn=True)
    monkeypatch.setattr(onednn, "multiplied_as", lambda found: torch.float32)
    for least, uses in ((rows, True), (rows + 1, False)):
        monkeypatch.setattr(onednn, name, least)
        assert (operators_of(bert, inputs)[1][ONEDNN] > 0) == uses


ACTIVATIONS = ["gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    torch.manual_seed(0)
    model, inputs = BertModel(small_config(hidden_act=activation), add_pooling_layer=False).eval(), padded_inputs()
    for layer in model.encoder.layer:  # values for which activations differ
        layer.intermediate.dense.weight.data.mul_(50)
    mask = GlobalMask.random(2, 2, 32, sparsity=0.6)
    theirs, _ = operators_of(patch_model(model, mask, onednn=False), inputs)
    ours, counts = operators_of(patch_model(model, mask, onednn=True), inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    elementwise = sum(
        counts[name] for name in (GELU, TANH, "aten.erf.default", "aten.relu.default", "aten.silu.default")
    )
    assert counts[ONEDNN] == 12 and elementwise == (2 if activation in ("relu", "silu") else 0)


class Products(TorchDispatchMode):
    """The activation and the number of rows of every product by oneDNN, and the dtypes of all."""

    def __init__(self):
        super().__init__()
        self.seen, self.dtypes = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) == ONEDNN:
            self.seen.append((args[3], args[0].shape[:-1].numel()))
            self.dtypes |= {args[0].dtype, args[1].dtype, args[2].dtype}
        return function(*args, **(kwargs or {}))


def rows_of_products(model, inputs, **more):
    """How many rows the layers' first linear layers of feed-forward parts take at a time."""
    with Products() as products, torch.set_grad_enabled(more.pop("gradients", False)):
        output = model(**inputs, **more).last_hidden_state
    return output, [rows for activation, rows in products.seen if activation == "gelu"]


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_feed_forward_parts_in_pieces(name, unpad, small_pieces, monkeypatch):
    model, inputs = patch_model(make(name).cpu(), MASK, unpad=unpad, onednn=True), padded_inputs()
    pieces, rows = rows_of_products(model, inputs)
    own = rows[: len(rows) // MASK.layers]
    assert len(own) > 1 and set(own[:-1]) == {16} and own * MASK.layers == rows
    monkeypatch.setattr(onednn, "_REUSED_BYTES", 1 << 25)
    whole, rows = rows_of_products(model, inputs)
    assert rows == [sum(own)] * MASK.layers
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reason", ["gradients", "training", "hook"])
def test_feed_forward_parts_that_stay_whole(reason, bert, small_pieces):
    patch_model(bert, MASK, onednn=True).requires_grad_(False)
    seen = []
    if reason == "hook":
        for layer in bert.encoder.layer:
            layer.output.register_forward_hook(lambda module, args, output: seen.append(output))
    bert.train(reason == "training")
    _, rows = rows_of_products(bert, padded_inputs(), gradients=reason == "gradients")
    assert len(rows) == MASK.layers and len(seen) == (MASK.layers if reason == "hook" else 0)


@pytest.mark.parametrize("name", MODELS)
def test_feed_forward_parts_in_pieces_after_hidden_states_were_asked_for(name, small_pieces):
    """transformers leaves hooks on layers and their attention then."""
    model, inputs = patch_model(make(name).cpu(), MASK, onednn=True), padded_inputs()
    _, before = rows_of_products(model, inputs)
    rows_of_products(model, inputs, output_hidden_states=True, output_attentions=True)
    _, after = rows_of_products(model, inputs)
    assert len(before) > MASK.layers and after == before


def test_passes_with_gradients_have_them(bert):
    inputs = padded_inputs()
    patch_model(bert, MASK, onednn=True)
    for training in (True, False):
        output, counts = operators_of(bert.train(training), inputs, gradients=True)
        assert counts[ONEDNN] == 0
        output.sum().backward()
        assert all(weight.grad is not None for weight in bert.encoder.parameters())
    bert.requires_grad_(False)
    assert operators_of(bert, inputs, gradients=True)[1][ONEDNN] > 0
    bert.encoder.layer[0].output.dense.bias.requires_grad_()  # all that comes after needs gradients too
    assert operators_of(bert, inputs, gradients=True)[1][ONEDNN] == 5


@pytest.mark.parametrize("kind", ["autocast", "float16", "disabled"])
def test_what_the_operator_lacks(bert, kind, monkeypatch):
    monkeypatch.setattr(onednn, "multiplied_as", lambda dtype: dtype)
    patch_model(bert, MASK, onednn=True)
    inputs = padded_inputs()
    expected = bert(**inputs).last_hidden_state.detach()
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            output, counts = operators_of(bert, inputs)
    elif kind == "float16":
        output, counts = operators_of(bert.half(), inputs)
    else:
        with torch.backends.mkldnn.flags(enabled=False):
            output, counts = operators_of(bert, inputs)
    assert counts[ONEDNN] == 0
    torch.testing.assert_close(output.float(), expected, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_that_are_multiplied_slowly_are_converted(bert, dtype, capability, monkeypatch):
    inputs, exact = padded_inputs(), copy.deepcopy(bert.to(dtype)).float()
    exact, _ = operators_of(patch_model(exact, MASK, onednn=False), inputs)
    usual, _ = operators_of(patch_model(bert, MASK, onednn=False), inputs)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(onednn, "multiplied_as", lambda found: torch.float32)
    with Products() as products, torch.no_grad():
        output = patch_model(bert, MASK)(**inputs).last_hidden_state
    assert len(products.seen) == 6 * MASK.layers and products.dtypes == {torch.float32}
    assert output.dtype == dtype and all(weight.dtype == dtype for weight in bert.parameters())
    assert (output - exact).abs().max() < 1.5 * (usual - exact).abs().max()
    # Once the weights are float32, what is faster for that computes again, which patching chooses anew.
    assert (operators_of(patch_model(bert.float(), MASK), inputs)[1][ONEDNN] > 0) == (capability == "AVX512")


def test_only_what_is_known_to_be_slow_is_converted(monkeypatch):
    assert onednn.multiplied_as(torch.float32) == torch.float32
    for sets, as_floats in (
        (("amx", "avx512", "avx512_bf16"), False), (("avx512_bf16", "avx512"), False),
        (("avx512", "avx512_bf16"), True), (("avx2", "portable"), True), (("portable",), False), ((), False),
    ):  # fmt: skip
        monkeypatch.setattr(native_cpu, "instruction_sets", lambda sets=sets: sets)
        assert (onednn.multiplied_as(torch.bfloat16) == torch.float32) == as_floats
    as_is = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert onednn.multiplied_as(torch.float16) == (torch.float16 if as_is else torch.float32)


def test_forward_mode_gradients_go_through_linear_layers(bert):
    patch_model(bert, MASK, onednn=True)
    linear = bert.encoder.layer[0].intermediate.dense
    input, tangent = torch.randn(2, 1, 4, linear.in_features)
    with torch.no_grad():
        _, output = torch.func.jvp(linear, (input,), (tangent,))
    torch.testing.assert_close(output, torch.nn.functional.linear(tangent, linear.weight))


def test_a_layer_called_by_itself_is_linear(bert):
    patch_model(bert, MASK, onednn=True)
    linear = bert.encoder.layer[0].intermediate.dense
    input = torch.randn(4, 2, linear.in_features)
    operators_of(bert, padded_inputs())
    with torch.no_grad():
        output = linear(input)
    torch.testing.assert_close(output, torch.nn.functional.linear(input, linear.weight, linear.bias))


def test_can_be_traced(bert):
    patch_model(bert, MASK, onednn=True, unpad=False)
    inputs = padded_inputs()
    with torch.no_grad():
        expected = bert(**inputs).last_hidden_state
        block = bert.encoder.layer[0].intermediate
        traced = torch.jit.trace(block, expected)
        torch.testing.assert_close(traced(expected), block(expected), atol=1e-5, rtol=1e-5)


def test_numbers_of_rows_recur_in_float32(bert):
    """oneDNN keeps a kernel for each; batches that never had padding get rows that are dropped again."""
    block, input = bert.encoder.layer[0].intermediate, torch.randn(3, 67, 64)
    with torch.no_grad():
        expected = block.dense(input), block(input)
        patch_model(bert, MASK, onednn=True)
        with Products() as products:
            found = block.dense(input), block(input)
            block.dense(input[:, :64])
    assert products.seen == [("none", 204), ("gelu", 204), ("none", 192)]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    assert found[0].is_contiguous() and found[0].shape == (3, 67, 64)


def test_a_traced_feed_forward_part_serves_other_numbers_of_rows(bert, small_pieces):
    patch_model(bert, MASK, onednn=True, unpad=False)
    layer, other = bert.requires_grad_(False).encoder.layer[0], torch.randn(1, 25, 64)
    with torch.no_grad():
        traced = torch.jit.trace(lambda input: layer.feed_forward_chunk(input), torch.randn(1, 40, 64))
        torch.testing.assert_close(traced(other), layer.feed_forward_chunk(other), atol=1e-5, rtol=1e-5)


def test_inputs_of_another_dtype_are_refused_by_torch(bert):
    patch_model(bert, MASK, onednn=True)
    linear = bert.encoder.layer[0].intermediate.dense
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
        linear(torch.randn(4, 2, linear.in_features, dtype=torch.bfloat16))


class Wrapped(torch.Tensor):
    """A tensor that is not a plain one, as quantised weights are."""


@pytest.mark.parametrize("wrapped", ["weight", "input", "neither"])
def test_tensors_of_other_classes_are_left_to_torch(bert, wrapped):
    patch_model(bert, MASK, onednn=True)
    linear = bert.encoder.layer[0].intermediate.dense
    input = torch.randn(4, 2, linear.in_features)
    if wrapped == "weight":
        linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Wrapped))
    elif wrapped == "input":
        input = input.as_subclass(Wrapped)
    with Operators() as operators, torch.no_grad():
        linear(input)
    assert operators.counts[ONEDNN] == (wrapped == "neither")


def test_no_tokens(bert):
    patch_model(bert, MASK, onednn=True)
    linear = bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        assert linear(torch.zeros(1, 0, linear.in_features)).shape == (1, 0, linear.out_features)


def test_unpatching_removes_it(bert):
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    classes, attributes = [type(module) for module in bert.modules()], [set(vars(module)) for module in bert.modules()]
    patch_model(bert, MASK, onednn=True)
    assert [type(module) for module in bert.modules()] != classes
    assert before.keys() == bert.state_dict().keys()
    unpatch(bert)
    assert [type(module) for module in bert.modules()] == classes
    assert all(vars(module).keys() == keys for module, keys in zip(bert.modules(), attributes, strict=True))
    assert operators_of(bert, padded_inputs())[1][ONEDNN] == 0
    assert all(torch.equal(value, before[name]) for name, value in bert.state_dict().items())


def test_unpatching_removes_it_from_layers_that_were_parametrised_since(bert):
    patch_model(bert, MASK, onednn=True)
    linear, other = bert.encoder.layer[0].intermediate.dense, bert.encoder.layer[1].intermediate.dense
    parametrize.register_parametrization(linear, "weight", torch.nn.Identity())
    unpatch(bert)
    assert linear.weight.shape == other.weight.shape and type(other) is torch.nn.Linear
    parametrize.remove_parametrizations(linear, "weight")
    assert type(linear) is torch.nn.Linear


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_uses_its_own_weights(bert, copied):
    patch_model(bert, MASK, onednn=True)
    inputs = padded_inputs()
    expected, _ = operators_of(bert, inputs)
    twin = copied(bert)
    for weight in bert.parameters():
        weight.data.zero_()
    output, counts = operators_of(twin, inputs)
    torch.testing.assert_close(output, expected, atol=0, rtol=0)
    assert counts[ONEDNN] > 0 and counts[GELU] == 0


@pytest.mark.parametrize(("capability", "by_onednn"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_is_the_default_where_it_is_faster(capability, by_onednn, bert, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (operators_of(patch_model(bert, MASK), padded_inputs())[1][ONEDNN] > 0) == by_onednn


def test_without_it_feed_forward_parts_are_still_in_pieces(bert, small_pieces, monkeypatch):
    inputs, rows, whole = padded_inputs(), [], BertLayer.feed_forward_chunk
    with torch.no_grad():
        expected = patch_model(bert, MASK, onednn=False)(**inputs).last_hidden_state
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(BertLayer, "feed_forward_chunk", lambda *args: rows.append(args[1].shape[1]) or whole(*args))
    output, counts = operators_of(patch_model(bert, MASK), inputs)
    assert len(rows) > MASK.layers and max(rows) == 16 and counts[ONEDNN] == 0
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, onednn.OneDNNLinear) for module in bert.modules())
    assert all(type(layer) is BertLayer for layer in unpatch(bert).encoder.layer)


def test_without_onednn(bert, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="onednn is True, but this build of torch has no oneDNN"):
        patch_model(bert, MASK, onednn=True)
    assert not is_patched(bert)
    assert operators_of(patch_model(bert, MASK), padded_inputs())[1][ONEDNN] == 0


def test_the_context_manager_restores_it(bert):
    patch_model(bert, MASK, onednn=False)
    with patched(bert, MASK, onednn=True):
        assert encoder_of(bert).attention[0].sparse_attention.onednn is True
        assert operators_of(bert, padded_inputs())[1][ONEDNN] > 0
    assert encoder_of(bert).attention[0].sparse_attention.onednn is False
    assert operators_of(bert, padded_inputs())[1][ONEDNN] == 0


def test_compiled_passes_are_left_to_the_compiler(bert):
    patch_model(bert, MASK, onednn=True)
    inputs, seen = padded_inputs(), []
    with torch.no_grad():
        expected = bert(**inputs).last_hidden_state

    def record(graph, examples):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    for layer in bert.encoder.layer:
        layer.compile(backend=record)
    with torch.no_grad():
        output = bert(**inputs).last_hidden_state
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    assert any("linear" in name for name in seen) and not any("mkldnn" in name for name in seen)
