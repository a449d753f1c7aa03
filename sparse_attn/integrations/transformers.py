"""Drop-in sparse attention for transformers' BERT: `patch_bert`, `unpatch`, `patched`.

It goes through transformers' attention registries, so no forward method is replaced: one attention function for all
patched models, and one mask function that hands it the two-dimensional padding mask. What a layer needs hangs on its
attention module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ..attention import attention_probabilities, prepare, sparse_attention
from ..masks import GlobalMask
from ..quantization import QuantizationTable, as_table
from .models import own_config, self_attention_modules, set_attention_implementation

ATTENTION_NAME = "sparse_attn"
_STATE = "sparse_attention"


def patch_bert(
    model: PreTrainedModel,
    mask: GlobalMask | Tensor | str | os.PathLike,
    bits: int | QuantizationTable | None = None,
    *,
    backend: str = "auto",
) -> PreTrainedModel:
    """Makes a BERT's self-attention compute only what a global mask keeps, in place.

    Outputs at real tokens are those of a dense BERT whose pruned scores are -inf. Hidden states of padding tokens are
    not meaningful: their attention is not computed. Works with padding anywhere, gradient checkpointing,
    `torch.compile` and `output_attentions=True`, whose attentions are the ones used, after pruning and rounding. The
    state dict does not change; a saved model comes back unpatched, so save the mask beside it.

    Args:
        model: BertModel or a Bert model with any head, in float32, float16 or bfloat16.
        mask: GlobalMask, bool tensor [layers, heads, query_len, key_len] with true = kept, or the path of a saved mask.
        bits: 1 to 8 rounds attention probabilities; None does not. See `sparse_attention`.
        backend: "auto", or the backend that must be used.

    Returns:
        The same model. A patched model is patched anew.

    Raises:
        TypeError: the model is not a BERT.
        ValueError: the mask has other layers or heads than the model, or is not square; bits or backend are wrong.
    """
    modules = self_attention_modules(model)
    mask = _as_mask(mask)
    table = as_table(bits)
    _check_mask(model, mask, modules)
    states = [SparseAttentionState(mask, layer, table, backend, module) for layer, module in enumerate(modules)]
    previous = model.config._attn_implementation
    if is_patched(model):
        previous = getattr(modules[0], _STATE).previous_implementation
    else:
        own_config(model)
    for module, state in zip(modules, states, strict=True):
        state.previous_implementation = previous
        setattr(module, _STATE, state)
    set_attention_implementation(model, ATTENTION_NAME)
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a patched model its dense attention back, in place, and returns it. Raises ValueError for others."""
    if not is_patched(model):
        raise ValueError(f"{type(model).__name__} is not patched; patch_bert(model, mask) patches it")
    modules = self_attention_modules(model)
    previous = getattr(modules[0], _STATE).previous_implementation
    for module in modules:
        delattr(module, _STATE)
    set_attention_implementation(model, previous)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_bert` was applied to this model."""
    return any(isinstance(module, SparseAttentionState) for module in model.modules())


@contextmanager
def patched(
    model: PreTrainedModel,
    mask: GlobalMask | Tensor | str | os.PathLike,
    bits: int | QuantizationTable | None = None,
    *,
    backend: str = "auto",
) -> Iterator[PreTrainedModel]:
    """`with patched(model, mask, bits): ...` patches for the block; afterwards the model is as it was before."""
    before = None
    if is_patched(model):
        before = [getattr(module, _STATE) for module in self_attention_modules(model)]
    patch_bert(model, mask, bits, backend=backend)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            for module, state in zip(self_attention_modules(model), before, strict=True):
                setattr(module, _STATE, state)
                state.follow(module.query.weight)


class SparseAttentionState(nn.Module):
    """What a patched attention module needs, following it from device to device.

    It holds no parameters and no buffers, so the model's state dict and dtype conversions leave it alone.
    """

    def __init__(
        self, mask: GlobalMask, layer: int, table: QuantizationTable | None, backend: str, attention: nn.Module
    ):
        super().__init__()
        self.mask, self.layer = mask, layer
        self.table, self.backend = table, backend
        self.head_dim = attention.attention_head_size
        self.previous_implementation = ""
        self.follow(attention.query.weight)

    def follow(self, weight: Tensor) -> None:
        """Compiles what the backend needs for a weight's device and dtype now, not inside a traced forward pass."""
        self.layout, self.dtype = self.mask.layout(self.layer, weight.device), weight.dtype
        if weight.device.type != "meta":
            prepare(self.layout, self.head_dim, weight.dtype, self.backend, rounded=self.table is not None)

    def _apply(self, function, recurse=True):
        self.follow(function(torch.empty(0, device=self.layout.device, dtype=self.dtype)))
        return super()._apply(function, recurse)

    def extra_repr(self) -> str:
        bits = self.table.bits if self.table else None
        return f"layer={self.layer}, bits={bits}, backend={self.backend!r}, {self.layout!r}"


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [batch, heads, query_len, head_dim] and so on; output
    [batch, query_len, heads, head_dim], and the probabilities where `output_attentions` asks for them."""
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: a patched model takes the two-dimensional "
            "padding mask [batch, length]; what a query may see beyond that is the global mask's part"
        )
    causal = bool(getattr(module, "is_causal", False))
    state = getattr(module, _STATE, None)
    if state is None:  # cross-attention stays dense
        return _dense(query, key, value, attention_mask, scaling, dropout, causal), None
    query_len, key_len = query.shape[2], key.shape[2]
    lengths = None
    if attention_mask is not None:
        # Where the last real token ends. No look at the values: the host need not wait, and compilation sees no branch.
        positions = torch.arange(1, key_len + 1, device=key.device)
        lengths = (attention_mask * positions).amax(1)
    query_offset = key_len - query_len  # with a key-value cache the queries are the last positions
    call = dict(
        scale=scaling, bits=state.table, causal=causal, query_offset=query_offset, dropout=dropout,
        key_lengths=lengths, query_lengths=None if lengths is None else (lengths - query_offset).clamp(min=0),
        key_padding_mask=attention_mask,
    )  # fmt: skip
    layout = state.layout if state.layout.device == query.device else state.mask.layout(state.layer, query.device)
    if kwargs.get("output_attentions"):
        output, probabilities = attention_probabilities(query, key, value, layout, **call)
        return output.transpose(1, 2).contiguous(), probabilities
    output = sparse_attention(query, key, value, layout, backend=state.backend, **call)
    return output.transpose(1, 2), None


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function=causal_mask_function, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs,
) -> Tensor | None:  # fmt: skip
    """transformers' mask function: hands the padding mask [batch, key_len] on as it is, true = real token.

    Raises ValueError for what a padding mask cannot say: static caches, packed position ids, overlays.
    """
    if isinstance(q_offset, Tensor) or kv_offset != 0:
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
    return attention_mask.to(torch.bool)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
) -> Tensor:
    allowed = None if padding is None else padding[:, None, None, :]
    output = scaled_dot_product_attention(
        query, key, value, allowed, dropout_p=dropout, scale=scaling, is_causal=causal
    )
    return output.transpose(1, 2).contiguous()


def _as_mask(mask: GlobalMask | Tensor | str | os.PathLike) -> GlobalMask:
    if isinstance(mask, GlobalMask):
        return mask
    if isinstance(mask, Tensor):
        return GlobalMask.from_tensor(mask)
    if isinstance(mask, (str, os.PathLike)):
        return GlobalMask.load(Path(mask))
    raise TypeError(f"mask is {type(mask).__name__}, expected GlobalMask, a boolean tensor or the path of a saved mask")


def _check_mask(model: PreTrainedModel, mask: GlobalMask, modules: list[nn.Module]) -> None:
    heads = modules[0].num_attention_heads
    if (mask.layers, mask.heads) != (len(modules), heads):
        raise ValueError(
            f"the mask has {mask.layers} layers x {mask.heads} heads, {type(model).__name__} has {len(modules)} x "
            f"{heads}; expected a mask [{len(modules)}, {heads}, query_len, key_len] made from this model's averages"
        )
    if mask.query_len != mask.key_len:
        raise ValueError(
            f"the mask covers {mask.query_len} queries and {mask.key_len} keys; self-attention needs a square one"
        )


AttentionInterface.register(ATTENTION_NAME, sparse_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)
