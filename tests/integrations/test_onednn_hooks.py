"""oneDNN and what others put on layers: hooks, adapters, activations and forward methods of their own."""

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from sparse_attn import patch_model, unpatch
from sparse_attn.integrations.onednn import onednn_dtypes
from tests.integrations.conftest import padded_inputs
from tests.integrations.onednn_operators import GELU, ONEDNN, operators_of
from tests.integrations.test_families import MASK

pytestmark = [
    pytest.mark.skipif(not onednn_dtypes(), reason="torch is built without oneDNN"),
    pytest.mark.usefixtures("any_rows"),
]


def test_hooks_see_what_they_are_put_on(bert):
    patch_model(bert, MASK, onednn=True)
    block = bert.encoder.layer[0].intermediate
    seen = []
    block.dense.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    _, counts = operators_of(bert, padded_inputs())
    assert counts[GELU] == 1
    torch.testing.assert_close(seen[0][1], torch.nn.functional.linear(seen[0][0], block.dense.weight, block.dense.bias))


def test_hooks_of_all_modules_see_them_too(bert, small_pieces):
    patch_model(bert, MASK, onednn=True)
    linear, seen = bert.encoder.layer[0].intermediate.dense, []

    def hook(module, args, output):
        if module is linear:
            seen.append((args[0], output))

    with register_module_forward_hook(hook):
        operators_of(bert, padded_inputs())
    ((input, output),) = seen
    torch.testing.assert_close(output, torch.nn.functional.linear(input, linear.weight, linear.bias))


@pytest.mark.parametrize("of_all_modules", [False, True])
def test_hooks_before_an_activation_see_what_it_gets(bert, of_all_modules):
    patch_model(bert, MASK, onednn=True)
    block, seen = bert.encoder.layer[0].intermediate, []
    activation, input = block.intermediate_act_fn, torch.randn(1, 4, 64)

    def hook(module, args):
        if module is activation:
            seen.append(args[0])

    add = register_module_forward_pre_hook if of_all_modules else activation.register_forward_pre_hook
    with add(hook), torch.no_grad():
        block(input)
    expected = torch.nn.functional.linear(input, block.dense.weight, block.dense.bias)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


class Adapter(torch.nn.Module):
    """Adds to a layer, as LoRA does."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, input):
        return self.base_layer(input) + input.sum(-1, keepdim=True)


def replaced_by_an_adapter(block):
    block.dense = Adapter(block.dense)


def replaced_activation(block):
    block.intermediate_act_fn = torch.nn.ReLU()


def other_activation_forward(block):
    block.intermediate_act_fn.forward = lambda input: 2 * input


def other_forward(block):
    linear = block.dense
    block.dense.forward = lambda input: 2 * type(linear).forward(linear, input)


CHANGES = [replaced_by_an_adapter, replaced_activation, other_activation_forward, other_forward]


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_are_changed_after_patching(bert, change):
    """GELU is fused only where the block still hands the layer's own output to it."""
    twin, inputs = copy.deepcopy(bert), padded_inputs()
    patch_model(bert, MASK, onednn=True)
    patch_model(twin, MASK, onednn=False)
    for model in (bert, twin):
        for layer in model.encoder.layer:
            change(layer.intermediate)
    ours, theirs = operators_of(bert, inputs)[0], operators_of(twin, inputs)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_forward_methods_of_others_are_left_alone(bert):
    linear = bert.encoder.layer[0].attention.self.query
    linear.forward = own = lambda input: torch.nn.Linear.forward(linear, input)
    patch_model(bert, MASK, onednn=True)
    assert linear.forward is own and operators_of(bert, padded_inputs())[1][ONEDNN] == 6 * MASK.layers - 1
    assert unpatch(bert) is bert and linear.forward is own
