"""Peers that torch brings: eager attention, scaled_dot_product_attention's kernels, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .attention_inputs import Case
from .attention_variants import Attend, Variant
from .verdicts import Absent


def _eager(case: Case) -> Attend:
    """As transformers computes it: products and mask in the model's dtype, softmax in float32."""
    bias = case.bias

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value

    return attend


def _sdpa(kernel: SDPBackend | None) -> Callable[[Case], Attend]:
    """scaled_dot_product_attention by one of its kernels alone, or by its own choice."""

    def prepare(case: Case) -> Attend:
        bias = case.bias

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                return scaled_dot_product_attention(query, key, value, attn_mask=bias)

        return attend

    return prepare


def _sdpa_nested(case: Case) -> Attend:
    """scaled_dot_product_attention on nested tensors: torch's way to leave padding out."""
    inputs, lengths = case.inputs, case.workload.sequence_lengths

    def nested(packed: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(
            packed, offsets=inputs.cu_seqlens, min_seqlen=min(lengths), max_seqlen=max(lengths)
        ).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(nested(query), nested(key), nested(value)).transpose(1, 2).values()

    return attend


def _varlen(case: Case) -> Attend:
    """torch's flash attention on packed sequences."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Absent(f"torch {torch.__version__} has no varlen_attn") from None
    bounds, longest = case.inputs.cu_seqlens, case.workload.length

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attn(query, key, value, bounds, bounds, longest, longest)

    return attend


def _flex(case: Case) -> Attend:
    """FlexAttention, compiled for the shape, with a BlockMask of the same mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    workload, inputs = case.workload, case.inputs
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask_rule = _mask_rule(None if case.layer is None else case.layer.keep, inputs.lengths)
    block_mask = None
    if mask_rule is not None:
        batch = workload.batch if workload.packed else None
        heads = None if case.layer is None else workload.heads
        block_mask = create_block_mask(mask_rule, batch, heads, workload.length, workload.length, device=inputs.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=block_mask)

    return attend


def _mask_rule(keep: Tensor | None, lengths: Tensor | None) -> Callable | None:
    """FlexAttention's mask_mod. One function per kind of mask, so that it is compiled once for all layers."""
    if keep is None and lengths is None:
        return None
    if keep is None:
        return lambda batch, head, query, key: key < lengths[batch]
    if lengths is None:
        return lambda batch, head, query, key: keep[head, query, key]
    return lambda batch, head, query, key: keep[head, query, key] & (key < lengths[batch])


TORCH_PEERS = (
    Variant("eager", _eager, masks=("dense", "element")),
    Variant("sdpa-flash", _sdpa(SDPBackend.FLASH_ATTENTION), devices=("cuda",)),
    Variant("sdpa-cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), masks=("dense", "element"), devices=("cuda",)),
    Variant("sdpa-efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), masks=("dense", "element"), devices=("cuda",)),
    Variant("sdpa-cpu", _sdpa(None), masks=("dense", "element"), devices=("cpu",)),
    Variant("sdpa-nested", _sdpa_nested, takes_packed=True, packed_only=True),
    Variant("varlen", _varlen, devices=("cuda",), takes_packed=True, packed_only=True),
    Variant("flex", _flex, masks=("dense", "element", "tile"), compiles=True),
)
