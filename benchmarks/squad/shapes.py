"""Models with random weights in the shape of known ones: for time and memory where no checkpoint is within reach."""

from __future__ import annotations

import torch
from transformers import AutoModelForQuestionAnswering, BertConfig, PreTrainedModel

from sparse_attn import GlobalMask

SHAPES = {
    "bert-base-shape": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=512, vocab_size=30522,
    )
}  # fmt: skip


def shape_config(name: str) -> BertConfig:
    """The configuration of a shape."""
    return BertConfig(**SHAPES[name])


def build_shape(name: str, seed: int, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A question-answering model of that shape in evaluation mode. The same seed and dtype give the same weights."""
    torch.manual_seed(seed)
    return AutoModelForQuestionAnswering.from_config(
        shape_config(name), dtype=dtype, attn_implementation=attention
    ).eval()


def stretched(mask: GlobalMask, layers: int) -> GlobalMask:
    """The mask of a model with `layers` layers: its layer i is layer i * mask.layers // layers of `mask`."""
    if layers == mask.layers:
        return mask
    sources = [layer * mask.layers // layers for layer in range(layers)]
    return GlobalMask(mask.keep[sources], {**mask.metadata, "layers_of": sources})
