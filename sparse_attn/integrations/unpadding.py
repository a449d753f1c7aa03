"""Padding tokens leave before a model's first layer and come back, as zeros, after the last one.

So every linear layer, normalisation and activation works on real tokens only. It is done by hooks on the module that
runs the layers: the layers get a batch of one long sequence, and a `Packing` in the place of the padding mask.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .models import Encoder
from .packing import Packing

_MODE, _HANDLES = "sparse_attention_unpad", "sparse_attention_unpadding_hooks"
_CHUNKING = "sparse_attention_chunking"  # of a stack: its blocks that can compute feed-forward parts in chunks


def set_unpadding(encoder: Encoder, unpad: bool | None) -> None:
    """Makes an encoder drop padding: always, never, or (None) in eval mode where nothing needs fixed shapes."""
    remove_unpadding(encoder)
    if unpad is False:
        return
    for stack in encoder.stacks:
        setattr(stack, _MODE, unpad)
        chunking = tuple(module for module in stack.modules() if hasattr(module, "chunk_size_feed_forward"))
        setattr(stack, _CHUNKING, chunking)
        handles = [
            stack.register_forward_pre_hook(_drop_padding, with_kwargs=True),
            stack.register_forward_hook(_restore_padding, with_kwargs=True),
        ]
        owner = next(module for module in encoder.model.modules() if any(stack is child for child in module.children()))
        handles.append(owner.register_forward_hook(_restore_hidden_states, with_kwargs=True))
        setattr(stack, _HANDLES, handles)


def remove_unpadding(encoder: Encoder) -> None:
    """Undoes `set_unpadding`."""
    for stack in encoder.stacks:
        for handle in stack.__dict__.pop(_HANDLES, ()):
            handle.remove()
        stack.__dict__.pop(_MODE, None)
        stack.__dict__.pop(_CHUNKING, None)


def _drop_padding(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    named = dict(zip(("hidden_states", "attention_mask"), args, strict=False)) | kwargs
    hidden, mask = named["hidden_states"], named.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2] or not _possible(stack, hidden, kwargs):
        return None
    packing = Packing.of(mask)
    if packing is False:
        return None
    # Without any padding no layer needs to look at the mask.
    replaced = (hidden, None) if packing is True else (packing.packed(hidden), packing)
    return (*replaced, *args[2:]), {
        name: value for name, value in kwargs.items() if name not in ("hidden_states", "attention_mask")
    }


def _possible(stack: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
    """A key-value cache, another sequence to look at and feed-forward layers in chunks want padded tensors; tracing
    wants shapes that do not depend on data. Raises RuntimeError while a CUDA graph is captured, which does too."""
    if kwargs.get("past_key_values") is not None or kwargs.get("encoder_hidden_states") is not None:
        return False
    if any(block.chunk_size_feed_forward for block in getattr(stack, _CHUNKING)):
        return False
    if getattr(stack, _MODE) is not None:
        return True
    if stack.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, whose shapes do not depend on data, but padding leaves this model: what "
            "ran to warm up was another pass. Pass unpad=False to patch_bert or patch_model, then warm up and capture"
        )
    return True


def _restore_padding(stack: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    packing = args[1] if len(args) > 1 else None
    if not isinstance(packing, Packing):
        return None
    restored = packing.padded(output[0][0])
    if isinstance(output, ModelOutput):
        output[next(iter(output))] = restored  # last_hidden_state
        return output
    return (restored, *output[1:])


def _restore_hidden_states(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """What transformers has collected of the layers' outputs on the way is packed."""
    if not (kwargs.get("output_hidden_states") or getattr(model.config, "output_hidden_states", False)):
        return None
    mask = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
    packing = Packing.of(mask.bool()) if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if not isinstance(packing, Packing):
        return None

    def restored(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(restored(item) for item in value)
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (1, packing.rows):
            return packing.padded(value[0])
        return value

    if isinstance(output, ModelOutput):
        for name in list(output):
            output[name] = restored(output[name])
        return output
    return restored(output)
