"""What a transformers model is made of: its self-attention modules, in the order of its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import BertSelfAttention

# Self-attention classes whose layers are counted from 0, one module a layer.
SELF_ATTENTION_CLASSES: tuple[type[nn.Module], ...] = (BertSelfAttention,)


def self_attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a BERT model, one a layer, first layer first.

    They are found by class and ordered by their place in the model, never by `layer_idx`, which other attention
    modules may share. Raises TypeError for a model without any, or that is no transformers model.
    """
    supported = ", ".join(cls.__name__ for cls in SELF_ATTENTION_CLASSES)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is not a transformers model; expected BertModel or a Bert model with a head "
            f"(anything whose layers have {supported})"
        )
    modules = [module for module in model.modules() if isinstance(module, SELF_ATTENTION_CLASSES)]
    if not modules:
        raise TypeError(
            f"{type(model).__name__} has no attention that can be patched; expected BertModel or a Bert model with a "
            f"head (BertForQuestionAnswering, BertForMaskedLM, ...), whose layers have {supported}"
        )
    return modules


def own_config(model: PreTrainedModel, config: PretrainedConfig | None = None) -> None:
    """Gives `model` a config of its own, so that another model built from the same one is not changed with it.

    Every module that refers to the model's config gets `config`, by default a copy of it.
    """
    shared = model.config
    private = copy.deepcopy(shared) if config is None else config
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = private


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs `model` with the registered attention `name`, and with the one it had afterwards."""
    previous = model.config._attn_implementation
    set_attention_implementation(model, name)
    try:
        yield
    finally:
        set_attention_implementation(model, previous)


def set_attention_implementation(model: PreTrainedModel, name: str) -> None:
    """`model.set_attn_implementation(name)`, which only logs where it fails; here it raises RuntimeError."""
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise RuntimeError(
            f"transformers left {type(model).__name__} with attention {model.config._attn_implementation!r} when "
            f"asked for {name!r}; this model does not route its attention through AttentionInterface"
        )
