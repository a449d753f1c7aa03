"""What transformers calls in a patched model: the attention function and the mask function, in its registries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..attention import attention_probabilities, prepare, sparse_attention
from ..layout import SparseLayout
from ..masks import GlobalMask
from ..quantization import QuantizationTable
from .models import FAMILIES, Encoder, is_a, transformers_models
from .packing import Packing

ATTENTION_NAME = "sparse_attn"
STATE = "sparse_attention"
_SELF_ATTENTION = frozenset(family.attention for family in FAMILIES)
_LAYER, _COUNTER = "sparse_attention_layer", "sparse_attention_counter"
_LENGTHS = "sparse_attention_lengths"  # of a pass's padding mask: where each sequence ends


class SparseAttentionState(nn.Module):
    """What a patched attention module needs, following it from device to device.

    It holds no parameters and no buffers, so the model's state dict and dtype conversions leave it alone.

    Attributes:
        layers: the mask's layers that the module computes: one, but in models whose layers share it.
        tables: what probabilities are rounded to in each layer of the mask.
        layouts: of these layers, on the device of the weights.
        first, first_table: of the first of them.
        gradients: whether lists for the backward pass are compiled ahead of the first call.
        handles, unpad, onednn: hooks that belong to the patch, and its options: those of all modules.
    """

    def __init__(
        self,
        mask: GlobalMask,
        layers: list[int],
        tables: Sequence[QuantizationTable | None],
        backend: str,
        head_dim: int,
        weight: Tensor,
        gradients: bool,
    ):
        super().__init__()
        self.gradients = gradients
        self.mask, self.layers = mask, layers
        self.tables, self.first_table = tuple(tables), tables[layers[0]]
        self.backend, self.head_dim = backend, head_dim
        self.handles: list[Any] = []
        self.unpad: bool | None = None
        self.onednn: bool | None = None
        self.follow(weight)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.device = self.first.device  # a file's reader may lack the one that it was on
        self._prepare()

    def follow(self, weight: Tensor) -> None:
        """Compiles what the backend needs for a weight's device and dtype now, not inside a traced forward pass."""
        self.layouts = {layer: self.mask.layout(layer, weight.device) for layer in self.layers}
        self.first = self.layouts[self.layers[0]]
        self.device, self.dtype = weight.device, weight.dtype
        self._prepare()

    def train(self, mode: bool = True) -> SparseAttentionState:
        """Training needs the lists for the backward pass, whatever was frozen before."""
        if mode and not self.gradients:
            self.gradients = True
            self._prepare()
        return super().train(mode)

    def _prepare(self) -> None:
        if self.device.type != "meta":
            training = None if self.gradients else False
            for layer, layout in self.layouts.items():
                prepare(layout, self.head_dim, self.dtype, self.backend, self.tables[layer], training)

    def layout(self, layer: int | None, device: torch.device) -> SparseLayout:
        """The layout of a layer, by default of the only one: without its number, so that what is compiled for one
        module serves all."""
        layout = self.first if layer is None else self.layouts[layer]
        if layout.device != device:
            return self.mask.layout(self.layers[0] if layer is None else layer, device)
        return layout

    def table(self, layer: int | None) -> QuantizationTable | None:
        """What probabilities are rounded to in a layer, as for `layout`."""
        return self.first_table if layer is None else self.tables[layer]

    def _apply(self, function, recurse=True):
        self.follow(function(torch.empty(0, device=self.device, dtype=self.dtype)))
        return super()._apply(function, recurse)

    def extra_repr(self) -> str:
        bits = ", ".join(str(table.bits if table else None) for table in map(self.table, self.layers))
        return f"layers={self.layers}, bits={bits}, backend={self.backend!r}"


def watch_implementation(encoder: Encoder) -> list[Any]:
    """Makes a pass raise where another attention was set for a patched model. Returns the hooks' handles."""
    models = transformers_models(encoder.model)
    return [model.register_forward_pre_hook(_expect_sparse_attention) for model in models]


def _expect_sparse_attention(model: PreTrainedModel, args: tuple) -> None:
    found = model.config._attn_implementation
    if not found.startswith(ATTENTION_NAME):
        raise ValueError(
            f"the model is patched, but its attention implementation was set to {found!r} since: call unpatch(model) "
            f"first, or model.set_attn_implementation({ATTENTION_NAME!r}) to go on with the mask; attentions come with "
            "output_attentions=True as an argument"
        )


def number_shared_layers(encoder: Encoder) -> list[Any]:
    """Where layers share modules, tells each call of them which layer it is. Returns the hooks' handles."""
    if encoder.family.shared is None:
        return []
    handles = [stack.register_forward_pre_hook(_start_counting, with_kwargs=True) for stack in encoder.stacks]
    groups = [module for module in encoder.model.modules() if is_a(module, encoder.family.shared)]
    return handles + [group.register_forward_pre_hook(_number_layer, with_kwargs=True) for group in groups]


def _start_counting(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, _COUNTER: count()}


def _number_layer(group: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, _LAYER: next(kwargs[_COUNTER])}


