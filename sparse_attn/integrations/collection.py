"""Collecting average attention from a transformers model, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..arguments import expect_flags
from ..averages import AttentionAverages
from ..distributed import agree, rank_and_world, share_of
from ..progress import with_progress
from .accumulation import AttentionSums
from .batches import expect_several, moved_batches
from .models import Encoder, attached, attention_implementation, encoder_of, evaluating, own_configs
from .packing import Packing
from .routing import checked_padding, padding_mask, sparse_attention_forward
from .transformers import is_patched
from .unpadding import remove_unpadding, set_unpadding

COLLECTING_NAME = "sparse_attn_collecting"
_COLLECTOR = "_attention_collector"


class _AllCollected(Exception):
    """Ends a forward pass after its last attention: nothing that follows changes the averages."""


def collect_averages(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    max_length: int | None = None,
    shard: bool = True,
    progress: bool = True,
    model_name: str | None = None,
    data_name: str | None = None,
) -> AttentionAverages:
    """The mean attention of `model` over `batches`, per layer, head and pair of positions (arXiv 2012.02030).

    A streaming mean over real tokens: each sequence counts once, a pair of positions only in sequences that hold
    tokens at both, padding never. Probabilities are taken after the softmax without dropout, in float32, and summed in
    float64. Memory does not grow with the number of batches, and no more than one sequence's attention in one layer is
    held. Padding tokens are not computed, nor is what follows the last layer's attention.

    Under torch.distributed every process calls it; one reduction at the end gives all of them the averages over all
    their batches.

    Args:
        model: what `patch_model` takes, not patched. It is run in eval mode without gradients and left as it was.
        batches: keyword arguments of the model's forward, tensors with the batch first: input_ids and, where there
            is padding, attention_mask [batch, length]; labels and others pass through. Moved to the model's device.
        max_length: side of the averages. None: the longest length that occurs in any process.
        shard: what `batches` are where a process group of several processes is initialised. True: the same in every
            process; process r runs batches r, r + world, r + 2 world, ... False: this process's own share, which
            may be of any size, none included.
        progress: whether to show a progress bar, on the first process.
        model_name, data_name: saved with the averages; the name of the checkpoint by default.

    Raises:
        TypeError: the model is of no supported family; batches that are no mappings of tensors; shard or progress is no
            bool.
        ValueError: no batch, or none with a token; a sequence longer than `max_length`, an attention_mask that is not
            [batch, length], a patched model, attention that is not finite.
        RuntimeError: another process failed.
    """
    encoder = encoder_of(model)
    if is_patched(model):
        raise ValueError("the model is patched; averages of dense attention need unpatch(model) first")
    expect_several(batches)
    expect_flags(shard=shard, progress=progress)
    rank, world = rank_and_world()
    sums = AttentionSums(len(encoder.attention), encoder.heads, max_length)
    own = share_of(batches) if shard and world > 1 else batches
    failure = None
    try:
        _collect(encoder, with_progress(own, "collecting attention", enabled=progress and rank == 0), sums)
    except Exception as error:
        failure = error
    side = agree(sums.side, failure)  # before the sums of different lengths meet
    metadata = {"model": model_name or encoder.model.config.name_or_path, "data": data_name}
    return sums.averages(side, {key: value for key, value in metadata.items() if value})


def _collect(encoder: Encoder, batches: Iterable[Mapping[str, Tensor]], sums: AttentionSums) -> None:
    model = encoder.model
    device = next(model.parameters()).device
    configs = own_configs(model)
    try:
        set_unpadding(encoder, True)
        with (
            evaluating(model),
            torch.no_grad(),
            attention_implementation(model, COLLECTING_NAME),
            attached(encoder, _COLLECTOR, sums),
        ):
            for batch in moved_batches(batches, device):
                sums.start_batch()
                try:
                    model(**batch)
                except _AllCollected:
                    continue
    finally:
        remove_unpadding(encoder)
        for module, config in configs:
            module.config = config


def _collecting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Packing | Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Dense attention of tensors [batch, heads, length, head_dim], whose probabilities are summed on the way."""
    sums = getattr(module, _COLLECTOR, None)
    if sums is None:  # cross-attention
        return sparse_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs)
    if not isinstance(attention_mask, Packing):
        attention_mask = checked_padding(attention_mask, key)
    causal = bool(getattr(module, "is_causal", False))
    output = sums.add_layer(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5, causal)
    if output is None:
        raise _AllCollected
    return output, None


AttentionInterface.register(COLLECTING_NAME, _collecting_attention)
AttentionMaskInterface.register(COLLECTING_NAME, padding_mask)
