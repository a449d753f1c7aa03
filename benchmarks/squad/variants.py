"""The rows of the SQuAD table: what is measured, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

ROUNDED = "+bits"  # ends the names, for --variants, of rows that round probabilities


@dataclass(frozen=True)
class Variant:
    """One row of the table, measured in a process of its own.

    Attributes:
        name: what it is called; variants that differ in `bits` or in their mask alone share a name.
        attention: transformers' "eager" or "sdpa", torch's functions over "packed" batches, "flash", "flex", or
            "sparse" for the patched model.
        padding: "max" pads a batch to the greatest length, "longest" to its longest window, "none" not at all: the
            model is fed packed batches, or (sparse) drops padding by itself.
        compiled: whether torch.compile compiles the model.
        granularity: of the global mask, for those that have one.
        sparsity: of the global mask; None for the one of --sparsity or --mask.
        bits: width of the probability quantiser; None = off.
        own_weights: whether weights trained with the mask are used, if there are any.
        rounded_weights: whether those trained through rounding to `bits` are, if there are any.
        onednn: `patch_model`'s.
    """

    name: str
    attention: str
    padding: str
    compiled: bool = False
    granularity: str | None = None
    sparsity: float | None = None
    bits: int | None = None
    own_weights: bool = True
    rounded_weights: bool = False
    onednn: bool | None = None

    @property
    def masked(self) -> bool:
        """Whether it needs a global mask."""
        return self.attention in ("sparse", "flex")

    @property
    def sparse(self) -> bool:
        """Whether it is this package's attention."""
        return self.attention == "sparse"

    @property
    def compiles(self) -> bool:
        """Whether it compiles for minutes on a CPU."""
        return self.compiled or self.attention == "flex"

    @property
    def label(self) -> str:
        """The name, with mask and bits if there are any."""
        sparsity = None if self.sparsity is None else f"{self.sparsity:g} pruned"
        bits = None if self.bits is None else f"{self.bits} bit{'s' if self.bits > 1 else ''}"
        return ", ".join(filter(None, [self.name, self.granularity, sparsity, bits]))


PEERS = (
    Variant("eager-padded", "eager", "max"),
    Variant("sdpa-padded", "sdpa", "max"),
    Variant("sdpa-sorted", "sdpa", "longest"),
    Variant("sdpa-unpadded", "packed", "none"),
    Variant("flash-unpadded", "flash", "none"),
    Variant("compiled", "sdpa", "longest", compiled=True),
    Variant("compiled-unpadded", "packed", "none", compiled=True),
    Variant("flex", "flex", "longest"),
)
OURS = (
    Variant("sparse-padded", "sparse", "max"),
    Variant("sparse-sorted", "sparse", "longest"),
    Variant("sparse-unpadded", "sparse", "none"),
    Variant("sparse-unpadded-plain", "sparse", "none", onednn=False),
    Variant("sparse-compiled", "sparse", "none", compiled=True),
)
SWEPT = OURS[2]
NAMES = [
    *(peer.name for peer in PEERS),
    *(name for ours in OURS for name in (ours.name, ours.name + ROUNDED)),
]
DEFAULT = [
    "eager-padded", "sdpa-padded", "sdpa-sorted", "sdpa-unpadded", "flash-unpadded", "compiled",
    "compiled-unpadded", "flex", "sparse-padded", "sparse-unpadded", "sparse-unpadded" + ROUNDED, "sparse-compiled",
]  # fmt: skip
COMPILED = [one.name for one in (*PEERS, *OURS) if one.compiles]  # left out on a CPU unless asked for


def default_names(device_type: str) -> list[str]:
    """The rows that are measured where --variants does not say."""
    return [name for name in DEFAULT if device_type == "cuda" or name not in COMPILED]


def table_variants(names: Sequence[str], granularities: Sequence[str], bits: int | None) -> list[Variant]:
    """The rows called `names`, in the table's order: peers first, then ours, mask by mask.

    The first is what the others' speed is compared with. Rounded rows are left out where `bits` is None.
    """
    rows = []
    for peer in PEERS:
        if peer.name in names:
            rows += [replace(peer, granularity=one) for one in granularities] if peer.masked else [peer]
    for granularity in granularities:
        for ours in OURS:
            masked = replace(ours, granularity=granularity)
            if ours.name in names:
                rows.append(masked)
            if ours.name + ROUNDED in names and bits is not None:
                rows.append(replace(masked, bits=bits, rounded_weights=True))
    return rows
