"""The linear layers of inference passes on a CPU, by torch's oneDNN operator, GELU included.

Without padding and with sparse attention a pass is linear layers. `torch.nn.functional.linear` copies the bias into the
output before it multiplies, multiplies float32 by MKL, which is tuned for one maker's processors, and leaves GELU to a
pass over memory of its own. oneDNN's operator does all three at once, with the weights as they are. That is faster with
AVX-512, and slower without. Many a processor multiplies 16-bit numbers several times slower than float32: there a
layer's numbers are converted to float32, and its output back, whenever it is computed.

Between the two layers of a feed-forward part lies the largest tensor of a pass. Blocks of memory of that size come from
the system page by page, every time, so that part is computed some rows at a time, whoever multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import pad
from torch.nn.modules import module as every_module

from ..backends import native_cpu
from .models import Encoder, is_a
from .packing import recurring_rows

# How oneDNN calls what transformers' activation classes compute.
_GELU_ALGORITHMS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "GELUTanh": "tanh",
}
_ALGORITHM = "sparse_attention_algorithm"  # of a linear layer, while its output goes to an activation: that one's
_ACTIVATED = "sparse_attention_activated"  # of a tensor: the activation has been taken
_WIDTH = "sparse_attention_width"  # of a block with a feed-forward part: features between its layers
_REUSED_BYTES = 1 << 25  # glibc's malloc returns larger blocks to the system, whatever its settings have adapted to
_PIECE_BYTES = 1 << 24
_LEAST_ROWS = 256  # with fewer, MKL is the faster one in float32 on Intel processors
_LEAST_CONVERTED_ROWS = 64  # with fewer, converting the weights takes as long as it saves


def onednn_dtypes() -> list[torch.dtype]:
    """What the operator computes on this processor; nothing where torch is built without it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return []
    return [torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]


def multiplied_as(dtype: torch.dtype) -> torch.dtype:
    """What numbers of `dtype` are multiplied as: themselves, or float32 where this processor is quicker with that."""
    if dtype == torch.bfloat16 and native_cpu.floats_are_faster():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


def expect_onednn(onednn: bool | None) -> None:
    """Raises ValueError where oneDNN must be used and torch has none."""
    if onednn and not onednn_dtypes():
        raise ValueError("onednn is True, but this build of torch has no oneDNN; pass None or False")


def set_onednn(encoder: Encoder, onednn: bool | None) -> None:
    """Makes an encoder's layers use oneDNN where they can, and compute feed-forward parts in pieces: yes, no, or (None)
    if it lies on a CPU, oneDNN where it is the faster one for its weights."""
    remove_onednn(encoder)
    for stack in encoder.stacks:
        recommended = onednn is None and _on_cpu_with_vectors(stack)
        untouched = {module for module in stack.modules() if "forward" not in module.__dict__}  # by accelerate, say
        if onednn or (recommended and any(map(onednn_is_faster, {weight.dtype for weight in stack.parameters()}))):
            _use_onednn(untouched, encoder.family.feed_forward)
        if onednn or recommended:
            _use_pieces(untouched, encoder.family.feed_forward)


def remove_onednn(encoder: Encoder) -> None:
    """Undoes `set_onednn`."""
    for stack in encoder.stacks:
        for module in stack.modules():
            module.__dict__.pop(_WIDTH, None)
            if type(module) is OneDNNLinear:
                module.__class__ = nn.Linear
            elif isinstance(module, OneDNNLinear):  # parametrised since, by a class of its own
                type(module).__bases__ = (nn.Linear,)
            elif isinstance(module, _Changed):
                module.__class__ = module.original


def onednn_is_faster(dtype: torch.dtype) -> bool:
    """Whether linear layers of `dtype` are faster by oneDNN on this processor. With AVX2, MKL is the faster one in
    float32 and GELU costs less by itself."""
    if not onednn_dtypes():
        return False
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") or multiplied_as(dtype) != dtype


def _on_cpu_with_vectors(stack: nn.Module) -> bool:
    on_cpu = all(weight.device.type == "cpu" for weight in stack.parameters())
    return on_cpu and torch.backends.cpu.get_cpu_capability().startswith("AVX")


