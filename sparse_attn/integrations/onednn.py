"""The linear layers of inference passes on a CPU, by torch's oneDNN operator, GELU included.

Without padding and with sparse attention a pass is linear layers. `torch.nn.functional.linear` copies the bias into the
output before it multiplies, multiplies float32 by MKL, which is tuned for one maker's processors, and leaves GELU to a
pass over memory of its own. oneDNN's operator does all three at once, with the weights as they are: no parameter is
copied or changed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .models import Encoder, is_a
from .packing import recurring_rows

# How oneDNN calls what transformers' activation classes compute.
_GELU_ALGORITHMS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "GELUTanh": "tanh",
}
_MODE = "sparse_attention_onednn"
_NEXT = "sparse_attention_next"  # of a linear layer: the activation that follows, and its algorithm
_ACTIVATED = "sparse_attention_activated"  # of a tensor: the activation has been taken


def onednn_dtypes() -> list[torch.dtype]:
    """What the operator computes on this processor; nothing where torch is built without it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return []
    return [torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]


def set_onednn(encoder: Encoder, onednn: bool | None) -> None:
    """Makes an encoder's layers use oneDNN where they can: yes, no, or (None) if it lies on a CPU that torch's build
    of oneDNN has kernels for. Raises ValueError for yes where torch has no oneDNN."""
    remove_onednn(encoder)
    if onednn and not onednn_dtypes():
        raise ValueError("onednn is True, but this build of torch has no oneDNN; pass None or False")
    for stack in encoder.stacks:
        setattr(stack, _MODE, onednn)
        if onednn if onednn is not None else _recommended(stack):
            _route(stack, encoder.family.feed_forward)


def remove_onednn(encoder: Encoder) -> None:
    """Undoes `set_onednn`."""
    for stack in encoder.stacks:
        stack.__dict__.pop(_MODE, None)
        for module in stack.modules():
            if type(module) is OneDNNLinear:
                module.__class__ = nn.Linear
                module.__dict__.pop(_NEXT, None)
            elif isinstance(module, _AfterOneDNNLinear):
                module.__class__ = module.original


def onednn_mode(encoder: Encoder) -> bool | None:
    """What `set_onednn` was called with last."""
    return getattr(encoder.stacks[0], _MODE, False)


def _recommended(stack: nn.Module) -> bool:
    on_cpu = all(weight.device.type == "cpu" for weight in stack.parameters())
    vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return on_cpu and vectors and bool(onednn_dtypes())


class OneDNNLinear(nn.Linear):
    """A linear layer that oneDNN computes where it can, and with it the activation that follows, if there is one.

    A class, not a `forward` of each layer's own: torch.compile compiles layers that differ by objects one by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _usable(self, input):
            return super().forward(input)
        activation, algorithm = self.__dict__.get(_NEXT, (None, ""))
        # What a hook would see between the two is left to them.
        if activation is None or self._forward_hooks or activation._forward_pre_hooks:
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        output = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "gelu", [], algorithm)
        setattr(output, _ACTIVATED, True)
        return output


class _AfterOneDNNLinear:
    """What an activation becomes whose linear layer may have computed it already."""

    original: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        return input if getattr(input, _ACTIVATED, False) else super().forward(input)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _new_after_linear, (self.original,), self.__dict__


@cache
def _after_linear(activation: type[nn.Module]) -> type[nn.Module]:
    return type(f"OneDNN{activation.__name__}", (_AfterOneDNNLinear, activation), {"original": activation})


def _new_after_linear(activation: type[nn.Module]) -> nn.Module:
    """For copies and pickles: classes made at run time have no name to be found by."""
    cls = _after_linear(activation)
    return cls.__new__(cls)


def _route(stack: nn.Module, feed_forward: tuple[str, str]) -> None:
    untouched = {module for module in stack.modules() if "forward" not in module.__dict__}  # by accelerate, say
    linears = {module for module in untouched if type(module) is nn.Linear}
    for linear in linears:
        linear.__class__ = OneDNNLinear
    for block in stack.modules():
        linear, activation = (getattr(block, name, None) for name in feed_forward)
        algorithm = _gelu_algorithm(activation)
        if linear in linears and activation in untouched and algorithm:
            linear.__dict__[_NEXT] = activation, algorithm  # not as a submodule
            if not isinstance(activation, _AfterOneDNNLinear):
                activation.__class__ = _after_linear(type(activation))


def _gelu_algorithm(activation: object) -> str | None:
    return next((algorithm for name, algorithm in _GELU_ALGORITHMS.items() if is_a(activation, name)), None)


def _usable(module: nn.Linear, input: Tensor) -> bool:
    """The operator has no gradients and no autocast, and takes plain tensors of one dtype."""
    weight, bias = module.weight, module.bias
    if torch.compiler.is_compiling() or type(input) is not Tensor or type(weight) is not nn.Parameter:
        return False
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    return (
        input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype
        and input.dtype in onednn_dtypes()
        and _recurs(input)
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )


def _recurs(input: Tensor) -> bool:
    """Whether the number of rows does. torch's own way in bfloat16 is oneDNN too, so it does not matter there."""
    rows = input.numel() // input.shape[-1]
    return input.dtype == torch.bfloat16 or rows == recurring_rows(rows)
