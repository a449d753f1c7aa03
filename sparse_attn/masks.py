"""Global masks: which pairs of positions a model keeps, the same for every input."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import ranking
from .arguments import expect_flags, expect_kind, expect_shares, expect_whole
from .averages import AttentionAverages
from .bitpacking import PackedMask
from .files import load_tensors, save_tensors
from .layout import SparseLayout, existing_device

TILE_ROWS = 16  # queries that a tile keeps or prunes together
_KIND = "global mask"
_AVERAGES = "AttentionAverages: from collect_averages, or AttentionAverages.from_mean(tensor)"


class GlobalMask:
    """A boolean keep-matrix per layer and head, indexed by absolute positions. Not the padding mask.

    Make one with `from_averages`, `random`, `from_tensor` or `from_function`; combine masks with `&`, `|` and `~`.
    A mask takes one bit per position and does not change.

    Args:
        keep: bool [layers, heads, query_len, key_len], true = kept, or packed; a tensor is copied.

    Attributes:
        metadata: how the mask was made, saved with it as JSON.
    """

    def __init__(self, keep: torch.Tensor | PackedMask, metadata: dict[str, Any] | None = None):
        dtype = torch.bool if isinstance(keep, PackedMask) else getattr(keep, "dtype", None)
        if dtype != torch.bool or len(keep.shape) != 4 or 0 in keep.shape:
            found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, torch.Tensor) else type(keep).__name__
            raise ValueError(
                f"a global mask is a boolean tensor [layers, heads, query_len, key_len] with true = kept, not {found}"
            )
        self._packed = keep if isinstance(keep, PackedMask) else PackedMask.pack(keep.cpu())
        self.metadata = dict(metadata or {})
        self._layouts: dict[tuple[int, torch.device], SparseLayout] = {}

    @classmethod
    def from_averages(
        cls,
        averages: AttentionAverages,
        sparsity: float,
        granularity: str = "element",
        scope: str = "layer",
        keep_diagonal: bool = True,
        strict: bool = False,
    ) -> GlobalMask:
        """Keeps the positions with the largest average attention (Attention Pruning, arXiv 2012.02030).

        Args:
            averages: from `collect_averages` or `load_published_averages`.
            sparsity: share of positions to prune, in [0, 1). It counts positions that were seen; those that never
                held two real tokens are pruned on top (but for the diagonal); a UserWarning says where these are most.
            granularity: "element" ranks single positions; "tile" ranks 16 consecutive queries x 1 key by their mean,
                which costs a kernel half the work at equal sparsity. The last queries may be fewer; a tile counts as
                the positions that it has.
            scope: what is ranked together: the heads of a "layer" (as published), each "head", or the whole "model".
            keep_diagonal: every query keeps itself, within the same budget, so that no input of any length has a
                query without keys. A tile is kept if it holds a diagonal position. On short masks that may be more than
                was asked for, tiles at length 32 keep half of it; a UserWarning says so.
            strict: the published rule bit for bit: per layer the nearest-rank percentile over the non-zero block,
                everything not above it pruned, no diagonal. Element granularity and layer scope only.

        Raises ValueError for a sparsity outside [0, 1), an unknown granularity or scope, averages that hold nothing,
        and tile masks or other scopes together with `strict`; TypeError for averages, sparsities and flags of other
        types.
        """
        expect_kind(AttentionAverages, _AVERAGES, averages=averages)
        sparsity = _checked_sparsity(sparsity)
        expect_flags(keep_diagonal=keep_diagonal, strict=strict)
        _check_choice("granularity", granularity, ("element", "tile"))
        _check_choice("scope", scope, ("layer", "head", "model"))
        if strict and (granularity, scope) != ("element", "layer"):
            raise ValueError(
                f"strict=True is the published rule: granularity 'element' and scope 'layer', not {granularity!r} and "
                f"{scope!r}. Leave strict out for other rules"
            )
        if not bool((averages.counts > 0).any()):
            raise ValueError("averages hold no counted position; collect them on at least one sequence")
        if strict:
            keep = ranking.published_rule(averages.mean, sparsity, whole=averages.metadata.get("source"))
        else:
            tile_rows, seen = TILE_ROWS if granularity == "tile" else 1, averages.counts > 0
            keep = ranking.largest(averages.mean, seen, sparsity, tile_rows, scope, keep_diagonal)
            if 2 * (longest := ranking.longest_seen(seen)) <= len(seen):
                warnings.warn(
                    f"the averages are for {len(seen)} positions, but the longest sequence had {longest}: from "
                    f"there on the mask keeps {'the diagonal' if keep_diagonal else 'nothing'}. Collect on sequences "
                    "as long as inputs will be, or with a smaller max_length",
                    stacklevel=2,
                )
        made = dict(
            sparsity=sparsity, granularity=granularity, scope=scope, keep_diagonal=keep_diagonal, strict=strict,
        )  # fmt: skip
        return cls(keep, {**made, "averages": dict(averages.metadata)})

    @classmethod
    def random(
        cls,
        layers: int,
        heads: int,
        query_len: int,
        key_len: int | None = None,
        *,
        sparsity: float,
        granularity: str = "element",
        keep_diagonal: bool = True,
        seed: int = 0,
    ) -> GlobalMask:
        """The baseline that any informed mask has to beat: positions drawn evenly, the same number in each layer.

        Arguments mean what they mean in `from_averages`; `key_len` defaults to `query_len`.
        """
        sparsity = _checked_sparsity(sparsity)
        _check_choice("granularity", granularity, ("element", "tile"))
        key_len = query_len if key_len is None else key_len
        expect_whole(layers=layers, heads=heads, query_len=query_len, key_len=key_len)
        expect_whole(0, seed=seed)
        expect_flags(keep_diagonal=keep_diagonal)
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (layers, heads, query_len, key_len)
        scores = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        tile_rows = TILE_ROWS if granularity == "tile" else 1
        seen = torch.ones(query_len, key_len, dtype=torch.bool, device="cpu")
        keep = ranking.largest(scores, seen, sparsity, tile_rows, "layer", keep_diagonal)
        return cls(keep, dict(sparsity=sparsity, granularity=granularity, random_seed=seed))

    @classmethod
    def from_tensor(cls, keep: torch.Tensor, layers: int | None = None, heads: int | None = None) -> GlobalMask:
        """A mask from a boolean tensor, true = kept.

        Args:
            keep: bool [layers, heads, query_len, key_len], or without leading dimensions, which are then repeated:
                [heads, query_len, key_len] for each of `layers`, [query_len, key_len] for all `layers` and `heads`.
        """
        if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
            found = keep.dtype if isinstance(keep, torch.Tensor) else type(keep).__name__
            raise ValueError(f"a global mask is made from a boolean tensor (true = kept), not from {found}")
        expect_whole(or_none=True, layers=layers, heads=heads)
        if keep.ndim < 4 and (layers is None or (keep.ndim < 3 and heads is None)):
            raise ValueError(
                f"the mask has shape {tuple(keep.shape)}, expected [layers, heads, query_len, key_len]; pass "
                f"{'layers' if keep.ndim == 3 else 'layers and heads'} to repeat it for all of them"
            )
        if keep.ndim == 2 and heads is not None:
            keep = keep.expand(heads, -1, -1)
        if keep.ndim == 3 and layers is not None:
            keep = keep.expand(layers, -1, -1, -1)
        for name, wanted, dim in (("layers", layers, -4), ("heads", heads, -3)):
            if wanted is not None and keep.ndim >= -dim and keep.shape[dim] != wanted:
                raise ValueError(f"{name} is {wanted}, but the mask has shape {tuple(keep.shape)}")
        return cls(keep)

    @classmethod
    def from_function(
        cls,
        function: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor],
        layers: int,
        heads: int,
        query_len: int,
        key_len: int | None = None,
    ) -> GlobalMask:
        """A mask from a rule, for example `lambda layer, head, query, key: (query - key).abs() < 32`.

        The function is called once per layer and head with int64 tensors query [query_len, 1] and key [1, key_len]
        and returns what broadcasts to bool [query_len, key_len], true = kept.
        """
        key_len = query_len if key_len is None else key_len
        expect_whole(layers=layers, heads=heads, query_len=query_len, key_len=key_len)
        expect_kind(Callable, "a function of layer, head, query and key", function=function)
        query = torch.arange(query_len, device="cpu").view(-1, 1)
        key = torch.arange(key_len, device="cpu").view(1, -1)
        keep = torch.empty(layers, heads, query_len, key_len, dtype=torch.bool, device="cpu")
        for layer in range(layers):
            for head in range(heads):
                kept = function(layer, head, query, key)
                try:
                    kept = torch.as_tensor(kept, device="cpu")
                    shaped = kept.expand(query_len, key_len)
                except (RuntimeError, TypeError, ValueError) as error:
                    found = tuple(kept.shape) if isinstance(kept, torch.Tensor) else type(kept).__name__
                    raise ValueError(
                        f"the mask function returned {found}, expected what broadcasts to {(query_len, key_len)}"
                    ) from error
                if kept.dtype != torch.bool:
                    raise ValueError(f"the mask function returned {kept.dtype}, expected torch.bool (true = kept)")
                keep[layer, head] = shaped
        return cls(keep)

    @property
    def keep(self) -> torch.Tensor:
        """The mask as bool [layers, heads, query_len, key_len], true = kept, on the CPU; made anew at every access."""
        return self._packed.unpack()

    def layer(self, index: int) -> torch.Tensor:
        """The mask of a layer (0-based): bool [heads, query_len, key_len], true = kept, on the CPU."""
        return self._packed[self._checked(index)].unpack()

    @property
    def shape(self) -> torch.Size:
        """(layers, heads, query_len, key_len)"""
        return self._packed.shape

    @property
    def layers(self) -> int:
        return self.shape[0]

    @property
    def heads(self) -> int:
        return self.shape[1]

    @property
    def query_len(self) -> int:
        return self.shape[2]

    @property
    def key_len(self) -> int:
        return self.shape[3]

    def __repr__(self) -> str:
        density = self.density().mean().item()
        return (
            f"GlobalMask(layers={self.layers}, heads={self.heads}, query_len={self.query_len}, "
            f"key_len={self.key_len}, density={density:.3f})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GlobalMask) and self.shape == other.shape and torch.equal(self.keep, other.keep)

    __hash__ = None

    def __deepcopy__(self, memo: dict) -> GlobalMask:
        return self  # read-only: copies of a patched model share it

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_layouts": {}}  # of devices that a file's reader may lack

    def __and__(self, other: GlobalMask) -> GlobalMask:
        return self._combined(other, torch.logical_and)

    def __or__(self, other: GlobalMask) -> GlobalMask:
        return self._combined(other, torch.logical_or)

    def __invert__(self) -> GlobalMask:
        return GlobalMask(~self.keep)

    def _combined(self, other: GlobalMask, operation: Callable) -> GlobalMask:
        if not isinstance(other, GlobalMask):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(
                f"masks of shape {tuple(self.shape)} and {tuple(other.shape)} cannot be combined; "
                "both must be [layers, heads, query_len, key_len] of the same model and length"
            )
        return GlobalMask(operation(self.keep, other.keep))

    def density(self) -> torch.Tensor:
        """Share of positions kept: float64 [layers, heads]."""
        counts = torch.stack([self.layer(index).sum((1, 2)) for index in range(self.layers)])
        return counts.double() / (self.query_len * self.key_len)

    def retained_attention(self, averages: AttentionAverages) -> torch.Tensor:
        """Share of the averages' attention mass on kept positions: float64 [layers, heads]; 0 for a head without any.

        Raises ValueError where `averages` have other layers, heads or lengths than the mask.
        """
        expect_kind(AttentionAverages, _AVERAGES, averages=averages)
        if averages.sums.shape != self.shape:
            raise ValueError(
                f"averages of shape {tuple(averages.sums.shape)} do not fit a mask of shape {tuple(self.shape)}; "
                f"collect them from the mask's model with max_length={self.query_len}"
            )
        mass = averages.sums.sum((2, 3))
        return (averages.sums * self.keep.to(mass.device)).sum((2, 3)) / torch.where(mass > 0, mass, 1.0)

    def layout(self, layer: int, device: torch.device | str | None = None) -> SparseLayout:
        """The compiled mask of a layer (0-based) on `device` (default: the CPU), made once and cached."""
        layer = self._checked(layer)
        device = torch.device("cpu") if device is None else existing_device(device)
        if (layer, device) not in self._layouts:
            on_cpu = self._layouts.setdefault((layer, torch.device("cpu")), SparseLayout(self._packed[layer]))
            self._layouts[layer, device] = on_cpu.to(device)
        return self._layouts[layer, device]

    def _checked(self, layer: int) -> int:
        try:
            layer = operator.index(layer)
        except TypeError:
            raise TypeError(f"layer is {layer!r}, expected the index of a layer, from 0") from None
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer is {layer}; the mask has layers 0 to {self.layers - 1}")
        return layer

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file with one bit per position."""
        header = {"shape": list(self.shape), "metadata": self.metadata}
        save_tensors(path, _KIND, {"keep_bits": self._packed.bits}, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> GlobalMask:
        """Reads a file of `save`. Raises FileNotFoundError or ValueError, naming the file and what is wrong with it."""
        tensors, header = load_tensors(path, _KIND, ("keep_bits",))
        try:
            return cls(PackedMask(tensors["keep_bits"], header["shape"]), header["metadata"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged {_KIND} file: {error}") from error


def _checked_sparsity(sparsity: float) -> float:
    expect_shares(sparsity=sparsity)
    return float(sparsity)  # NumPy's numbers cannot be written to a file's metadata


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {choices}")
