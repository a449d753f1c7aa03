"""What the kernels are to reach, as data, and how far results are from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .attention_results import Row, fastest, fastest_dense, fastest_own, find_rows
from .attention_workloads import FORWARD, FORWARD_BACKWARD

DENSE, FLASH, FLEX = "fastest dense peer", "sdpa-flash", "flex, same mask"
TRITON, UNROUNDED, MEMORY = "native against triton", "itself without bits", "memory floor"


@dataclass(frozen=True)
class Goal:
    """A ratio of times.

    Attributes:
        device_type: "cuda" or "cpu".
        workload, direction, mask, bits, dtype: what this package computes, by its fastest backend.
        against: what that is compared with; TRITON compares two of its backends.
        ratio: for peers, how many times as fast as they are it shall be, at least; for itself without bits and for the
            memory floor, how many times as long it may take, at most.
    """

    device_type: str
    workload: str
    direction: str
    mask: str
    bits: int | None
    dtype: str
    against: str
    ratio: float

    @property
    def is_speed_up(self) -> bool:
        return self.against not in (UNROUNDED, MEMORY)

    @property
    def name(self) -> str:
        """For example "squad384 forward, tile mask, 3 bits, against itself without bits"."""
        bits = "" if self.bits is None else f", {self.bits} bits"
        against = self.against if self.against == TRITON else f"against {self.against}"
        return f"{self.workload} {self.direction}, {self.mask} mask{bits}, {against}"

    @property
    def text(self) -> str:
        """For example "at least 1.8x as fast"."""
        return f"at least {self.ratio:g}x as fast" if self.is_speed_up else f"at most {self.ratio:g}x the time"


_NO_LOSS, _SMALL_LOSS = round(1 / 1.15, 2), round(1 / 1.2, 2)  # where nothing is pruned: so nobody loses by patching

GOALS = (
    Goal("cuda", "squad384", FORWARD, "element", None, "float16", DENSE, 1.8),
    Goal("cuda", "squad384", FORWARD, "tile", None, "float16", DENSE, 2.2),
    Goal("cuda", "squad384", FORWARD, "tile", None, "float16", MEMORY, 1.4),
    Goal("cuda", "squad384", FORWARD, "element", 3, "float16", UNROUNDED, 1.05),
    Goal("cuda", "squad384", FORWARD, "tile", 3, "float16", UNROUNDED, 1.05),
    Goal("cuda", "squad384", FORWARD, "element", None, "float16", FLEX, 3.0),
    Goal("cuda", "squad384", FORWARD, "tile", None, "float16", FLEX, 3.0),
    Goal("cuda", "squad384", FORWARD, "dense", None, "float16", DENSE, _NO_LOSS),
    Goal("cuda", "squad384", FORWARD, "dense", None, "float16", FLASH, _NO_LOSS),
    Goal("cuda", "squad384", FORWARD, "element", None, "float16", TRITON, 1.2),
    Goal("cuda", "squad384", FORWARD, "tile", None, "float16", TRITON, 1.2),
    Goal("cuda", "long4096", FORWARD, "element", None, "float16", DENSE, 6.0),
    Goal("cuda", "long4096", FORWARD, "tile", None, "float16", DENSE, 6.0),
    Goal("cuda", "squad384", FORWARD_BACKWARD, "element", None, "float16", DENSE, 1.5),
    Goal("cuda", "squad384", FORWARD_BACKWARD, "tile", None, "float16", DENSE, 1.5),
    Goal("cpu", "squad384", FORWARD, "element", None, "float32", DENSE, 4.0),
    Goal("cpu", "squad384", FORWARD, "tile", None, "float32", DENSE, 6.0),
    Goal("cpu", "squad384", FORWARD, "dense", None, "float32", DENSE, _SMALL_LOSS),
    Goal("cpu", "squad384", FORWARD, "element", 3, "float32", UNROUNDED, 1.08),
    Goal("cpu", "squad384", FORWARD_BACKWARD, "element", None, "float32", DENSE, 2.5),
    Goal("cpu", "long2048", FORWARD, "element", None, "float32", DENSE, 5.0),
    Goal("cpu", "squad384", FORWARD, "element", None, "bfloat16", DENSE, 2.5),
    Goal("cpu", "squad384", FORWARD, "tile", None, "bfloat16", DENSE, 4.0),
)


@dataclass(frozen=True)
class Outcome:
    """A goal and what was measured.

    Attributes:
        own, other: the rows compared; other is None for the memory floor, and both where nothing was measured.
        ratio: as `Goal.ratio`; None where a row is missing.
    """

    goal: Goal
    own: Row | None
    other: Row | None
    ratio: float | None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where it was not measured."""
        if self.ratio is None:
            return None
        return self.ratio >= self.goal.ratio if self.goal.is_speed_up else self.ratio <= self.goal.ratio


def outcomes(results: dict[str, Any], goals: Sequence[Goal] = GOALS) -> list[Outcome]:
    """The goals for the device and dtype of `results`."""
    wanted = (results["device_type"], results["dtype"])
    return [outcome(results, goal) for goal in goals if (goal.device_type, goal.dtype) == wanted]


def outcome(results: dict[str, Any], goal: Goal) -> Outcome:
    def measured(variant: str, mask: str, bits: int | None) -> Row | None:
        return fastest(find_rows(results, goal.workload, goal.direction, variant=variant, mask=mask, bits=bits))

    own = fastest_own(results, goal.workload, goal.direction, goal.mask, goal.bits)
    if goal.against == MEMORY:
        return Outcome(goal, own, None, None if own is None else 1 / own["memory_share"])
    if goal.against == DENSE:
        other = fastest_dense(results, goal.workload, goal.direction)
    elif goal.against == FLASH:
        other = measured("sdpa-flash", "dense", None)
    elif goal.against == FLEX:
        other = measured("flex", goal.mask, None)
    elif goal.against == TRITON:
        own, other = (measured(name, goal.mask, goal.bits) for name in ("native", "triton"))
    else:
        other = fastest_own(results, goal.workload, goal.direction, goal.mask, None)
    if own is None or other is None:
        return Outcome(goal, own, other, None)
    ratio = other["p50_ms"] / own["p50_ms"]
    return Outcome(goal, own, other, ratio if goal.is_speed_up else 1 / ratio)
