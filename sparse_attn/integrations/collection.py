"""Collecting average attention from a transformers model, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..averages import AttentionAverages, pad_corner
from ..progress import progress as show_progress
from .models import attention_implementation, own_config, self_attention_modules
from .transformers import is_patched

COLLECTING_NAME = "sparse_attn_collecting"
_COLLECTOR = "_attention_collector"


def collect_averages(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    max_length: int | None = None,
    progress: bool = True,
    model_name: str | None = None,
    data_name: str | None = None,
) -> AttentionAverages:
    """The mean attention of `model` over `batches`, per layer, head and pair of positions (arXiv 2012.02030).

    A streaming mean over real tokens: each sequence counts once, a pair of positions only in sequences that hold
    tokens at both, padding never. Probabilities are taken after the softmax without dropout, in float32, and summed in
    float64. Memory does not grow with the number of batches, and no layer's attention outlives the layer.

    Args:
        model: BertModel or a Bert model with any head. It is run in eval mode without gradients and left as it was.
        batches: keyword arguments of the model's forward, tensors with the batch first: input_ids and, where there
            is padding, attention_mask [batch, length]; labels and others pass through. Moved to the model's device.
        max_length: side of the averages. None: the longest length that occurs.
        progress: whether to show a progress bar.
        model_name, data_name: saved with the averages; the name of the checkpoint by default.

    Raises:
        TypeError: the model is not a BERT.
        ValueError: no batch, a sequence longer than `max_length`, a patched model, attention that is not finite.
    """
    modules = self_attention_modules(model)
    if is_patched(model):
        raise ValueError("the model is patched; averages of dense attention need unpatch(model) first")
    collector = _Collector(len(modules), modules[0].num_attention_heads, max_length)
    device = next(model.parameters()).device
    was_training, shared_config = model.training, model.config
    own_config(model)
    model.eval()
    try:
        for layer, module in enumerate(modules):
            object.__setattr__(module, _COLLECTOR, (collector, layer))
        with torch.no_grad(), attention_implementation(model, COLLECTING_NAME):
            for batch in show_progress(batches, "collecting attention", enabled=progress):
                collector.start_batch()
                model(**{name: _to(value, device) for name, value in batch.items()})
    finally:
        for module in modules:
            module.__dict__.pop(_COLLECTOR, None)
        own_config(model, shared_config)
        model.train(was_training)
    metadata = {"model": model_name or model.config.name_or_path, "data": data_name}
    return collector.averages({key: value for key, value in metadata.items() if value})


class _Collector:
    """Sums that grow to the longest sequence seen; batches are counted at the first layer."""

    def __init__(self, layers: int, heads: int, max_length: int | None):
        self.layers, self.heads, self.max_length = layers, heads, max_length
        side = max_length or 0
        self.sums = torch.zeros(layers, heads, side, side, dtype=torch.float64, device="cpu")
        self.counts = torch.zeros(side, side, dtype=torch.int64, device="cpu")
        self.sequences = self.tokens = 0
        self.real: Tensor | None = None

    def start_batch(self) -> None:
        self.real = None

    def add(self, layer: int, probabilities: Tensor, attention_mask: Tensor | None) -> None:
        """Adds a layer's probabilities, float [batch, heads, length, length], given the additive mask
        [batch or 1, 1, length, length] or None."""
        length = probabilities.shape[-1]
        if self.real is None:
            self._count(probabilities, attention_mask)
        # Padding keys have probability 0 already; padding queries have ordinary rows.
        weights = self.real.to(probabilities.dtype)
        total = torch.einsum("bhqk,bq->hqk", probabilities, weights)
        self.sums[layer, :, :length, :length] += total.to(self.sums)

    def _count(self, probabilities: Tensor, attention_mask: Tensor | None) -> None:
        batch, _, length, _ = probabilities.shape
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"a batch has length {length}, more than max_length {self.max_length}; truncate it or raise max_length"
            )
        if length > self.counts.shape[0]:
            self.sums = pad_corner(self.sums, length, length)
            self.counts = pad_corner(self.counts, length, length)
        self.sums = self.sums.to(probabilities.device)
        allowed = torch.ones(batch, length, length, dtype=torch.bool, device=probabilities.device)
        if attention_mask is not None:
            allowed = (attention_mask[:, 0] == 0).expand(batch, length, length)
        self.real = allowed.diagonal(dim1=1, dim2=2)  # a real token may always look at itself: [batch, length]
        pairs = (allowed & self.real.unsqueeze(2)).sum(0)
        self.counts[:length, :length] += pairs.cpu()
        self.sequences += batch
        self.tokens += int(self.real.sum())

    def averages(self, metadata: dict[str, str]) -> AttentionAverages:
        if self.sequences == 0:
            raise ValueError("there was no batch to collect attention from; pass at least one")
        return AttentionAverages(self.sums.cpu(), self.counts, self.sequences, self.tokens, metadata)


def _collecting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query.float() @ key.float().transpose(2, 3)) * scale
    if attention_mask is not None:
        scores = scores + attention_mask.float()
    probabilities = torch.softmax(scores, dim=-1)
    collector, layer = getattr(module, _COLLECTOR, (None, 0))
    if collector is not None:  # cross-attention has none
        collector.add(layer, probabilities, attention_mask)
    output = probabilities.to(value.dtype) @ value
    return output.transpose(1, 2).contiguous(), None


def _to(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


AttentionInterface.register(COLLECTING_NAME, _collecting_attention)
AttentionMaskInterface.register(COLLECTING_NAME, eager_mask)
