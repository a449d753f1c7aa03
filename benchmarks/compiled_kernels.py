"""What compilers made of the kernels for chips that need not be at hand: read, written and shown.

benchmarks/results/kernels-triton-<version>.csv records all shipped configurations of the Triton kernels, kernels-nvcc-
<version>.csv the CUDA kernels. `python -m benchmarks.kernel_report --update` and `cuda_report --update` write them; the
tests compile what they lack.
"""

from __future__ import annotations

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from .device import ROOT
from .pages import complete_files, table_lines

_RECORDS = ROOT / "benchmarks" / "results"
_SOURCE = "# source of "  # begins a line of a record
# Shared memory that one block can have, in bytes.
SHARED_LIMITS = {
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536,
}  # fmt: skip
_COLUMNS = ("table", "chip", "kernel", "compiled", "registers", "shared memory", "that spill", "most spilled bytes")


@dataclass(frozen=True)
class Compiled:
    """What came out for one configuration (`rows` to `num_stages`: those of `KernelConfig`).

    Attributes:
        identity: of all that the compiler was given but the kernel's source.
        table: the tuning table that has the configuration.
        registers, spilled_bytes: of a thread.
        shared_bytes: shared memory of a block.
        matrix: the instructions of the matrix unit, separated by spaces.
    """

    identity: str
    table: str
    kernel: str
    variant: str
    target: str
    head_dim: int
    dtype: str
    rows: int
    columns: int
    held: int
    split: int
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix: str


@dataclass(frozen=True)
class CompiledByNvcc:
    """A CUDA kernel as its template says ("Forward<...>"), compiled for an architecture ("90").

    Attributes:
        registers, spilled_bytes: of a thread.
        instructions: which it has of those it was made for, separated by spaces.
    """

    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int
    instructions: str


@dataclass(frozen=True)
class Record:
    """What was compiled from which sources: `sources` has an identity for each kernel, or for all that nvcc compiles;
    the compiler is part of it."""

    sources: dict[str, str]
    compiled: list

    def known(self, sources: dict[str, str]) -> dict[tuple[str, str], Compiled]:
        """What was compiled from the same sources, by kernel and identity."""
        same = [one for one in self.compiled if self.sources.get(one.kernel) == sources[one.kernel]]
        return {(one.kernel, one.identity): one for one in same}


def record_path(version: str, compiler: str = "triton") -> Path:
    return _RECORDS / f"kernels-{compiler}-{version}.csv"


def read_record(path: Path, kind: type = Compiled) -> Record:
    """What `write_record` wrote; empty if there is no such file."""
    if not path.exists():
        return Record({}, [])
    number = {one.name: one.type == "int" for one in fields(kind)}
    lines = path.read_text(encoding="utf-8").splitlines()
    sources = dict(line.removeprefix(_SOURCE).split(": ") for line in lines if line.startswith(_SOURCE))
    rows = csv.DictReader(line for line in lines if not line.startswith(_SOURCE))
    cells = [{name: int(cell) if number[name] else cell for name, cell in row.items()} for row in rows]
    return Record(sources, [kind(**row) for row in cells])


def write_record(record: Record, path: Path) -> None:
    """A line for each source, then a table with a line for each kernel or configuration."""
    with (
        complete_files(path.parent) as unfinished,
        (unfinished / path.name).open("w", newline="", encoding="utf-8") as file,
    ):
        file.writelines(f"{_SOURCE}{kernel}: {identity}\n" for kernel, identity in record.sources.items())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(one.name for one in fields(record.compiled[0]))
        writer.writerows(astuple(one) for one in record.compiled)


def compiled_section(folder: Path) -> str:
    """Markdown of what the records in `folder` say: a line for each table, chip and kernel."""
    lines = []
    for path in sorted(folder.glob("kernels-triton-*.csv")):
        results = read_record(path).compiled
        groups = dict.fromkeys((one.table, one.target, one.kernel) for one in results)
        rows = [_row([one for one in results if (one.table, one.target, one.kernel) == group]) for group in groups]
        lines += [f"Triton {path.stem.removeprefix('kernels-triton-')}:", ""]
        lines += [*table_lines(_COLUMNS, rows, text_columns=3), ""]
        lines += [f"File: [{path.name}](../benchmarks/results/{path.name})", ""]
    return "\n".join(lines)


def _row(results: list[Compiled]) -> list[str]:
    first = results[0]
    spilling = {one.head_dim: one.spilled_bytes for one in sorted(results, key=lambda one: one.spilled_bytes)}
    worst = [f"{spilling[one]} at {one}" for one in sorted(spilling) if spilling[one]]
    shared = max(one.shared_bytes for one in results) / SHARED_LIMITS[first.target]
    counts = len(results), max(one.registers for one in results)
    spills = sum(one.spilled_bytes > 0 for one in results), ", ".join(worst) or "0"
    return [first.table, first.target, f"`{first.kernel}`", *map(str, counts), f"{shared:.0%}", *map(str, spills)]
