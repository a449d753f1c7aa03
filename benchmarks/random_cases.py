"""Random attention calls: what a seed and a number draw, and the tensors of it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attn import QuantizationTable, SparseLayout

_CASES_OF_A_KIND = 12
_OWN_TABLE = QuantizationTable(1e-2, (0.0, 0.03, 0.2, 0.7))
_MASKS = ("random", "random", "tile", "stripes", "band", "full", "empty")
_STRIDES = ("heads beside tokens", "heads outside", "parts of larger tensors")


@dataclass(frozen=True)
class Target:
    """A backend on a kind of device, and what it can compute.

    Attributes:
        longest: of a sequence.
        sequences: a batch has at most one of these; the native kernel uses its shared memory again where a batch has
            more than the GPU multiprocessors.
        positions: batch * heads * query_len * key_len at most: the reference materialises them.
        drops: whether it has dropout and query offsets.
        trains_all: whether it has a backward pass for all calls, or for those without rounding and causality alone.
    """

    backend: str
    device_type: str
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    head_dims: tuple[int, ...] = (16, 32, 40, 64, 64, 80, 96, 128, 256)
    longest: int = 2048
    positions: int = 2**23
    drops: bool = True
    trains_all: bool = True
    sequences: tuple[int, ...] = (4,)

    def trains(self, kind: Kind) -> bool:
        """Whether it has a backward pass for a kind of call."""
        return self.trains_all or (kind.bits is None and not kind.causal)


TARGETS = {
    (target.backend, target.device_type): target
    for target in (
        Target("triton", "cuda"),
        # Its interpreter is slow, and multiplies bfloat16 wrongly.
        Target("triton", "cpu", dtypes=(torch.float16, torch.float32), longest=96, positions=2**12),
        Target(
            "native",
            "cuda",
            (torch.float16, torch.bfloat16),
            (32, 64),
            longest=512,
            drops=False,
            trains_all=False,
            sequences=(4, 4, 600),
        ),
        Target("native", "cpu", longest=1024, positions=2**20),
    )
}


@dataclass(frozen=True)
class Kind:
    """What kernels are compiled for; several cases share one, so that they share what is compiled.

    Attributes:
        strides: one of those in memory that `tensors` knows.
        offset: whether queries start behind the first position.
        lengths, padding: whether there are lengths, and a padding mask.
        sizes: lengths that masks have.
    """

    dtype: torch.dtype
    head_dim: int
    heads: int
    bits: int | QuantizationTable | None
    packed: bool
    causal: bool
    offset: bool
    lengths: bool
    padding: bool
    dropout: float
    strides: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One call. Padded: query_len and key_len of the tensors; packed: `sequences` are the lengths."""

    target: Target
    number: int
    kind: Kind
    batch: int
    query_len: int
    key_len: int
    sequences: tuple[int, ...]
    query_offset: int
    mask: str
    mask_len: int
    density: float
    scale: float

    @property
    def trains(self) -> bool:
        """Whether its backward pass is run too."""
        return self.target.trains(self.kind)

    def describe(self) -> str:
        kind = self.kind
        bits = "own table" if isinstance(kind.bits, QuantizationTable) else f"bits {kind.bits}"
        shape = f"batch {self.batch}, {self.query_len} x {self.key_len}"
        if kind.packed:
            shape = f"packed {self.sequences}" if self.batch < 9 else f"packed {self.batch} of up to {self.query_len}"
        options = [name for name in ("causal", "lengths", "padding") if getattr(kind, name)]
        options += [f"offset {self.query_offset}"] if kind.offset else []
        options += [f"dropout {kind.dropout}"] if kind.dropout else []
        return ", ".join(
            [
                f"case {self.number}: {self.target.backend}, {shape}, {kind.heads} heads, head_dim {kind.head_dim}",
                f"{str(kind.dtype).removeprefix('torch.')}, {bits}, scale {self.scale:.3f}, {kind.strides}",
                f"mask {self.mask} {self.mask_len} ({self.density:.2f})",
                *options,
            ]
        )


