"""Runs the attention benchmark: every variant of a workload and pass is checked, then all are timed in turns."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_check import Expected
from .attention_inputs import Case, Inputs, LayerMask
from .attention_rows import Entry, absence_of_all, absence_row, dtype_name, reason_of, result_row
from .attention_variants import Variant
from .attention_workloads import FORWARD, MASKS, PASSES, Workload
from .ceilings import measure_ceilings
from .device import circumstances
from .timing import Timer, empty_milliseconds, make_timer, time_in_turns
from .verdicts import Wrong

_NO_BACKWARD = "no backward pass on CPUs"
_COMPILES = "left out to keep the run short: it compiles for seconds for every shape"


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device, dtype: of the tensors.
        passes, masks: those to measure.
        seconds: to time a variant for, at most.
        budget: seconds after which no further workload is begun, or None.
        seed: of inputs and samples.
    """

    device: torch.device
    dtype: torch.dtype
    passes: tuple[str, ...] = PASSES
    masks: tuple[str, ...] = MASKS
    seconds: float = 0.5
    budget: float | None = None
    seed: int = 0


def run(
    workloads: Sequence[Workload],
    variants: Sequence[Variant],
    settings: Settings,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """The results of all variants on all workloads, as the JSON file has them. `keep` gets what there is so far after
    every pass, so that an interrupted run leaves something."""
    start = time.perf_counter()
    ceilings = measure_ceilings(settings.device, settings.dtype)
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, Any]] = []
    measured: dict[str, Any] = {}
    results: dict[str, Any] = {
        **circumstances(settings.device),
        "dtype": dtype_name(settings.dtype),
        "arguments": {"seconds": settings.seconds, "budget": settings.budget, "seed": settings.seed},
        "ceilings": asdict(ceilings),
        "empty_ms": empty_milliseconds(settings.device),
        "seconds": 0.0,
        "workloads": measured,
        "left_out": [workload.name for workload in workloads],
        "rows": rows,
        "absent": absent,
    }
    for workload in workloads:
        spent = time.perf_counter() - start
        if settings.budget is not None and spent > settings.budget:
            break
        measured[workload.name] = workload.description()
        results["left_out"].remove(workload.name)
        masks = LazyMasks(workload, settings.device)
        for direction in settings.passes:
            try:
                entries = measure(workload, direction, masks, variants, settings)
                found = [result_row(entry, ceilings) for entry in entries if entry.reason is None]
                missing = [absence_row(entry) for entry in entries if entry.reason is not None]
            except Exception as error:  # no room for the inputs, or a device that a variant broke
                found, missing = [], [absence_of_all(workload, direction, error)]
            rows += found
            absent += missing
            results["seconds"] = round(time.perf_counter() - start, 1)
            keep(results)
            _say(f"{workload.name}, {direction}: {len(found)} rows, {results['seconds']:.0f} s so far")
    if results["left_out"]:
        _say(f"left out, since {settings.budget:g} s were over: {', '.join(results['left_out'])}")
    return results


class LazyMasks:
    """The layers of a workload's masks, made when they are first asked for."""

    def __init__(self, workload: Workload, device: torch.device):
        self._workload, self._device = workload, device
        self._layers: dict[str, list[LayerMask]] = {}

    def layers(self, mask: str) -> Sequence[LayerMask | None]:
        """One per layer; a single None for dense attention."""
        if mask == "dense":
            return [None]
        if mask not in self._layers:
            self._layers[mask] = [LayerMask(keep) for keep in self._workload.masks(mask, self._device)]
        return self._layers[mask]


def measure(
    workload: Workload, direction: str, masks: LazyMasks, variants: Sequence[Variant], settings: Settings
) -> list[Entry]:
    """Every variant on every mask that applies, in one pass: checked and timed, or with the reason why not."""
    inputs = Inputs(workload, settings.device, settings.dtype, settings.seed)
    entries = list(planned(workload, direction, masks, variants, settings, inputs))
    torch.compiler.reset()  # what was compiled for other shapes would count towards the limit of recompilations
    timer, expected = make_timer(settings.device), {}
    for entry in entries:
        if entry.reason is None:
            entry.reason = _prepare(entry, timer, expected, settings)
            if entry.reason is not None:
                _free_memory(settings.device)
    ready = [entry for entry in entries if entry.reason is None]
    timed = [one for entry in ready for one in entry.timed]
    broken = None
    try:
        time_in_turns(timer, timed, [settings.seconds / len(entry.timed) for entry in ready for _ in entry.timed])
    except Exception as error:  # of the device, which does not say whose it is
        broken = reason_of(error)
    for entry in ready:
        entry.reason = next((reason_of(one.failure) for one in entry.timed if one.failure is not None), broken)
    for entry in entries:
        entry.release()
    del timer, expected, inputs
    _free_memory(settings.device)
    return entries


def _prepare(entry: Entry, timer: Timer, expected: dict, settings: Settings) -> str | None:
    """Checks a variant on every layer and makes its timed calls. Returns why it is absent, or None."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            for layer in entry.layers:
                call, error = checked_call(entry.variant, entry.case, layer, expected, settings.seed)
                entry.error = max(entry.error, error)
                entry.timed.append(timer.prepare(call, settings.seconds))
        except Exception as error:  # a peer may raise anything; the others go on
            entry.wrong = isinstance(error, Wrong)
            return reason_of(error, [str(one.message) for one in warned])
    return None


def checked_call(
    variant: Variant, case: Case, layer: LayerMask | None, expected: dict, seed: int = 0
) -> tuple[Any, float]:
    """A function without arguments that runs the case, and the relative error of its results.

    `expected` holds what is right for a mask, layer and bits, and is filled in. Raises Absent, Wrong, or whatever the
    variant raises.
    """
    case = Case(case.workload, case.direction, case.mask, case.inputs, layer, case.bits)
    attend = variant.prepare(case)
    call = pass_over(attend, case, packed=variant.takes_packed and case.workload.packed)
    results = call()
    key = (case.mask, id(layer), case.bits)
    if key not in expected:
        expected[key] = Expected(case, seed)
    error = expected[key].error(results, variant.tolerance)
    if case.inputs.restore():
        raise Wrong("changes its inputs")
    return call, error


def pass_over(attend, case: Case, packed: bool):
    """A function without arguments: the forward pass, or forward and backward. It returns the output, and in training
    the gradients of query, key and value."""
    *inputs, grad_output = case.inputs.tensors(packed)

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (attend(*inputs),)

    def forward_backward() -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            output = attend(*leaves)
        return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))

    return forward_backward if case.training else forward


def planned(
    workload: Workload,
    direction: str,
    masks: LazyMasks,
    variants: Sequence[Variant],
    settings: Settings,
    inputs: Inputs,
) -> Iterator[Entry]:
    for variant in variants:
        if settings.device.type not in variant.devices or (variant.packed_only and not workload.packed):
            continue
        for mask in settings.masks:
            if mask not in variant.masks:
                continue
            for bits in variant.bits_on(workload, direction):
                entry = Entry(variant, Case(workload, direction, mask, inputs, bits=bits), masks.layers(mask))
                if variant.compiles and (direction, mask) not in workload.compiled:
                    no_backward = settings.device.type == "cpu" and direction != FORWARD
                    entry.reason = _NO_BACKWARD if no_backward else _COMPILES
                yield entry


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:
                _say(f"the device reports: {reason_of(error)}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
