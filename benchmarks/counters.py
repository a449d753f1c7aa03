"""Hardware counters of this package's kernels on an NVIDIA GPU: `python -m benchmarks.counters --json OUT`.

Nsight Compute (ncu) runs the calls of `benchmarks.counted_calls` and counts what each kernel asks of memory, caches,
matrix units and schedulers. Prints a table; --json writes it, and beside it, as .csv, all that ncu counted.
"""

from __future__ import annotations

import csv
import math
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .attention_workloads import WORKLOADS
from .device import ROOT, circumstances, no_gpu
from .options import OneLineParser, fail, file_to_write
from .pages import ABSENT, Table, write_json

PROFILER = "ncu"
COLUMNS = (
    "call", "kernel", "us", "memory", "of memory", "L2", "of L2", "of L1", "matrix units", "issued", "bank conflicts",
    "warps", "registers", "waits for",
)  # fmt: skip
# What is shown -> the counters whose sum it is, and what that is multiplied by.
_COUNTERS = {
    "memory_bytes": (("dram__bytes_read.sum", "dram__bytes_write.sum"), 1.0),
    "memory_share": (("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",), 0.01),
    # Of the multiprocessors' requests: what one half of the cache asks of the other is not among them.
    "l2_bytes": (("lts__t_sectors_srcunit_tex_op_read.sum", "lts__t_sectors_srcunit_tex_op_write.sum"), 32.0),
    "l2_share": (("lts__throughput.avg.pct_of_peak_sustained_elapsed",), 0.01),
    "l1_share": (("l1tex__throughput.avg.pct_of_peak_sustained_active",), 0.01),
    "matrix_share": (("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",), 0.01),
    "issued_share": (("smsp__issue_active.avg.pct_of_peak_sustained_active",), 0.01),
    "bank_conflicts": (("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",), 1.0),
    "shared_wavefronts": (("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",), 1.0),
    "active_warps_share": (("sm__warps_active.avg.pct_of_peak_sustained_active",), 0.01),
    "registers": (("launch__registers_per_thread",), 1.0),
}
_TIME = "gpu__time_duration.sum"
_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
_RANGE = re.compile(r"<default domain>:([^:]+):")
_COMPUTING = re.compile(r"\b(Forward|QueryGradient|KeyGradient)(?:Warp)?\b")
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)(?<!_not_issued)_per_issue_active\.ratio")
_SHOWN_STALLS = 2
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats")
_LAST_SECONDS = 8.0  # after an interrupt


