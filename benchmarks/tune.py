"""Tunes the kernels for this machine's GPU: `python -m benchmarks.tune --help`.

For each problem, the most important ones first, it compiles candidate configurations in parallel, drops those that fail
or compute something else, times the others and writes the fastest into kernels/tuning/<gpu>.json, where the package
finds it. The file is complete after every problem. A candidate that breaks the GPU for this process is noted there, and
never tried again; a new process tunes the rest.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparse_attn.backends.triton import NOT_INSTALLED, TRITON_INSTALLED, interpreting
from sparse_attn.kernels.configuration import TABLES, architecture_of, table_name

from .device import no_gpu, spare_processors
from .options import OneLineParser, at_least, fail, file_to_write, names, positive
from .tuning.problems import PROBLEMS, TuningProblem

if TYPE_CHECKING:
    from .tuning.sweep import DeviceBroken, Tuned
    from .tuning.table import TableFile

_START_SECONDS = 120.0
_LEAST_SECONDS = 30.0  # to begin again: importing takes most of that


def parse_options(arguments: list[str] | None = None) -> Namespace:
    """The options; a bad one ends the program with one line on stderr and exit status 2."""
    parser = OneLineParser(
        prog="python -m benchmarks.tune",
        description="Finds the fastest configuration of every kernel on this machine's GPU and writes them to a table.",
        epilog="Problems, the most important first: " + ", ".join(problem.name for problem in PROBLEMS),
    )
    parser.add_argument(
        "--minutes", type=positive, default=7.5, help="for all problems together (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=file_to_write,
        metavar="FILE",
        help="default: kernels/tuning/<gpu>.json, where the package finds it",
    )
    parser.add_argument(
        "--problems", type=names, help="names or patterns like 'forward-*', by commas (default: all, listed below)"
    )
    parser.add_argument(
        "--processes", type=at_least(1), default=spare_processors(),
        help="that compile (default: %(default)s)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def chosen_problems(patterns: list[str] | None) -> list[TuningProblem]:
    """Problems whose names match any pattern, in the order of importance. Raises ValueError for a useless pattern."""
    if patterns is None:
        return list(PROBLEMS)
    for pattern in patterns:
        if not any(fnmatchcase(problem.name, pattern) for problem in PROBLEMS):
            raise ValueError(f"--problems: {pattern!r} matches no problem; --help lists them")
    return [problem for problem in PROBLEMS if any(fnmatchcase(problem.name, pattern) for pattern in patterns)]


def main(arguments: list[str] | None = None) -> int:
    """Tunes. Returns the exit status: 2 for input of no use, 1 where a problem could not be tuned."""
    end = time.monotonic()
    options = parse_options(arguments)
    end += 60 * options.minutes
    try:
        device, problems = _gpu(), chosen_problems(options.problems)
    except ValueError as error:
        return fail("tune", error, status=2)
    from .tuning.sweep import DeviceBroken  # these import Triton
    from .tuning.table import TableFile, line, print_outcomes

    name = torch.cuda.get_device_name(device)
    path = options.output or TABLES / table_name(name)
    try:
        table = TableFile(path, name, architecture_of(device))
    except (ValueError, OSError) as error:
        return fail("tune", error, status=2)
    outcomes, status, broken = [], 0, None
    try:
        for tuned in _tuned(device, problems, options.processes, end, table):
            outcomes.append(tuned)
            if tuned.found is not None:
                table.add(tuned)
            _say(f"{len(outcomes)} of {len(problems)}, {end - time.monotonic():.0f} s left. {line(tuned)}")
    except DeviceBroken as error:
        status, broken = fail("tune", error, status=1), error
    except RuntimeError as error:  # all compiling processes are lost; what was found is written
        status = fail("tune", error, status=1)
    print_outcomes(outcomes)
    if broken is not None:
        done = {tuned.tuned for tuned in outcomes}
        _begin_again(broken, [one for one in problems if one not in done], table, path, options.processes, end)
    if len(outcomes) < len(problems):
        why = "" if status else ", for want of time"
        print(f"not tuned: {len(problems) - len(outcomes)} of {len(problems)} problems{why}")
    print(f"{path}: entries written: {sum(tuned.found is not None for tuned in outcomes)}")
    return status or int(not outcomes or any(tuned.found is None for tuned in outcomes))


def _begin_again(
    broken: DeviceBroken, left: list[TuningProblem], table: TableFile, path: Path, processes: int, end: float
) -> None:
    """Tunes what is left in a process that can use the GPU, which takes the place of this one. Returns where there is
    nothing left, or no time."""
    if broken.problem is not None and broken.config is not None:
        table.add_broken(broken.problem, broken.config, str(broken))
    else:
        left = [problem for problem in left if problem != broken.tuned]
    seconds = end - time.monotonic()
    if not left or seconds < _LEAST_SECONDS:
        return
    _say(f"beginning again in a new process, {len(left)} problems left")
    names = ",".join(problem.name for problem in left)
    options = {"--minutes": f"{seconds / 60:.3f}", "--problems": names, "--output": path, "--processes": processes}
    words = [str(word) for option in options.items() for word in option]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.tune", *words])


def _tuned(
    device: torch.device, problems: list[TuningProblem], processes: int, end: float, table: TableFile
) -> Iterator[Tuned]:
    from .tuning.bench import Bench, Layouts
    from .tuning.compiling import CompilePool
    from .tuning.sweep import Sweep, device_measure

    layouts, properties = Layouts(device), torch.cuda.get_device_properties(device)
    shared_limit = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    with CompilePool(processes) as compiler:
        layouts.of(problems[0])  # meanwhile, the processes start
        compiler.wait_until_started(_START_SECONDS)
        sweep = Sweep(
            lambda problem: Bench(problem, device, layouts.of(problem)), compiler, device_measure(device), shared_limit,
            broke=table.broke,
        )  # fmt: skip
        gc.freeze()  # making a CUDA graph may collect garbage: not among all that is imported, a thousand times
        try:
            yield from sweep.run(problems, end - time.monotonic())
        finally:
            gc.unfreeze()


def _gpu() -> torch.device:
    """Raises ValueError where the kernels cannot be compiled and run on a GPU."""
    if not torch.cuda.is_available():
        raise ValueError(f"{no_gpu()}; tune on a machine with the GPU that the table is for")
    if not TRITON_INSTALLED:
        raise ValueError(NOT_INSTALLED)
    if interpreting():
        raise ValueError("TRITON_INTERPRET is set, so kernels would not run on the GPU; unset it")
    return torch.device("cuda", torch.cuda.current_device())


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
