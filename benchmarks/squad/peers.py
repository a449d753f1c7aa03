"""Attention functions of the peers in the SQuAD table, for transformers' registries.

`PACKED` is dense attention over batches without padding, `FLEX` is FlexAttention with the same global mask as ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from sparse_attn import GlobalMask
from sparse_attn.integrations.models import encoder_of, set_attention_implementation

from ..verdicts import Absent

PACKED, FLEX = "squad_packed", "squad_flex"
FLEX_BLOCK = 128  # tokens of a BlockMask's square blocks
_FLEX_STATE = "_squad_flex"
_PADDING_SCORE = -1e30  # finite, so that rows of padding have no NaN that values of 0 would spread


def use_packed(model: PreTrainedModel) -> str:
    """Dense attention over packed batches; says by which function of torch."""
    weight = next(model.parameters())
    set_attention_implementation(model, PACKED)
    return _packed_kernel(weight.device, weight.dtype)[0]


def require_flash(device: torch.device, dtype: torch.dtype) -> None:
    """Raises Absent where flash-attn cannot run."""
    if device.type != "cuda":
        raise Absent("flash-attn needs a GPU")
    if dtype not in (torch.float16, torch.bfloat16):
        raise Absent(f"flash-attn computes float16 and bfloat16, not {dtype}".replace("torch.", ""))
    if not is_flash_attn_2_available():
        raise Absent("flash-attn is not installed")


def use_flash(model: PreTrainedModel) -> str:
    """transformers' flash attention over packed batches. Raises Absent where it cannot run."""
    require_flash(model.device, model.dtype)
    set_attention_implementation(model, "flash_attention_2")
    return "flash-attn"


def use_flex(model: PreTrainedModel, mask: GlobalMask) -> str:
    """FlexAttention, compiled, with a BlockMask of each layer's mask and padding in its score_mod."""
    encoder = encoder_of(model)
    if encoder.head_dim & (encoder.head_dim - 1):
        raise Absent(f"FlexAttention needs a head_dim that is a power of 2, not {encoder.head_dim}")
    if len(set(encoder.attention)) < len(encoder.attention):
        raise Absent(f"the layers of {encoder.family.name} share one attention module, and each has a mask of its own")
    device = next(model.parameters()).device
    for layer, module in enumerate(encoder.attention):
        setattr(module, _FLEX_STATE, _BlockMasks(mask.layer(layer).to(device)))
    set_attention_implementation(model, FLEX)
    return "torch.nn.attention.flex_attention, compiled"


class _BlockMasks:
    """The BlockMasks of a layer's mask, one for each length that occurs."""

    def __init__(self, keep: Tensor):
        self.keep = keep  # bool [heads, query_len, key_len]
        self.made: dict[int, object] = {}

    def of(self, length: int) -> object:
        from torch.nn.attention.flex_attention import create_block_mask

        if length not in self.made:
            keep = self.keep

            def kept(batch, head, query, key):
                return keep[head, query, key]

            heads, device = keep.shape[0], keep.device
            self.made[length] = create_block_mask(
                kept, None, heads, length, length, device=device, BLOCK_SIZE=FLEX_BLOCK
            )
        return self.made[length]


def _compiled_flex() -> Callable:
    global _flex
    if _flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.config.recompile_limit = 64  # lengths and numbers of rows are few
        _flex = torch.compile(flex_attention)
    return _flex


_flex: Callable | None = None


def _flex_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
    scaling: float | None = None, dropout: float = 0.0, key_lengths: Tensor | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """query, key, value [batch, heads, length, head_dim], key_lengths int [batch] where there is padding."""
    block_mask = getattr(module, _FLEX_STATE).of(query.shape[2])

    def without_padding(score, batch, head, query_index, key_index):
        return torch.where(key_index < key_lengths[batch], score, _PADDING_SCORE)

    score_mod = None if key_lengths is None else without_padding
    output = _compiled_flex()(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _packed_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
    scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None, sequence_lengths: list[int] | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """query, key, value [1, heads, tokens, head_dim]; output [1, tokens, heads, head_dim]."""
    _, kernel = _packed_kernel(query.device, query.dtype)
    return kernel(query, key, value, scaling, cu_seq_lens_q, max_length_q, sequence_lengths), None


def _packed_kernel(device: torch.device, dtype: torch.dtype) -> tuple[str, Callable]:
    """The fastest of torch's ways without padding there, by name."""
    if device.type != "cuda":
        return "scaled_dot_product_attention, one sequence after the other", _one_by_one
    if dtype == torch.float32:
        return "scaled_dot_product_attention on nested tensors", _nested
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return "scaled_dot_product_attention on nested tensors", _nested
    return "torch.nn.attention.varlen", _varlen


def _one_by_one(query, key, value, scaling, bounds, longest, lengths) -> Tensor:
    output = torch.empty_like(query.transpose(1, 2))
    sequences = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), output.split(lengths, 1))
    for own_query, own_key, own_value, own_output in sequences:
        attended = scaled_dot_product_attention(own_query, own_key, own_value, scale=scaling)
        own_output.copy_(attended.transpose(1, 2))
    return output


def _nested(query, key, value, scaling, bounds, longest, lengths) -> Tensor:
    def nested(packed: Tensor) -> Tensor:
        tokens = packed.squeeze(0).transpose(0, 1)  # [tokens, heads, head_dim]
        return torch.nested.nested_tensor_from_jagged(
            tokens, offsets=bounds, min_seqlen=min(lengths), max_seqlen=longest
        ).transpose(1, 2)

    attended = scaled_dot_product_attention(nested(query), nested(key), nested(value), scale=scaling)
    return attended.transpose(1, 2).values().unsqueeze(0)


def _varlen(query, key, value, scaling, bounds, longest, lengths) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling).unsqueeze(0)


def _no_mask(*args, **kwargs) -> None:
    """Padding is absent, or told by other arguments."""


for _name, _function in ((PACKED, _packed_forward), (FLEX, _flex_forward)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _no_mask)