def layer_of(module: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """Which layer of the mask a patched attention module computes in a call with these arguments."""
    layer = kwargs.get(_LAYER)
    return getattr(module, STATE).layers[0] if layer is None else layer


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packing | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [batch, heads, query_len, head_dim] and so on; output
    [batch, query_len, heads, head_dim], and the probabilities where `output_attentions` asks for them, as an argument
    or in the config.

    With a Packing in the place of the padding mask the batch is one sequence of all real tokens. Raises ValueError for
    self-attention that has no mask, in a model that was given the implementation's name alone."""
    causal = bool(getattr(module, "is_causal", False))
    state = getattr(module, STATE, None)
    if not isinstance(attention_mask, Packing):
        attention_mask = checked_padding(attention_mask, key)
    if state is None:  # cross-attention stays dense
        if type(module).__name__ in _SELF_ATTENTION:
            raise ValueError(
                f"attn_implementation is {ATTENTION_NAME!r}, but the model has no mask: patch_bert(model, mask) "
                "patches it, model.set_attn_implementation('sdpa') is dense"
            )
        return _dense(query, key, value, attention_mask, scaling, dropout, causal), None
    layer = kwargs.get(_LAYER)
    layout = state.layout(layer, query.device)
    call = dict(scale=scaling, bits=state.table(layer), causal=causal, dropout=dropout)
    wanted = bool(kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)))
    if not isinstance(attention_mask, Packing):
        return _padded(query, key, value, attention_mask, layout, call, state.backend, wanted)
    packing = attention_mask
    # [tokens, heads, head_dim]
    tokens = [tensor[0].transpose(0, 1)[: packing.tokens] for tensor in (query, key, value)]
    if packing.real is None and not wanted:
        packed = dict(cu_seqlens=packing.cu_seqlens, max_length=packing.longest)
        output = sparse_attention(*tokens, layout, backend=state.backend, **packed, **call)
        return packing.with_all_rows(output).unsqueeze(0), None
    padded = [packing.padded(tensor).transpose(1, 2) for tensor in tokens]
    real = packing.real
    if real is None:
        real = packing.padded(packing.places.new_ones(packing.tokens, dtype=torch.bool))
    output, probabilities = _padded(*padded, real, layout, call, state.backend, wanted)
    return packing.packed(output), probabilities


def checked_padding(attention_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """A padding mask for keys [batch, heads, key_len, head_dim], one row for all sequences repeated for each.

    Raises ValueError for one that is not [batch, key_len]; transformers checks no shapes.
    """
    if attention_mask is None:
        return None
    batch, key_len = key.shape[0], key.shape[2]
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: expected the two-dimensional padding "
            "mask [batch, length]; what a query may see beyond that is the global mask's part"
        )
    if attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] != key_len:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected [batch, length] with shape "
            f"{(batch, key_len)}: one value per token of input_ids, those in a key-value cache included"
        )
    return attention_mask if attention_mask.shape[0] == batch else attention_mask.expand(batch, -1)


def _padded(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, layout: SparseLayout, call: dict[str, Any],
    backend: str, output_attentions: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of padded tensors [batch, heads, length, head_dim]; `real` is the padding mask [batch, key_len]."""
    query_len, key_len = query.shape[2], key.shape[2]
    query_offset = key_len - query_len  # with a key-value cache the queries are the last positions
    lengths = None if real is None else _lengths(real)
    call = call | dict(
        query_offset=query_offset, key_lengths=lengths, key_padding_mask=real,
        query_lengths=lengths if lengths is None or query_offset == 0 else (lengths - query_offset).clamp(min=0),
    )  # fmt: skip
    if output_attentions:
        output, probabilities = attention_probabilities(query, key, value, layout, **call)
        return output.transpose(1, 2).contiguous(), probabilities
    return sparse_attention(query, key, value, layout, backend=backend, **call).transpose(1, 2), None


def _lengths(real: Tensor) -> Tensor:
    """Where the last real token of each sequence ends: int32 [batch], for a padding mask [batch, key_len]. No look at
    the values: the host need not wait, and compilation sees no branch."""
    lengths = getattr(real, _LENGTHS, None)
    if lengths is None:
        lengths = (real * torch.arange(1, real.shape[1] + 1, dtype=torch.int32, device=real.device)).amax(1)
    return lengths


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function=causal_mask_function, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs,
) -> Tensor | None:  # fmt: skip
    """transformers' mask function: hands the padding mask [batch, key_len] on as it is, true = real token.

    Raises ValueError for what a padding mask cannot say: static caches, packed position ids, overlays.
    """
    causal = mask_function is causal_mask_function
    if isinstance(q_offset, Tensor) or kv_offset != 0 or (causal and q_offset + q_length != kv_length):
        raise ValueError("a patched model works with dynamic key-value caches only; pass a DynamicCache or none")
    if use_vmap or mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise ValueError(
            "a patched model takes plain bidirectional or causal attention with a padding mask; extra mask functions "
            "and packed position_ids are not supported"
        )
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected [batch, length]")
    if torch.compiler.is_compiling():
        return attention_mask.to(torch.bool)
    real = attention_mask.to(torch.bool, copy=True)  # this pass's own: nobody changes it
    setattr(real, _LENGTHS, _lengths(real))
    return real


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
) -> Tensor:
    allowed = None if real is None else real[:, None, None, :]
    output = scaled_dot_product_attention(
        query, key, value, allowed, dropout_p=dropout, scale=scaling, is_causal=causal
    )
    return output.transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION_NAME, sparse_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)
