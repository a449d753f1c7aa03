"""Rows of the attention benchmark's results: what was measured, and why the rest was not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention_inputs import Case, LayerMask, dense_positions
from .attention_variants import Variant
from .attention_workloads import Workload
from .ceilings import Ceilings, least_bytes, useful_flops
from .timing import Timed, percentiles
from .verdicts import Absent, Wrong

_REASON_LENGTH = 300
_PATH = re.compile(r"(?:/[\w.+-]+){2,}")


@dataclass
class Entry:
    """A row in the making: a variant on one mask, with a timed call for each of the mask's layers."""

    variant: Variant
    case: Case
    layers: Sequence[LayerMask | None]
    timed: list[Timed] = field(default_factory=list)
    error: float = 0.0
    reason: str | None = None
    wrong: bool = False

    def release(self) -> None:
        """Lets go of the graphs, and of what they and errors hold."""
        for one in self.timed:
            one.launch, one.failure = _nothing, None


def result_row(entry: Entry, ceilings: Ceilings) -> dict[str, Any]:
    """A row of the results; times are means over the mask's layers of each layer's own percentiles."""
    workload, case = entry.case.workload, entry.case
    per_layer = [percentiles(one.milliseconds) for one in entry.timed]
    p20, p50, p80 = (sum(times) / len(times) for times in zip(*per_layer, strict=True))
    layers = [layer for layer in entry.layers if layer is not None]
    density = sum(layer.density(workload) for layer in layers) / len(layers) if layers else 1.0
    work = sum(layer.work(workload) for layer in layers) / len(layers) if layers else 1.0
    least = least_bytes(workload, case.direction, case.inputs.dtype.itemsize) / ceilings.copy_bytes_per_second
    flops = useful_flops(workload, case.direction, density * dense_positions(workload))
    return {
        "workload": workload.name,
        "pass": case.direction,
        "variant": entry.variant.name,
        "mask": case.mask,
        "bits": case.bits,
        "dtype": dtype_name(case.inputs.dtype),
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "batch": workload.batch,
        "density": density,
        "work": work,
        "memory_share": least / (p50 / 1e3),
        "arithmetic_share": flops / ceilings.matrix_flops_per_second / (p50 / 1e3),
        "error": entry.error,
        "timing": next((one.timing for one in entry.timed if one.timing != "graph"), "graph"),
        "layers": len(entry.timed),
        "repetitions": min(len(one.milliseconds) for one in entry.timed),
    }


def absence_row(entry: Entry) -> dict[str, Any]:
    case = entry.case
    where = {"workload": case.workload.name, "pass": case.direction}
    row = {**where, "variant": entry.variant.name, "mask": case.mask, "bits": case.bits, "reason": entry.reason}
    return {**row, "wrong": True} if entry.wrong else row


def absence_of_all(workload: Workload, direction: str, error: BaseException) -> dict[str, Any]:
    """What stands for every variant where an error left none."""
    where = {"workload": workload.name, "pass": direction}
    return {**where, "variant": "all", "mask": "all", "bits": None, "reason": reason_of(error)}


def reason_of(error: BaseException, warned: Sequence[str] = ()) -> str:
    """Why a variant is absent, in one line without paths. What torch `warned` of says why it has no kernel."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = str(error)
    if "No available kernel" in text:
        causes = [warning.partition(" (Triggered")[0] for warning in warned]
        text = " ".join([text, *(cause for cause in causes if not cause.endswith(("because:", "disabled.")))])
    text = _PATH.sub(lambda path: path[0].rpartition("/")[2], " ".join(text.split())) or "no message"
    if isinstance(error, (Absent, Wrong)):
        return text
    return f"{type(error).__name__}: {text}"[:_REASON_LENGTH]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nothing() -> None:
    pass
