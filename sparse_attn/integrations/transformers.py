"""Drop-in sparse attention for transformers' encoders: `patch_bert`, `patch_model`, `unpatch`, `patched`.

Attention goes through transformers' registries: one attention function for all patched models, and one mask function
that hands it the two-dimensional padding mask. What a layer needs hangs on its attention module; padding is dropped by
hooks. On a CPU the linear layers get forward methods of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arguments import expect_flags, expect_kind
from ..masks import GlobalMask
from ..quantization import Bits, tables_of_layers
from .models import BERT, Encoder, encoder_of, own_configs, set_attention_implementation, transformers_models
from .onednn import expect_onednn, remove_onednn, set_onednn
from .routing import ATTENTION_NAME, STATE, SparseAttentionState, number_shared_layers, watch_implementation
from .unpadding import remove_unpadding, set_unpadding

Model = TypeVar("Model", bound=nn.Module)
_PREVIOUS = "sparse_attention_previous"  # of a transformers model: its attention implementation before it was patched


def patch_bert(
    model: PreTrainedModel,
    mask: GlobalMask | Tensor | str | os.PathLike,
    bits: Bits = None,
    *,
    backend: str = "auto",
    unpad: bool | None = None,
    onednn: bool | None = None,
) -> PreTrainedModel:
    """Makes a BERT's self-attention compute only what a global mask keeps, in place.

    Outputs at real tokens are those of a dense BERT whose pruned scores are -inf. Works with padding anywhere,
    gradient checkpointing, `torch.compile` and `output_attentions=True`, whose attentions are the ones used, after
    pruning and rounding (pass it as an argument: once a model is patched, transformers refuses it in the config). A
    pass raises ValueError where another attention implementation was set since. The state dict does not change; a saved
    model comes back unpatched, so save the mask beside it.

    Args:
        model: BertModel or a Bert model with any head, or a module around one, in float32, float16 or bfloat16.
        mask: GlobalMask, bool tensor [layers, heads, query_len, key_len] with true = kept, or the path of a saved mask.
        bits: 1 to 8 rounds attention probabilities; None does not. See `sparse_attention`. A list or tuple has one such
            value for each layer of the mask; with tables that differ, torch.compile compiles every layer anew.
        backend: "auto", or the backend that must be used.
        unpad: whether padding tokens leave before the first layer and come back as zeros after the last, so that no
            layer works on them. None: in eval mode, but not where `torch.compile` wants shapes that do not depend on
            data (compile the layers, `layer.compile()`, to have both). To capture a CUDA graph, pass False. They stay
            with a key-value cache, cross-attention, chunked feed-forward layers or one attention_mask [1, length] for a
            whole batch. Where they stay, their hidden states are not meaningful.
        onednn: whether torch's oneDNN operator computes linear layers and GELU in passes on a CPU that need no
            gradients, and large feed-forward parts are computed some rows at a time. None: where the model lies on a
            CPU; but by oneDNN only with AVX-512, since torch's own way is the faster one without, or where float32 is
            multiplied faster than 16-bit weights, which are converted then.

    Returns:
        The same model. A patched model is patched anew.

    Raises:
        TypeError: the model is not a BERT, or its linear layers are quantised; mask is no mask, tensor or path; bits is
            no integer or table; unpad or onednn is no bool.
        ValueError: the mask has other layers or heads than the model, or is not square; bits or backend are wrong;
            onednn is True and torch is built without.
    """
    family = encoder_of(model).family
    if family is not BERT:
        raise TypeError(f"{type(model).__name__} is a {family.name}, not a BERT; patch_model patches it")
    return patch_model(model, mask, bits, backend=backend, unpad=unpad, onednn=onednn)


def patch_model(
    model: Model,
    mask: GlobalMask | Tensor | str | os.PathLike,
    bits: Bits = None,
    *,
    backend: str = "auto",
    unpad: bool | None = None,
    onednn: bool | None = None,
) -> Model:
    """`patch_bert` for BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT and ALBERT with any head, and for a
    module around one of them, such as a SentenceTransformer. Arguments, results and errors are those of `patch_bert`;
    a mask has one layer for each time that an attention module is called, also where layers share it (ALBERT).
    """
    encoder = encoder_of(model)
    mask = _as_mask(mask)
    _check_mask(encoder, mask)
    tables = tables_of_layers(bits, mask.layers)
    expect_flags(or_none=True, unpad=unpad, onednn=onednn)
    expect_onednn(onednn)
    layers: dict[nn.Module, list[int]] = {}
    for layer, module in enumerate(encoder.attention):
        layers.setdefault(module, []).append(layer)
    # A traced pass finds what it needs, and a frozen model holds no lists that it never walks.
    gradients = encoder.model.training or any(weight.requires_grad for weight in encoder.model.parameters())
    states = {
        module: SparseAttentionState(
            mask, own, tables, backend, encoder.head_dim, _weight(encoder.query_of(module)), gradients
        )
        for module, own in layers.items()
    }
    if is_patched(model):
        _remove_routes(encoder)
    for module, state in states.items():
        setattr(module, STATE, state)
    _set_sparse_attention(encoder.model)
    # In this order: layers are numbered in what has no padding.
    set_unpadding(encoder, unpad)
    set_onednn(encoder, onednn)
    handles = watch_implementation(encoder) + number_shared_layers(encoder)
    for state in states.values():
        state.unpad, state.onednn, state.handles = unpad, onednn, handles
    return model


def unpatch(model: Model) -> Model:
    """Gives a patched model its dense attention back, in place, and returns it. Raises ValueError for others."""
    if not is_patched(model):
        raise ValueError(f"{type(model).__name__} is not patched; patch_bert(model, mask) patches it")
    encoder = encoder_of(model)
    _remove_routes(encoder)
    for module in dict.fromkeys(encoder.attention):
        delattr(module, STATE)
    _set_previous_attention(encoder.model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_bert` or `patch_model` was applied to this model."""
    expect_kind(nn.Module, "a model", model=model)
    return any(isinstance(module, SparseAttentionState) for module in model.modules())


