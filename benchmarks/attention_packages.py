"""Peers from other packages, measured where they are installed. Those that round or prune by themselves say so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from .attention_inputs import Case
from .attention_variants import Attend, Variant
from .verdicts import Absent

_BLOCK = 64  # tokens of blksprs' square blocks; head_dim is cut by the same size
_INT8_TOLERANCE = 0.1  # relative error that 8-bit products may have


def _needs(module: str, prepare: Callable[[Case], Attend]) -> Callable[[Case], Attend]:
    def prepare_if_installed(case: Case) -> Attend:
        if importlib.util.find_spec(module) is None:
            raise Absent("not installed")
        return prepare(case)

    return prepare_if_installed


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a function that, in some of its versions, also returns the log-sum-exp."""
    return output[0] if isinstance(output, tuple) else output


def _flash_attn(module: str) -> Callable[[Case], Attend]:
    """Flash attention's own package; its tensors are [batch, tokens, heads, head_dim], or packed as ours."""

    def prepare(case: Case) -> Attend:
        functions = importlib.import_module(module)
        bounds, longest = case.inputs.cu_seqlens, case.workload.length

        def attend_packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return _first(
                functions.flash_attn_varlen_func(
                    query, key, value, cu_seqlens_q=bounds, cu_seqlens_k=bounds,
                    max_seqlen_q=longest, max_seqlen_k=longest,
                )
            )  # fmt: skip

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return _first(functions.flash_attn_func(*rows)).transpose(1, 2)

        return attend_packed if case.workload.packed else attend

    return prepare


def _xformers(case: Case) -> Attend:
    """xformers' memory_efficient_attention; its tensors are [batch, tokens, heads, head_dim]."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    if case.workload.packed:
        blocks = BlockDiagonalMask.from_seqlens(list(case.workload.sequence_lengths))

        def attend_packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = (tensor.unsqueeze(0) for tensor in (query, key, value))
            return memory_efficient_attention(*rows, attn_bias=blocks).squeeze(0)

        return attend_packed

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return memory_efficient_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)

    return attend


def _sageattention(case: Case) -> Attend:
    """SageAttention: products of 8-bit integers, forward only. Smoothing would subtract the mean from the caller's keys
    in place, and random keys have none."""
    from sageattention import sageattn, sageattn_varlen

    if case.training:
        raise Absent("has no backward pass")
    bounds, longest = case.inputs.cu_seqlens, case.workload.length

    def attend_packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sageattn_varlen(query, key, value, bounds, bounds, longest, longest, is_causal=False, smooth_k=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sageattn(query, key, value, tensor_layout="HND", is_causal=False, smooth_k=False)

    return attend_packed if case.workload.packed else attend


def _adasplash(case: Case) -> Attend:
    """AdaSplash finds its zeros while it runs, by another function of the scores."""
    raise Absent("computes entmax instead of softmax: its results cannot be compared")


def _blksprs(case: Case) -> Attend:
    """blksprs' flash attention over square blocks, with the mask inside them. What it is given and returns is dense, so
    the conversions are part of it."""
    import blksprs

    workload, inputs = case.workload, case.inputs
    if workload.packed or workload.length % _BLOCK or workload.head_dim % _BLOCK:
        raise Absent(f"needs sequences of one length, and sizes that {_BLOCK} divides")
    blksprs.utils.disable_validation()  # it waits for the device in every call, and results are checked here anyway
    sequences = workload.batch * workload.heads
    blocks, head_blocks = workload.length // _BLOCK, workload.head_dim // _BLOCK
    whole = torch.ones(sequences, blocks, head_blocks, dtype=torch.bool, device=inputs.device)
    keep = case.layer.keep[:, : workload.length, : workload.length]
    kept_blocks = keep.reshape(workload.heads, blocks, _BLOCK, blocks, _BLOCK).any(4).any(2)
    kept_blocks = kept_blocks.repeat(workload.batch, 1, 1)
    pruned = (~keep).to(inputs.dtype).repeat(workload.batch, 1, 1)
    pruned = blksprs.ops.to_sparse(pruned, kept_blocks, _BLOCK)
    conversion: dict = {}
    attention = blksprs.ops.flash_attention_build_layout_cache(
        kept_blocks, whole, whole, whole, blocks, blocks, head_blocks
    )

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        compressed = (
            blksprs.ops.to_sparse(tensor.reshape(sequences, *tensor.shape[2:]), whole, _BLOCK, layout_cache=conversion)
            for tensor in (query, key, value)
        )
        query_blocks, key_blocks, value_blocks = compressed
        output = blksprs.ops.flash_attention(
            query_blocks, whole, key_blocks, whole, value_blocks, whole, kept_blocks, _BLOCK,
            attention_mask=pruned, sparsity_layout_mask=kept_blocks, layout_cache=attention,
        )  # fmt: skip
        return blksprs.ops.to_dense(output, whole, _BLOCK).view(query.shape)

    return attend


PACKAGE_PEERS = (
    Variant("flash-attn", _needs("flash_attn", _flash_attn("flash_attn")), devices=("cuda",), takes_packed=True),
    Variant(
        "flash-attn-3", _needs("flash_attn_interface", _flash_attn("flash_attn_interface")),
        devices=("cuda",), takes_packed=True,
    ),
    Variant("xformers", _needs("xformers", _xformers), devices=("cuda",), takes_packed=True),
    Variant(
        "sageattention", _needs("sageattention", _sageattention),
        devices=("cuda",), takes_packed=True, tolerance=_INT8_TOLERANCE,
    ),
    Variant("adasplash", _needs("adasplash", _adasplash), devices=("cuda",)),
    Variant(
        "blksprs", _needs("blksprs", _blksprs), masks=("element", "tile"), devices=("cuda",), compiles=True
    ),
)  # fmt: skip
