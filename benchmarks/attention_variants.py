"""What the attention benchmark measures side by side, as data: the backends of this package, and their peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import SparseLayout, sparse_attention
from sparse_attn.backends import BACKENDS

from .attention_inputs import Case
from .attention_workloads import MASKS, Workload
from .verdicts import Absent

_LONGEST_ALL_KEPT = 4096  # tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute attention.

    Attributes:
        name: what results call it.
        prepare: makes a function (query, key, value) -> output for a case, with everything done that needs doing once
            per mask or shape. Raises `Absent`, or any error, where the case is not for it.
        masks: those it is measured on.
        devices: types of devices it is measured on.
        takes_packed: whether it takes packed sequences; others get them padded, with a mask.
        packed_only: whether it is measured on packed sequences alone.
        rounds: whether it can round probabilities.
        compiles: whether it compiles for seconds for every shape, so that workloads choose its cases.
        ours: whether it is part of this package.
        tolerance: largest relative error, for variants that are less precise by intention; None for the dtype's own.
    """

    name: str
    prepare: Callable[[Case], Attend]
    masks: tuple[str, ...] = ("dense",)
    devices: tuple[str, ...] = ("cuda", "cpu")
    takes_packed: bool = False
    packed_only: bool = False
    rounds: bool = False
    compiles: bool = False
    ours: bool = False
    tolerance: float | None = None

    def bits_on(self, workload: Workload, direction: str) -> tuple[int | None, ...]:
        """Widths to round to in this workload and pass; None = not at all."""
        return workload.bits if self.rounds and direction == "forward" else (None,)


def _sparse_attention(backend: str) -> Callable[[Case], Attend]:
    def prepare(case: Case) -> Attend:
        layout = _all_kept(case) if case.layer is None else case.layer.layout
        packed = {}
        if case.workload.packed:
            packed = {"cu_seqlens": case.inputs.cu_seqlens, "max_length": case.workload.length}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return sparse_attention(query, key, value, layout, bits=case.bits, backend=backend, **packed)

        return attend

    return prepare


def _all_kept(case: Case) -> SparseLayout:
    """A mask that prunes nothing: what a user pays who patches a model without pruning it."""
    workload = case.workload
    if workload.length > _LONGEST_ALL_KEPT:
        raise Absent(f"lists of all positions are not worth their memory beyond {_LONGEST_ALL_KEPT} tokens")
    shape = (workload.heads, workload.length, workload.length)
    return SparseLayout(torch.ones(shape, dtype=torch.bool, device=case.inputs.device))


def own_variants() -> list[Variant]:
    """Every backend of `sparse_attention` but the one that defines what is right. Triton's interpreter is left out, and
    PyTorch's formulation where nothing is pruned."""
    places, masks = {"triton": ("cuda",)}, {"torch": MASKS[1:]}
    return [
        Variant(
            name, _sparse_attention(name), masks=masks.get(name, MASKS), devices=places.get(name, ("cuda", "cpu")),
            takes_packed=True, rounds=True, ours=True,
        )
        for name in BACKENDS
        if name != "reference"
    ]  # fmt: skip


OWN_NAMES = frozenset(variant.name for variant in own_variants())


def all_variants() -> list[Variant]:
    """The package's own variants, then peers: those of torch, then those of other packages."""
    from .attention_packages import PACKAGE_PEERS
    from .attention_peers import TORCH_PEERS

    return [*own_variants(), *TORCH_PEERS, *PACKAGE_PEERS]
