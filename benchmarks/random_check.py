"""Compares the kernels of a backend with float64 on random calls: `python -m benchmarks.random_check --help`.

Forward and, where there is one, backward, every case twice: results must be within their error budgets, complete (the
memory they are written to is filled with NaN first), zero where there is nothing to attend to, and the same bits both
times. A case depends on its number, the seed and the backend alone: `--only NUMBER` runs it again. Failures are printed
as they come; an interrupt ends with the summary of what was done.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch

from sparse_attn.backends import native_cpu, native_cuda
from sparse_attn.backends.triton import NOT_INSTALLED, TRITON_INSTALLED, interpreting

from . import BEGUN
from .device import describe_device, pick_device, spare_processors, start_worker
from .options import OneLineParser, at_least, fail, positive
from .random_cases import TARGETS, Target, draw, kind_number
from .random_compare import Checked, check

_LAST_CASE_SECONDS = 10.0  # before the end no case is begun: so long may one take, with what it compiles


def check_many(
    numbers: Sequence[int], seed: int, target: Target, device: torch.device, end: float
) -> Iterator[Checked]:
    """Runs cases one after the other; begins none after `end` (of time.time()). A case that raises has failed."""
    for number in numbers:
        if time.time() > end:
            return
        try:
            yield check(draw(number, seed, target), device)
        except Exception as error:
            yield Checked(number, (f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",))
            if _broken(device):
                return


def _broken(device: torch.device) -> bool:
    """Whether the device computes nothing any more for this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def check_in_processes(
    numbers: Sequence[int], processes: int, seed: int, target: Target, device: torch.device, end: float, stop: float
) -> Iterator[Checked]:
    """Cases in the order in which they are done, those of a kind in one process, which has compiled its kernels. Begins
    none after `end`, and waits for none after `stop`."""
    kinds = [list(cases) for _, cases in itertools.groupby(numbers, kind_number)]
    check_kind = functools.partial(_check_kind, seed=seed, target=target, device=device, end=end)
    pools = multiprocessing.get_context("spawn")
    # A process for each kind: one that has broken its device gets no other.
    with pools.Pool(min(processes, len(kinds)), initializer=start_worker, maxtasksperchild=1) as pool:
        results = pool.imap_unordered(check_kind, kinds)
        for _ in kinds:
            try:
                yield from results.next(max(0.0, stop - time.time()))
            except multiprocessing.TimeoutError:
                print("a process has not answered; its cases count as not run", file=sys.stderr)
                return


def _check_kind(numbers: Sequence[int], seed: int, target: Target, device: torch.device, end: float) -> list[Checked]:
    if time.time() > end:
        return []
    return list(check_many(numbers, seed, target, device, end))


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = OneLineParser(
        prog="python -m benchmarks.random_check",
        description="Compares the kernels of a backend with float64 on random calls, forward and backward.",
    )
    parser.add_argument("--backend", choices=("triton", "native"), default="triton", help="(default: %(default)s)")
    parser.add_argument("--cases", type=at_least(1), default=500, help="(default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="(default: %(default)s)")
    parser.add_argument("--only", type=at_least(0), metavar="NUMBER", help="this case alone, described")
    parser.add_argument("--minutes", type=positive, default=60.0, help="for everything (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--processes", type=at_least(1), help="(default: 1, on a GPU two fewer than processors, 14 at most)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, begun: float | None = None) -> int:
    """Returns the exit status: 2 for input of no use, 1 if a case failed or was not run, because the time was over or
    after an interrupt. `begun` is when the process did, in time.time(), and by default now."""
    start = begun or time.time()
    options = parse_options(arguments)
    try:
        device = _usable_device(options.backend, options.device)
    except ValueError as error:
        return fail("random_check", error, status=2)
    target = TARGETS[options.backend, device.type]
    numbers = list(range(options.cases)) if options.only is None else [options.only]
    done: list[Checked] = []
    try:
        for one in _checked(numbers, options, target, device, start):
            done.append(one)
            if one.failures:
                _print_failures(one, options, target)
    except KeyboardInterrupt:
        print("interrupted; what was not done counts as not run", file=sys.stderr)
    failed = sum(bool(one.failures) for one in done)
    if options.only is not None and not failed:
        print(draw(options.only, options.seed, target).describe())
    print(
        f"{options.backend}, {describe_device(device)}: {len(done)} of {len(numbers)} random cases run, "
        f"{failed} failed, at most {max((one.share for one in done), default=0.0):.0%} of an error budget used, "
        f"{time.time() - start:.0f} s"
    )
    return int(bool(failed) or len(done) < len(numbers))


def _checked(
    numbers: Sequence[int], options: Namespace, target: Target, device: torch.device, start: float
) -> Iterator[Checked]:
    processes, seconds = options.processes, 60 * options.minutes
    if processes is None:
        processes = spare_processors() if device.type == "cuda" else 1
    stop = start + seconds
    end = stop - min(_LAST_CASE_SECONDS, seconds / 8)
    if processes == 1 or len(numbers) == 1:
        return check_many(numbers, options.seed, target, device, end)
    return check_in_processes(numbers, processes, options.seed, target, device, end, stop)


def _print_failures(one: Checked, options: Namespace, target: Target) -> None:
    again = f"--backend {options.backend} --seed {options.seed} --only {one.number}"
    print(
        draw(one.number, options.seed, target).describe(),
        *(f"    {failure}" for failure in one.failures),
        f"    again: python -m benchmarks.random_check {again}",
        sep="\n",
        flush=True,
    )


def _usable_device(backend: str, name: str | None) -> torch.device:
    """Raises ValueError where the kernels do not run."""
    device = pick_device(name)
    if backend == "native":
        if not (native_cpu.instruction_sets() if device.type == "cpu" else native_cuda.built()):
            raise ValueError(f"the extension has no kernels for {device.type}; python -m sparse_attn.doctor says why")
        return device
    if not TRITON_INSTALLED:
        raise ValueError(NOT_INSTALLED)
    if device.type == "cpu" and not interpreting():
        raise ValueError(
            "on a CPU only Triton's interpreter runs the kernels; set TRITON_INTERPRET=1, or pass --backend native"
        )
    return device


if __name__ == "__main__":
    sys.exit(main(begun=BEGUN))
