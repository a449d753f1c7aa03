"""The table that tuning writes, and what it prints."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sparse_attn.kernels.configuration import BlockConfig, KernelConfig, Problem, entry, read_table

from ..device import commit, versions
from ..pages import ABSENT
from .sweep import Tuned

_WIDTH = 120
_KIND = ("kernel", "rounded", "head_dim", "element_bytes")  # of problems that one program computes
_SAME = 0.1  # problems that are no further apart, in doublings, have one entry


class TableFile:
    """A tuning table, written anew after every problem. Entries of problems that are not tuned again stay.

    Args:
        path: of the file, which need not be there.
        device: name of the GPU.
        architecture: of the GPU.

    Raises:
        ValueError: the file is no tuning table, or that of another device.
    """

    def __init__(self, path: Path, device: str, architecture: str):
        self._path, self._device, self._architecture = path, device, architecture
        self._entries: list[dict[str, Any]] = []
        self._native: list[dict[str, Any]] = []
        self._broken: list[dict[str, Any]] = []
        self._commit = commit()
        if path.exists():
            other = read_table(path).device
            if other != device:
                raise ValueError(f"{path} holds the table of {other}, this is {device}; choose another --output")
            content = json.loads(path.read_text(encoding="utf-8"))
            self._entries, self._native = content["entries"], content.get("native", [])
            self._broken = content.get("broken", [])

    def add(self, tuned: Tuned) -> None:
        """Enters what was found, in the place of an entry for the same problem, and writes the file."""
        problem, found = tuned.problem, tuned.found
        default = found.default_milliseconds
        runner_up = None
        if found.runner_up is not None:
            runner_up = {**asdict(found.runner_up[0]), "p50_ms": round(found.runner_up[1], 6)}
        self._entries = [known for known in self._entries if not _same(known, problem)]
        self._entries.append(
            entry(
                problem,
                found.winner,
                p50_ms=round(found.milliseconds, 6),
                default_p50_ms=default and round(default, 6),
                tuned_on=tuned.tuned.name,
                layers=tuned.layers,
                tried=found.tried,
                failed=sum(found.failed.values()),
                runner_up=runner_up,
                commit=self._commit,
            )
        )
        self._write()

    def add_native(self, problem: Problem, config: BlockConfig, milliseconds: float, triton: float, on: str) -> None:
        """Enters the native kernel's best configuration and the time of the Triton kernel beside it."""
        self._native = [known for known in self._native if not _same(known, problem)]
        times = {"p50_ms": round(milliseconds, 6), "triton_p50_ms": round(triton, 6)}
        self._native.append(entry(problem, config, **times, tuned_on=on, commit=self._commit))
        self._write()

    def add_broken(self, problem: Problem, config: KernelConfig, reason: str) -> None:
        """Enters a configuration after which the GPU computed nothing any more for the process that ran it."""
        self._broken.append({**_program(problem, config), "reason": reason})
        self._write()

    def broke(self, problem: Problem, config: KernelConfig) -> bool:
        """Whether `add_broken` knows the configuration, compiled by this version of Triton."""
        program = _program(problem, config)
        return any(program.items() <= known.items() for known in self._broken)

    def _write(self) -> None:
        head = {
            "device": self._device,
            "architecture": self._architecture,
            "commit": self._commit,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
        }
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        for name, entries in (("entries", self._entries), ("native", self._native), ("broken", self._broken)):
            if not entries and name != "entries":
                continue
            listed = ",\n".join(f"    {json.dumps(one)}" for one in entries)
            lines.append(f'  "{name}": [\n{listed}\n  ]')
        text = ",\n".join(lines)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f".{self._path.name}.unfinished")
        unfinished.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
        os.replace(unfinished, self._path)


def _same(known: dict[str, Any], problem: Problem) -> bool:
    other = Problem(**{name: known[name] for name in Problem.__dataclass_fields__})
    return _kind(other) == _kind(problem) and other.distance(problem) < _SAME


def _kind(problem: Problem) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in _KIND}


def _program(problem: Problem, config: KernelConfig) -> dict[str, Any]:
    """What one compiled program is known by."""
    return {**_kind(problem), **asdict(config), "triton": versions()["triton"]}


def short(config: KernelConfig) -> str:
    """For example "64 x 32, 4 warps, 3 stages"."""
    parts = [f"{config.rows} x {config.columns}", f"{config.num_warps} warps", f"{config.num_stages} stages"]
    parts += [f"holds {config.held}"] if config.held else []
    return ", ".join([*parts, "split"] if config.split else parts)


def line(tuned: Tuned) -> str:
    """An outcome in one line."""
    name, winner, microseconds, default, speed_up, tried, _ = _cells(tuned)
    if tuned.found is None:
        return f"{name}: {winner}"
    return f"{name}: {winner}: {microseconds} us, default {default} us, {speed_up}, {tried} tried"


def print_outcomes(outcomes: Sequence[Tuned]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fastest configurations (medians, for all layers that were timed together)", width=_WIDTH)
    for name in ("problem", "winner"):
        table.add_column(name, overflow="fold")
    for name in ("us", "default us", "speed-up", "tried", "failed"):
        table.add_column(name, justify="right")
    for tuned in outcomes:
        table.add_row(*_cells(tuned))
    Console(width=_WIDTH).print(table)


def _cells(tuned: Tuned) -> list[str]:
    found, name = tuned.found, tuned.tuned.name
    if found is None:
        return [name, tuned.reason, "", "", "", "", ""]
    default = found.default_milliseconds
    winner = "default: " if found.winner == tuned.default else ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.failed.items())
    return [
        name,
        winner + short(found.winner),
        f"{1e3 * found.milliseconds:.1f}",
        ABSENT if default is None else f"{1e3 * default:.1f}",
        ABSENT if default is None else f"{default / found.milliseconds:.2f}x",
        str(found.tried),
        reasons or "0",
    ]