def parse_options(arguments: list[str] | None = None) -> Namespace:
    """The options; a bad one ends the program with one line on stderr and exit status 2."""
    parser = OneLineParser(
        prog="python -m benchmarks.counters",
        description="Counts, by Nsight Compute, what this package's attention kernels ask of a GPU.",
    )
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workload", choices=names, default="squad384", help="(default: %(default)s)")
    parser.add_argument("--json", type=file_to_write, metavar="OUT", required=True, help="file for the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Counts. Returns the exit status: 2 for a machine that cannot, 1 where nothing was counted."""
    options = parse_options(arguments)
    try:
        device = _gpu()
    except ValueError as error:
        return fail("counters", error, status=2)
    counted = options.json.with_suffix(".csv")
    counted.unlink(missing_ok=True)
    counted.parent.mkdir(parents=True, exist_ok=True)
    status = _run_to_its_end(profiler_command(options.workload, counted))
    rows = [result_row(one) for one in read_counters(counted)]
    if not rows:
        reasons = " ".join(_errors(counted)) or "it does not say why"
        return fail("counters", f"{PROFILER} counted nothing (exit status {status}): {reasons}", status=1)
    results = {**circumstances(device), "workload": options.workload, "dtype": "float16", "rows": rows}
    write_json(results, options.json)
    table(results).print()
    return int(status != 0)


def _run_to_its_end(command: list[str]) -> int:
    """The exit status. An interrupt reaches the command too, which gets time to write down what it has counted."""
    with subprocess.Popen(command, cwd=ROOT) as running:
        try:
            return running.wait()
        except KeyboardInterrupt:
            try:
                return running.wait(_LAST_SECONDS)
            except subprocess.TimeoutExpired:
                running.kill()
                return running.wait()


def _gpu() -> torch.device:
    """The GPU to count on. Raises ValueError where nothing can be counted."""
    if not torch.cuda.is_available():
        raise ValueError(f"{no_gpu()}; run this on a machine with an NVIDIA GPU")
    if reason := no_profiler():
        raise ValueError(reason)
    return torch.device("cuda")


def no_profiler() -> str:
    """Why nothing can be counted, or ""."""
    return "" if shutil.which(PROFILER) else f"there is no {PROFILER} (Nsight Compute) on the search path"


def profiler_command(workload: str, counted: Path) -> list[str]:
    """Counts in the range of each call alone; caches are flushed before each kernel, clocks stay as they are."""
    metrics = [_TIME, *(name for names, _ in _COUNTERS.values() for name in names)]
    sections = (word for section in _SECTIONS for word in ("--section", section))
    return [
        PROFILER, *sections, "--metrics", ",".join(metrics), "--nvtx", "--profile-from-start", "off",
        "--target-processes", "application-only", "--clock-control", "none", "--csv", "--page", "raw",
        "--print-units", "base", "--log-file", str(counted.absolute()),
        sys.executable, "-m", "benchmarks.counted_calls", workload,
    ]  # fmt: skip


def read_counters(path: Path) -> list[dict[str, tuple[str, str]]]:
    """(value, unit) of each counter, for every kernel of a file that ncu wrote: messages, names, units, and rows."""
    table = list(csv.reader(line for line in _lines(path) if line.startswith('"')))
    if len(table) < 2:
        return []
    names, units, *rows = table
    return [dict(zip(names, zip(row, units))) for row in rows]


def _errors(path: Path) -> list[str]:
    """What ncu says of why it could not count."""
    return [line.removeprefix("==ERROR==").strip() for line in _lines(path) if line.startswith("==ERROR==")]


def _lines(path: Path) -> list[str]:
    """What ncu wrote; nothing where it did not get that far."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def result_row(counters: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """What is shown of a kernel. None stands for what this version of ncu does not count on this GPU."""
    found = {
        field: _sum([_number(counters.get(name)) for name in names], factor)
        for field, (names, factor) in _COUNTERS.items()
    }
    stalls = {match[1]: _number(counters[name]) for name in counters if (match := _STALL.fullmatch(name))}
    stalls.pop("selected", None)  # issues, and does not wait
    time = counters.get(_TIME)
    return {
        "call": next((match[1] for value, _ in counters.values() if (match := _RANGE.search(value))), None),
        "kernel": kernel_name(counters["Kernel Name"][0]),
        "microseconds": _sum([_number(time)], _MICROSECONDS[time[1]]) if time and time[1] in _MICROSECONDS else None,
        **found,
        "stalls": dict(sorted(stalls.items(), key=lambda stall: stall[1] or 0.0, reverse=True)),
    }


def kernel_name(signature: str) -> str:
    """A function's name without namespaces; the CUDA kernels are one template, named with what computes in it."""
    signature = signature.removeprefix("void ").replace("<unnamed>::", "").replace("(anonymous namespace)::", "")
    name, _, arguments = signature.partition("<")
    computing = _COMPUTING.search(arguments)
    return name.partition("(")[0].rpartition("::")[2].strip() + (f"<{computing[1]}>" if computing else "")


def table(results: dict[str, Any]) -> Table:
    """The rows as they are shown."""
    return Table(
        title=f"{results['device']}: {results['workload']}, {results['dtype']}",
        columns=COLUMNS,
        rows=[_cells(row) for row in results["rows"]],
        text_columns=2,
    )


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(value: float | None, form: str, unit: float = 1.0) -> str:
        return ABSENT if value is None else form.format(value / unit)

    conflicts, wavefronts = row["bank_conflicts"], row["shared_wavefronts"]
    stalls = [f"{name} {cycles:.1f}" for name, cycles in row["stalls"].items() if cycles][:_SHOWN_STALLS]
    return [
        row["call"] or ABSENT,
        f"`{row['kernel']}`",
        shown(row["microseconds"], "{:.1f}"),
        shown(row["memory_bytes"], "{:.1f} MB", 1e6),
        shown(row["memory_share"], "{:.0%}"),
        shown(row["l2_bytes"], "{:.1f} MB", 1e6),
        *(shown(row[name], "{:.0%}") for name in ("l2_share", "l1_share", "matrix_share", "issued_share")),
        ABSENT if not wavefronts else shown(conflicts, "{:.0%}", wavefronts),
        shown(row["active_warps_share"], "{:.0%}"),
        shown(row["registers"], "{:.0f}"),
        ", ".join(stalls) or ABSENT,
    ]


def _sum(values: Sequence[float | None], factor: float) -> float | None:
    return None if None in values else factor * sum(values)


def _number(counter: tuple[str, str] | None) -> float | None:
    """A counter's value; None where there is none, which ncu writes as n/a or (!) n/a."""
    try:
        value = float(counter[0].replace(",", "")) if counter else math.nan
    except ValueError:
        return None
    return None if math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