def draw(number: int, seed: int, target: Target) -> Case:
    """Case `number` of a seed: always the same."""
    kind = _kind(number // _CASES_OF_A_KIND, seed, target)
    chance = random.Random(f"{seed} case {number}")
    mask_len = chance.choice(kind.sizes)
    room = target.positions // kind.heads
    longest = min(mask_len, math.isqrt(room))
    query_len, key_len = _length(chance, longest), _length(chance, longest)
    if kind.packed or kind.causal or chance.random() < 0.5:
        key_len = query_len
    offset = 0
    if kind.offset:
        offset = mask_len - query_len if chance.random() < 0.5 else chance.randint(0, mask_len - query_len)
        key_len = min(offset + query_len, longest)
    batch = chance.randint(1, max(1, min(chance.choice(target.sequences), room // (query_len * key_len))))
    sequences: tuple[int, ...] = ()
    if kind.packed:
        sequences = tuple(chance.choice((0, 1, _length(chance, longest // 2 + 1))) for _ in range(batch - 1))
        sequences = (*sequences, query_len)
    return Case(
        target=target,
        number=number,
        kind=kind,
        batch=batch,
        query_len=query_len,
        key_len=key_len,
        sequences=sequences,
        query_offset=offset,
        mask=chance.choice(_MASKS),
        mask_len=mask_len,
        density=chance.choice((0.02, 0.1, 0.3, 0.7)),
        scale=kind.head_dim**-0.5 * chance.choice((1.0, 1.0, 0.5, 2.0)),
    )


def kind_number(number: int) -> int:
    """Which kind a case is of: equal numbers share what is compiled."""
    return number // _CASES_OF_A_KIND


def _kind(number: int, seed: int, target: Target) -> Kind:
    chance = random.Random(f"{seed} kind {number}")
    packed = chance.random() < 0.4
    return Kind(
        dtype=chance.choice(target.dtypes),
        head_dim=chance.choice(target.head_dims),
        heads=chance.choice((1, 2, 4, 6)),
        bits=chance.choice((None, None, None, 1, 2, 3, 3, 4, 8, _OWN_TABLE)),
        packed=packed,
        causal=chance.random() < 0.3,
        offset=target.drops and not packed and chance.random() < 0.2,
        lengths=not packed and chance.random() < 0.6,
        padding=not packed and chance.random() < 0.3,
        dropout=chance.choice((0.0, 0.0, 0.0, 0.1, 0.5) if target.drops else (0.0,)),
        strides=chance.choice(_STRIDES),
        sizes=tuple(_length(chance, target.longest) for _ in range(2)),
    )


def _length(chance: random.Random, longest: int) -> int:
    """From 1 to `longest`: half of all on a logarithmic scale, next to multiples of 16 more than elsewhere."""
    length = round(math.exp(chance.uniform(0, math.log(longest))))
    if chance.random() < 0.5:
        length = chance.randint(1, longest)
    if chance.random() < 0.4:
        length = max(1, length // 16) * 16 + chance.choice((-1, 0, 1))
    return min(max(length, 1), longest)


def tensors(case: Case, device: torch.device, generator: torch.Generator) -> list[Tensor]:
    """Query, key, value and gradient of the output, as normal numbers."""
    kind, total = case.kind, sum(case.sequences)

    def one(batch: int, length: int) -> Tensor:
        spread = 2 if kind.strides == "parts of larger tensors" else 1
        shape = (batch, length, spread * kind.heads, kind.head_dim * spread)
        drawn = torch.randn(shape, generator=generator, device=device).to(kind.dtype)
        if kind.strides == "heads outside":
            drawn = drawn.transpose(1, 2).contiguous().transpose(1, 2)
        return drawn[:, :, ::spread, : kind.head_dim]

    if kind.packed:
        return [one(1, total)[0] for _ in range(4)]
    lengths = (case.query_len, case.key_len, case.key_len, case.query_len)
    return [one(case.batch, length).transpose(1, 2) for length in lengths]


def layout(case: Case, device: torch.device, generator: torch.Generator) -> SparseLayout:
    heads, length = case.kind.heads, case.mask_len
    shape = (heads, length, length)
    rows = torch.arange(length, device=device)
    if case.mask in ("full", "empty"):
        keep = torch.full(shape, case.mask == "full", device=device)
    elif case.mask == "band":
        width = round(case.density * length / 2)
        keep = ((rows[:, None] - rows).abs() <= width).expand(shape).contiguous()
    else:
        keep = torch.rand(shape, generator=generator, device=device) < case.density
        if case.mask == "tile":
            keep = keep[:, ::16].repeat_interleave(16, dim=1)[:, :length].contiguous()
        if case.mask == "stripes":
            keep[:, :, ::7] = True
    return SparseLayout(keep)


def arguments(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """The named arguments of `sparse_attention`, without dropout."""
    kind = case.kind
    named: dict[str, Any] = dict(scale=case.scale, bits=kind.bits, causal=kind.causal)
    if kind.packed:
        lengths = torch.tensor([0, *case.sequences], device=device)
        return {**named, "cu_seqlens": lengths.cumsum(0).to(torch.int32), "max_length": max(case.sequences)}
    named["query_offset"] = case.query_offset

    def drawn(longest: int) -> Tensor:
        return torch.randint(0, longest + 1, (case.batch,), generator=generator, device=device)

    if kind.lengths:
        named |= dict(query_lengths=drawn(case.query_len), key_lengths=drawn(case.key_len))
    if kind.padding:
        shape = (case.batch, case.key_len)
        named["key_padding_mask"] = torch.rand(shape, generator=generator, device=device) < 0.7
    return named