@contextmanager
def patched(
    model: Model,
    mask: GlobalMask | Tensor | str | os.PathLike,
    bits: Bits = None,
    *,
    backend: str = "auto",
    unpad: bool | None = None,
    onednn: bool | None = None,
) -> Iterator[Model]:
    """`with patched(model, mask, bits): ...` patches for the block; afterwards the model is as it was before."""
    before = None
    if is_patched(model):
        state = _state(encoder_of(model))
        before = state.mask, state.tables, state.backend, state.unpad, state.onednn
    patch_model(model, mask, bits, backend=backend, unpad=unpad, onednn=onednn)
    try:
        yield model
    finally:
        if before is None:
            if is_patched(model):
                unpatch(model)
        else:
            mask, tables, backend, unpad, onednn = before
            patch_model(model, mask, tables, backend=backend, unpad=unpad, onednn=onednn)


def longest_input(model: nn.Module) -> int | None:
    """How many tokens the mask of a patched model covers; None for other models."""
    return _state(encoder_of(model)).mask.key_len if is_patched(model) else None


def _state(encoder: Encoder) -> SparseAttentionState:
    return getattr(encoder.attention[0], STATE)


def _remove_routes(encoder: Encoder) -> None:
    remove_unpadding(encoder)
    remove_onednn(encoder)
    for handle in _state(encoder).handles:
        handle.remove()


def _set_sparse_attention(model: PreTrainedModel) -> None:
    """Sets the implementation of a model and of those in it, such as the one below a head, which may have been patched
    without it before; each remembers its own."""
    inner = transformers_models(model)
    if not all(hasattr(each, _PREVIOUS) for each in inner):
        own_configs(model)
    for each in inner:
        found = each.config._attn_implementation
        if found != ATTENTION_NAME:
            setattr(each, _PREVIOUS, found)
        elif not hasattr(each, _PREVIOUS):  # was loaded with this name
            setattr(each, _PREVIOUS, each.get_correct_attn_implementation(None))
    set_attention_implementation(model, ATTENTION_NAME)


def _set_previous_attention(model: PreTrainedModel) -> None:
    for each in transformers_models(model):  # a model comes before those in it, which it sets with itself
        if hasattr(each, _PREVIOUS):
            set_attention_implementation(each, getattr(each, _PREVIOUS))
            delattr(each, _PREVIOUS)


def _as_mask(mask: GlobalMask | Tensor | str | os.PathLike) -> GlobalMask:
    if isinstance(mask, GlobalMask):
        return mask
    if isinstance(mask, Tensor):
        return GlobalMask.from_tensor(mask)
    if isinstance(mask, (str, os.PathLike)):
        return GlobalMask.load(Path(mask))
    raise TypeError(
        f"mask is {type(mask).__name__}, expected GlobalMask (averages make one: GlobalMask.from_averages(averages, "
        "sparsity)), a boolean tensor or the path of a saved mask"
    )


def _check_mask(encoder: Encoder, mask: GlobalMask) -> None:
    layers, heads = len(encoder.attention), encoder.heads
    if (mask.layers, mask.heads) != (layers, heads):
        raise ValueError(
            f"the mask has {mask.layers} layers x {mask.heads} heads, {type(encoder.model).__name__} has {layers} x "
            f"{heads}; expected a mask [{layers}, {heads}, query_len, key_len] made from this model's averages"
        )
    if mask.query_len != mask.key_len:
        raise ValueError(
            f"the mask covers {mask.query_len} queries and {mask.key_len} keys; self-attention needs a square one"
        )


def _weight(query: nn.Module) -> Tensor:
    """The weight of a layer's query projection, or of an adapter around it: it says device and dtype. Raises TypeError
    where there is none."""
    weight = getattr(query, "weight", None)
    found = weight if isinstance(weight, Tensor) else next(query.parameters(), None)
    if found is None:
        raise TypeError(
            f"the attention's query projection is {type(query).__module__}.{type(query).__name__}, whose weight is no "
            "tensor; patch the model with onednn=False first and quantise it then"
        )
    return found
