"""The floating-point operations that a pass needs: those of real tokens, and of the positions that a mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from sparse_attn import GlobalMask

from ..ceilings import kept_in_corners

_TOKENS = 8  # of the input by which products are counted
_LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)


@torch.no_grad()
def linear_flops_per_token(model: PreTrainedModel) -> float:
    """Multiplications and additions of the linear layers that every token goes through."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, _TOKENS, dtype=torch.long, device=model.device))
    counted = counter.get_flop_counts()["Global"]
    return sum(counted.get(operator, 0) for operator in _LINEAR) / _TOKENS


def attention_flops(config: PretrainedConfig, lengths: Tensor, mask: GlobalMask | None) -> float:
    """Multiplications and additions of the two products of attention, forward, in all layers; `lengths` int64
    [sequences]."""
    if mask is None:
        positions = config.num_hidden_layers * config.num_attention_heads * int(lengths.square().sum())
    else:
        positions = int(kept_in_corners(mask.keep.flatten(0, 1))[lengths - 1].sum())
    head_dim = config.hidden_size // config.num_attention_heads
    return 4.0 * head_dim * positions