class OneDNNLinear(nn.Linear):
    """A linear layer that oneDNN computes where it can, and with it the activation that follows, if its block says so.

    A class, not a `forward` of each layer's own: torch.compile compiles layers that differ by objects one by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _usable(self, input):
            return super().forward(input)
        algorithm = self.__dict__.get(_ALGORITHM)
        activation = ("none", [], "") if algorithm is None else ("gelu", [], algorithm)
        dtype = multiplied_as(input.dtype)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        rows = input.shape[:-1].numel()
        added = 0 if dtype == torch.bfloat16 else recurring_rows(rows) - rows
        if added:  # torch's own way is oneDNN too in bfloat16, whatever their number
            input_rows = pad(input.reshape(rows, -1), (0, 0, 0, added)).to(dtype)
            output = torch.ops.mkldnn._linear_pointwise(input_rows, weight, bias, *activation)
            output = output[:rows].view(*input.shape[:-1], self.out_features)
        else:
            output = torch.ops.mkldnn._linear_pointwise(input.to(dtype), weight, bias, *activation)
        output = output.to(input.dtype)
        if algorithm is not None:
            setattr(output, _ACTIVATED, True)
        return output


class _Changed:
    """A module with another forward method, of a class made from this one and its own.

    Attributes:
        original: its own class.
        names: a block's, of the linear layer and the activation that follows.
    """

    original: type[nn.Module]
    names: tuple[str, str]

    def __reduce_ex__(self, protocol: int) -> tuple:
        # For copies and pickles: classes made at run time have no name to be found by.
        return _new_changed, (type(self).__mro__[1], self.original, self.names), self.__dict__


class _FusedActivation(_Changed):
    """An activation whose linear layer may have computed it already."""

    def forward(self, input: Tensor) -> Tensor:
        return input if getattr(input, _ACTIVATED, False) else super().forward(input)


class _InPieces(_Changed):
    """A block that computes its feed-forward part, which families call by one of two names, some rows at a time."""

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        return _in_pieces(self, super().feed_forward_chunk, attention_output)

    def ff_chunk(self, attention_output: Tensor) -> Tensor:
        return _in_pieces(self, super().ff_chunk, attention_output)


def _in_pieces(block: nn.Module, feed_forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    row_bytes = block.__dict__.get(_WIDTH, 0) * input.itemsize
    rows = 0 if torch.compiler.is_compiling() else input.numel() // input.shape[-1]
    if (
        rows * row_bytes <= _REUSED_BYTES
        or torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or block.training
        or input.device.type != "cpu"
        or _watched(_feed_forward_modules(block))
    ):
        return feed_forward(input)
    most = 1 << max(1, _PIECE_BYTES // row_bytes).bit_length() - 1
    pieces = input.reshape(1, rows, -1).split(most, dim=1)
    return torch.cat([feed_forward(piece) for piece in pieces], dim=1).view(input.shape)


def _feed_forward_modules(block: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block's feed-forward part, or some more: all but the block itself and its attention, where
    transformers leaves hooks once hidden states or attentions were asked for."""
    for name, child in block.named_children():
        if name not in ("attention", "crossattention"):
            yield from child.modules()


def _watched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook sees what goes into one of these modules or comes out."""
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


class _FusingBlock(_InPieces):
    """A block that hands the output of a linear layer to an activation, and lets them be computed as one.

    Who else calls the linear layer, such as an adapter around it, gets its own output.
    """

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        linear, activation = (getattr(self, name) for name in self.names)
        algorithm = _gelu_algorithm(activation)
        # What a hook or another forward method would see between the two is left to them.
        alone = type(linear) is OneDNNLinear and isinstance(activation, _FusedActivation) and algorithm is not None
        if (
            not alone
            or _watched((linear, activation))
            or "forward" in linear.__dict__
            or "forward" in activation.__dict__
        ):
            return super().forward(*args, **kwargs)
        linear.__dict__[_ALGORITHM] = algorithm
        try:
            return super().forward(*args, **kwargs)
        finally:
            linear.__dict__.pop(_ALGORITHM, None)


@cache
def _changed(change: type[_Changed], original: type[nn.Module], names: tuple[str, str]) -> type[nn.Module]:
    return type(f"Patched{original.__name__}", (change, original), {"original": original, "names": names})


def _new_changed(change: type[_Changed], original: type[nn.Module], names: tuple[str, str]) -> nn.Module:
    cls = _changed(change, original, names)
    return cls.__new__(cls)


def _use_onednn(modules: set[nn.Module], feed_forward: tuple[str, str]) -> None:
    linears = {module for module in modules if type(module) is nn.Linear}
    for linear in linears:
        linear.__class__ = OneDNNLinear
    for block in modules:
        linear, activation = (getattr(block, name, None) for name in feed_forward)
        if linear in linears and activation in modules and _gelu_algorithm(activation):
            _change(block, _FusingBlock, feed_forward)
            _change(activation, _FusedActivation, feed_forward)


def _use_pieces(modules: set[nn.Module], feed_forward: tuple[str, str]) -> None:
    linears = {module for module in modules if type(module) in (nn.Linear, OneDNNLinear)}
    for block in modules:
        if hasattr(block, "feed_forward_chunk") or hasattr(block, "ff_chunk"):
            _change(block, _InPieces, feed_forward)
            block.__dict__[_WIDTH] = max((linear.out_features for linear in linears & set(block.modules())), default=0)


def _change(module: nn.Module, change: type[_Changed], names: tuple[str, str]) -> None:
    if not isinstance(module, change):
        module.__class__ = _changed(change, type(module), names)


def _gelu_algorithm(activation: object) -> str | None:
    return next((algorithm for name, algorithm in _GELU_ALGORITHMS.items() if is_a(activation, name)), None)


def _least_rows(dtype: torch.dtype) -> int:
    return _LEAST_ROWS if multiplied_as(dtype) == dtype else _LEAST_CONVERTED_ROWS


def _usable(module: nn.Linear, input: Tensor) -> bool:
    """The operator has no gradients and no autocast, and takes plain tensors of one dtype."""
    weight, bias = module.weight, module.bias
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or type(input) is not Tensor
        or type(weight) is not nn.Parameter
        or input.shape[:-1].numel() < _least_rows(input.dtype)  # after tracing, which it would tie to a size
    ):
        return False
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    return (
        input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype
        and multiplied_as(input.dtype) in onednn_dtypes()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )
