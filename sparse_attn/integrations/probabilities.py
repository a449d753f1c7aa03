"""How large a patched model's attention probabilities are, counted while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..arguments import expect_flags
from ..calibration import ProbabilityHistogram, merged
from ..distributed import agree, rank_and_world, share_of, sums_over_processes
from ..masks import GlobalMask
from ..progress import with_progress
from .batches import expect_several, moved_batches, without_common_padding
from .models import Encoder, attached, attention_implementation, encoder_of, evaluating
from .routing import layer_of, padding_mask, sparse_attention_forward
from .transformers import patched

COUNTING_NAME = "sparse_attn_counting"
_HISTOGRAMS = "_probability_histograms"  # of all layers


def collect_probabilities(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    mask: GlobalMask,
    *,
    by_layer: bool = False,
    shard: bool = True,
    progress: bool = True,
) -> ProbabilityHistogram | list[ProbabilityHistogram]:
    """A histogram of the attention probabilities that `model` has with `mask`: after the softmax, before rounding.

    It counts kept positions of real tokens, over all layers and heads, for `calibrated_table` and
    `renormalised_table`. No layer's probabilities outlive the layer. Under torch.distributed every process calls it;
    one reduction at the end gives all of them the same counts.

    Args:
        model: what `patch_model` takes, patched or not. It is run in eval mode without gradients and left as it was.
        batches: keyword arguments of the model's forward, tensors with the batch first: input_ids and, where there
            is padding, attention_mask [batch, length]. Moved to the model's device.
        mask: that the model is used with.
        by_layer: return a list of histograms, one for each layer of the mask, for levels of each layer's own.
        shard: whether `batches` are the same in every process of a process group, which then share them, or this
            process's own; as for `collect_averages`.
        progress: whether to show a progress bar, on the first process.

    Raises:
        TypeError: the model is of no supported family; batches that are no mappings of tensors; by_layer, shard or
            progress is no bool.
        ValueError: no batch, or none with a kept position; an attention_mask that is not [batch, length]; a mask that
            does not fit the model.
        RuntimeError: another process failed.
    """
    expect_several(batches)
    expect_flags(by_layer=by_layer, shard=shard, progress=progress)
    encoder = encoder_of(model)
    rank, world = rank_and_world()
    histograms = [ProbabilityHistogram() for _ in encoder.attention]
    own = share_of(batches) if shard and world > 1 else batches
    passes, failure = 0, None
    try:
        with patched(model, mask, unpad=False):
            shown = with_progress(own, "counting probabilities", enabled=progress and rank == 0)
            passes = _count(encoder, shown, histograms)
    except Exception as error:
        failure = error
    agree(0, failure)
    passes = int(sums_over_processes([torch.tensor(passes, device="cpu")])[0])
    if passes == 0:
        raise ValueError("there was no batch to collect probabilities from; pass at least one")
    for one in histograms:
        one.counts, one.sums = sums_over_processes([one.counts, one.sums])
    together = merged(histograms)
    if together.rows == 0:
        raise ValueError(
            f"there was no probability in {passes} batches: all tokens are padding, or the mask keeps nothing where "
            "there are tokens; pass other batches or another mask"
        )
    return histograms if by_layer else together


def _count(encoder: Encoder, batches: Iterable[Mapping[str, Tensor]], histograms: list[ProbabilityHistogram]) -> int:
    """Adds what each layer of a patched model computes to its histogram. Returns the number of batches."""
    model, passes = encoder.model, 0
    device = next(model.parameters()).device
    with (
        evaluating(model),
        torch.no_grad(),
        attention_implementation(model, COUNTING_NAME),
        attached(encoder, _HISTOGRAMS, histograms),
    ):
        for batch in moved_batches(batches, device):
            batch.pop("labels", None)  # there is no loss, and they may have other lengths
            model(**without_common_padding(batch))
            passes += 1
    return passes


def _counting_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args, **kwargs
) -> tuple[Tensor, None]:
    """The patched model's attention, `attention_mask` bool [batch, length] or None; probabilities are counted."""
    histograms = getattr(module, _HISTOGRAMS, None)
    kwargs["output_attentions"] = histograms is not None  # cross-attention has none
    output, probabilities = sparse_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    if histograms is not None:
        if attention_mask is not None:
            probabilities = probabilities * attention_mask[:, None, -query.shape[2] :, None]
        histograms[layer_of(module, kwargs)].add(probabilities)
    return output, None


AttentionInterface.register(COUNTING_NAME, _counting_attention)
AttentionMaskInterface.register(COUNTING_NAME, padding_mask)
