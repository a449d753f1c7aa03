"""Average attention of a model over a data set.

The average is the pattern of Attention Pruning (Rugina et al., "Data-Informed Global Sparseness in Attention
Mechanisms for Deep Neural Networks", arXiv 2012.02030), taken over real tokens only: a pair of positions is averaged
over the sequences in which both hold a token. `sparse_attn.collect_averages` makes it from a model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from .arguments import expect_kind, expect_whole
from .files import load_tensors, save_tensors

_KIND = "attention averages"
_A_TENSOR = "a tensor (torch.as_tensor makes one)"


@dataclass(eq=False, repr=False)
class AttentionAverages:
    """Sums of attention probabilities and how often each pair of positions was seen.

    Attributes:
        sums: float64 [layers, heads, query_len, key_len], post-softmax attention summed over sequences.
        counts: int64 [query_len, key_len], sequences in which both positions held a real token.
        sequences: how many sequences were averaged.
        tokens: how many real tokens they had.
        metadata: what else is known, saved with the file as JSON: model, data, source.

    Raises TypeError for what is no tensor or of complex numbers; ValueError for shapes that do not fit together, for
    values that are not finite or below zero, for counts with fractions, and for sums of pairs that were never seen.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    sequences: int = 0
    tokens: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        expect_kind(torch.Tensor, _A_TENSOR, sums=self.sums, counts=self.counts)
        expect_whole(0, sequences=self.sequences, tokens=self.tokens)
        self.metadata = dict(self.metadata)
        if self.sums.is_complex() or self.counts.is_complex():
            raise TypeError(f"averages of {self.sums.dtype} and counts of {self.counts.dtype}, expected real numbers")
        if self.sums.ndim != 4 or self.sums.shape[2:] != self.counts.shape:
            raise ValueError(
                f"averages: sums of shape {tuple(self.sums.shape)} and counts of shape {tuple(self.counts.shape)}; "
                "expected [layers, heads, query_len, key_len] and [query_len, key_len]"
            )
        if not bool((self.counts.double().frac() == 0).all()):  # of what is not finite it is NaN
            raise ValueError("counts hold what is no whole number; expected how often each pair of positions was seen")
        if not bool(torch.isfinite(self.sums).all()):
            layer, head, query, key = (~torch.isfinite(self.sums)).nonzero()[0].tolist()
            raise ValueError(
                f"averages hold {self.sums[layer, head, query, key].item()} at layer {layer}, head {head}, "
                f"query {query}, key {key}; expected finite probabilities. Does the model overflow in this dtype?"
            )
        self.sums, self.counts = self.sums.to(torch.float64), self.counts.to(torch.int64)
        if bool((self.sums < 0).any()) or bool((self.counts < 0).any()):
            raise ValueError("averages hold negative values; expected post-softmax probabilities and counts")
        if bool((self.sums.amax((0, 1)) * (self.counts == 0)).any()):
            raise ValueError("averages hold attention between positions that were never seen (a count of 0)")

    @classmethod
    def from_mean(cls, mean: torch.Tensor, counts: torch.Tensor | None = None, **metadata: Any) -> AttentionAverages:
        """Averages from a known mean, float [layers, heads, query_len, key_len].

        Without `counts` (int [query_len, key_len]) every pair with a non-zero entry counts as seen once. Where a
        count is 0, `mean` does not matter.
        """
        expect_kind(torch.Tensor, _A_TENSOR, mean=mean, **({} if counts is None else {"counts": counts}))
        if mean.ndim != 4:
            raise ValueError(f"mean has shape {tuple(mean.shape)}, expected [layers, heads, query_len, key_len]")
        if counts is None:
            counts = (mean != 0).flatten(0, 1).any(0)
        if counts.shape != mean.shape[2:]:
            raise ValueError(
                f"mean has shape {tuple(mean.shape)} and counts {tuple(counts.shape)}; expected "
                "[layers, heads, query_len, key_len] and [query_len, key_len]"
            )
        sums = (mean.to(torch.float64) * counts).masked_fill(counts == 0, 0.0)
        return cls(sums, counts, metadata=metadata)

    def __repr__(self) -> str:
        return (
            f"AttentionAverages(layers={self.layers}, heads={self.heads}, query_len={self.query_len}, "
            f"key_len={self.key_len}, sequences={self.sequences}, tokens={self.tokens})"
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AttentionAverages)
            and (self.sequences, self.tokens, self.metadata) == (other.sequences, other.tokens, other.metadata)
            and torch.equal(self.sums, other.sums)
            and torch.equal(self.counts, other.counts)
        )

    __hash__ = None

    @property
    def layers(self) -> int:
        return self.sums.shape[0]

    @property
    def heads(self) -> int:
        return self.sums.shape[1]

    @property
    def query_len(self) -> int:
        return self.sums.shape[2]

    @property
    def key_len(self) -> int:
        return self.sums.shape[3]

    @property
    def mean(self) -> torch.Tensor:
        """float64 [layers, heads, query_len, key_len]; 0 where a pair was never seen."""
        return self.sums / self.counts.clamp(min=1)

    def merge(self, other: AttentionAverages) -> AttentionAverages:
        """The averages over both data sets. Lengths may differ; layers and heads may not (ValueError)."""
        expect_kind(AttentionAverages, "AttentionAverages, from collect_averages", other=other)
        if (self.layers, self.heads) != (other.layers, other.heads):
            raise ValueError(
                f"cannot merge averages of {self.layers} layers x {self.heads} heads with {other.layers} layers x "
                f"{other.heads} heads; both must come from the same model"
            )
        query_len, key_len = max(self.query_len, other.query_len), max(self.key_len, other.key_len)
        sums, counts = (pad_corner(tensor, query_len, key_len) for tensor in (self.sums, self.counts))
        sums[:, :, : other.query_len, : other.key_len] += other.sums
        counts[: other.query_len, : other.key_len] += other.counts
        shared = {key: value for key, value in self.metadata.items() if other.metadata.get(key) == value}
        return AttentionAverages(sums, counts, self.sequences + other.sequences, self.tokens + other.tokens, shared)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file with sums, counts and metadata. `load` gives back this object, the metadata as JSON
        has them."""
        counted = {"sequences": int(self.sequences), "tokens": int(self.tokens), "metadata": self.metadata}
        save_tensors(path, _KIND, {"sums": self.sums, "counts": self.counts}, counted)

    @classmethod
    def load(cls, path: str | os.PathLike) -> AttentionAverages:
        """Reads a file of `save`. Raises FileNotFoundError or ValueError, naming the file and what is wrong with it."""
        tensors, header = load_tensors(path, _KIND, ("sums", "counts"))
        try:
            return cls(tensors["sums"], tensors["counts"], header["sequences"], header["tokens"], header["metadata"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged {_KIND} file: {error}") from error


def pad_corner(tensor: torch.Tensor, query_len: int, key_len: int) -> torch.Tensor:
    """A copy of `tensor` [..., q, k] in the top-left corner of zeros [..., query_len, key_len]."""
    padded = tensor.new_zeros(*tensor.shape[:-2], query_len, key_len)
    padded[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return padded
