"""Which configuration a kernel runs with on a GPU, and which kernel is faster: data in tuning/*.json, one table per GPU
and a default.

This module needs no Triton, so that a backend can choose a layout for a kernel without importing it.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

MAX_HEAD_DIM = 256
KERNELS = ("forward", "grad_query", "grad_key_value")
TABLES = Path(__file__).with_name("tuning")


@dataclass(frozen=True)
class KernelConfig:
    """How a kernel is cut.

    Attributes:
        rows: queries in a group (keys, where the mask is transposed).
        columns: list entries a step.
        held: the forward kernel takes lists of at most this many entries in one step, which holds their scores in
            registers; 0 for none. A power of two.
        split: the columns that all rows keep come in a part of their own, walked without a bit test.
        num_warps, num_stages: of the program, and of the pipeline over the list.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    held: int = 0
    split: bool = False


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen by.

    Attributes:
        kernel: one of KERNELS; the native kernels have "backward" in place of the last two.
        rounded: whether the forward kernel rounds probabilities; false for the others.
        head_dim, element_bytes: of query, key and value.
        key_len: keys that the mask covers.
        spread: how much more work groups of 64 queries do than groups of 16, `work(64) / work(16)` of the layout: from
            1 (neighbouring queries keep the same keys) to 4 (they keep different ones).
    """

    kernel: str
    rounded: bool
    head_dim: int
    element_bytes: int
    key_len: int
    spread: float

    def distance(self, other: Problem) -> float:
        """How far two problems are apart where their kernel and element type agree, in doublings."""
        return abs(math.log2(self.key_len / other.key_len)) + 2 * abs(math.log2(self.spread / other.spread))


@dataclass(frozen=True)
class BlockConfig:
    """How a CUDA kernel is cut.

    Attributes:
        warps: of a block, of which a multiprocessor holds one.
        parts: in how many parts the queries of a head are computed, each with all its keys; at least so many that every
            multiprocessor has some.
        faster: whether `backend="auto"` prefers it to the Triton kernel, being measured to be faster; for "backward",
            together with the forward pass.
    """

    warps: int
    parts: int = 1
    faster: bool = False


@dataclass(frozen=True)
class TuningTable:
    """Configurations that were found best on one device, each for the problem that it was found for.

    Attributes:
        device: its name.
        entries: of the Triton kernels.
        native: of the native kernels, whose problems are "forward" and "backward".
        architecture: of the device, as `architecture_of` tells it.
    """

    device: str
    entries: tuple[tuple[Problem, KernelConfig], ...]
    native: tuple[tuple[Problem, BlockConfig], ...] = ()
    architecture: str = ""

    def nearest(self, problem: Problem) -> KernelConfig | None:
        """The configuration for the nearest problem of the same kernel, rounding and element size whose head_dim is the
        smallest that is not smaller; None if there is none."""
        return _nearest(self.entries, problem)

    def nearest_native(self, problem: Problem) -> BlockConfig | None:
        """The same for the native kernel."""
        return _nearest(self.native, problem)


Config = TypeVar("Config")


def _nearest(entries: Sequence[tuple[Problem, Config]], problem: Problem) -> Config | None:
    usable = [
        (known, config)
        for known, config in entries
        if (known.kernel, known.rounded, known.element_bytes)
        == (problem.kernel, problem.rounded, problem.element_bytes)
        and known.head_dim >= problem.head_dim
    ]
    if not usable:
        return None
    return min(usable, key=lambda entry: (entry[0].head_dim, entry[0].distance(problem)))[1]


def read_table(path: str | os.PathLike) -> TuningTable:
    """Reads a table that `benchmarks.tune` wrote. Raises ValueError for a file that is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = tuple((_pick(Problem, entry), _pick(KernelConfig, entry)) for entry in content["entries"])
        native = tuple((_pick(Problem, entry), _pick(BlockConfig, entry)) for entry in content.get("native", ()))
        return TuningTable(content["device"], entries, native, content["architecture"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a tuning table ({type(error).__name__}: {error}); `python -m benchmarks.tune` writes one"
        ) from error


def entry(problem: Problem, config: KernelConfig | BlockConfig, **measured: object) -> dict[str, object]:
    """One entry of a table's JSON."""
    return {**asdict(problem), **asdict(config), **measured}


def table_name(device: str) -> str:
    """The name of the file that holds the table of a device: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def architecture_of(device: torch.device) -> str:
    """What programs for a GPU are compiled for: "sm_90" for an H100 and for an H200; "gfx942"."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def default_table() -> TuningTable:
    """What serves where nothing was measured."""
    return read_table(TABLES / "default.json")


@cache
def _measured_tables() -> tuple[TuningTable, ...]:
    return tuple(read_table(path) for path in sorted(TABLES.glob("*.json")) if path.name != "default.json")


_used: dict[str, TuningTable] = {}


def use_table(table: TuningTable) -> None:
    """Takes configurations from `table` on its device ("cpu" is Triton's interpreter) from now on, for layouts that no
    kernel has used yet."""
    _used[table.device] = table


def choose(problem: Problem, device: torch.device) -> KernelConfig:
    """The configuration for `problem`: from the device's table (see `table_of`), or else, on a GPU with one warning,
    from the default one.

    Raises ValueError for a head_dim that no configuration holds.
    """
    table = table_of(device)
    if table is None and device.type == "cuda":
        _warn_untuned(_name(device))
    config = (table.nearest(problem) if table else None) or default_table().nearest(problem)
    if config is None:
        raise ValueError(
            f"no configuration of {problem.kernel} for head_dim {problem.head_dim} with {problem.element_bytes}-byte "
            f"elements; the largest head_dim is {MAX_HEAD_DIM}"
        )
    return config


# What serves where nothing was measured: as many warps as a multiprocessor has registers or shared memory for.
_DEFAULT_BLOCKS = {"forward": BlockConfig(12), "backward": BlockConfig(8)}


def choose_native(problem: Problem, device: torch.device) -> BlockConfig:
    """The configuration of the native kernels for `problem` on a GPU: from its table if that has been measured."""
    table = table_of(device)
    return (table.nearest_native(problem) if table else None) or _DEFAULT_BLOCKS[problem.kernel]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def table_of(device: torch.device) -> TuningTable | None:
    """The table of a device: the one in use, or else the package's for it, or else, since they run the same programs,
    the package's for another GPU of its architecture. None if there is none."""
    name = _name(device)
    if name in _used:
        return _used[name]
    measured = {table.device: table for table in _measured_tables()}
    if name in measured or device.type != "cuda":
        return measured.get(name)
    architecture = architecture_of(device)
    return next((table for table in measured.values() if table.architecture == architecture), None)


@cache
def _warn_untuned(device: str) -> None:
    warnings.warn(
        f"the kernels have not been tuned for {device}: default configurations are used, which are correct and may be "
        "slow. `python -m benchmarks.tune` in the project's repository writes a table for this GPU",
        stacklevel=2,
    )


def _pick(kind: type, values: dict[str, object]):
    return kind(**{field.name: values[field.name] for field in fields(kind)})
