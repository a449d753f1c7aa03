"""Compares the kernels of a backend with float64 on random calls: `python -m benchmarks.random_check --help`.

Forward and, where there is one, backward, every case twice: results must be within their error budgets, complete (the
memory they are written to is filled with NaN first), zero where there is nothing to attend to, and the same bits both
times. A case depends on its number, the seed and the backend alone: `--only NUMBER` runs it again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence

import torch

from sparse_attn.backends import native_cpu, native_cuda
from sparse_attn.backends.triton import TRITON_INSTALLED, interpreting

from .device import describe_device, pick_device
from .options import OneLineParser, at_least, positive
from .random_cases import TARGETS, Target, draw, kind_number
from .random_compare import Checked, check

_GRACE_SECONDS = 60.0


def check_many(numbers: Sequence[int], seed: int, target: Target, device: torch.device, end: float) -> list[Checked]:
    """Runs cases one after the other until `end` (of time.time()). A case that raises has failed."""
    done = []
    for number in numbers:
        if time.time() > end:
            break
        try:
            done.append(check(draw(number, seed, target), device))
        except Exception as error:
            done.append(Checked(number, (f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",)))
            if _broken(device):
                break
    return done


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
    numbers: Sequence[int], options: Namespace, target: Target, device: torch.device, end: float
) -> list[Checked]:
    """Cases of a kind stay in one process, which has compiled its kernels."""
    kinds = sorted({kind_number(number) for number in numbers})
    processes = min(options.processes, len(kinds))
    groups: list[list[int]] = [[] for _ in range(processes)]
    for number in numbers:
        groups[kinds.index(kind_number(number)) % processes].append(number)
    done = []
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_start_process) as pool:
        running = [pool.apply_async(check_many, (group, options.seed, target, device, end)) for group in groups]
        for result in running:
            try:
                done += result.get(max(0.0, end - time.time()) + _GRACE_SECONDS)
            except multiprocessing.TimeoutError:
                print("a process has not answered; its cases count as not run", file=sys.stderr)
    return done


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    torch.set_num_threads(1)


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = OneLineParser(
        prog="python -m benchmarks.random_check",
        description="Compares the kernels of a backend with float64 on random calls, forward and backward.",
    )
    parser.add_argument("--backend", choices=("triton", "native"), default="triton", help="(default: %(default)s)")
    parser.add_argument("--cases", type=at_least(1), default=500, help="(default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="(default: %(default)s)")
    parser.add_argument("--only", type=at_least(0), metavar="NUMBER", help="this case alone, described")
    parser.add_argument("--minutes", type=positive, default=60.0, help="then no case is begun (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--processes", type=at_least(1), help="(default: 1, on a GPU two fewer than processors, 14 at most)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for input of no use, 1 if a case failed or was not run."""
    options, start = parse_options(arguments), time.time()
    try:
        device = _usable_device(options.backend, options.device)
    except ValueError as error:
        print(f"benchmarks.random_check: error: {error}", file=sys.stderr)
        return 2
    if options.processes is None:
        options.processes = max(1, min(14, (os.cpu_count() or 1) - 2)) if device.type == "cuda" else 1
    target = TARGETS[options.backend, device.type]
    numbers = list(range(options.cases)) if options.only is None else [options.only]
    end = start + 60 * options.minutes
    if options.processes == 1 or len(numbers) == 1:
        done = check_many(numbers, options.seed, target, device, end)
    else:
        done = check_in_processes(numbers, options, target, device, end)
    failed = sorted((one for one in done if one.failures), key=lambda one: one.number)
    for one in failed:
        print(draw(one.number, options.seed, target).describe())
        print(*(f"    {failure}" for failure in one.failures), sep="\n")
        again = f"--backend {options.backend} --seed {options.seed} --only {one.number}"
        print(f"    again: python -m benchmarks.random_check {again}")
    if options.only is not None and not failed:
        print(draw(options.only, options.seed, target).describe())
    print(
        f"{options.backend}, {describe_device(device)}: {len(done)} of {len(numbers)} random cases run, "
        f"{len(failed)} failed, at most {max((one.share for one in done), default=0.0):.0%} of an error budget used, "
        f"{time.time() - start:.0f} s"
    )
    return int(bool(failed) or len(done) < len(numbers))


def _usable_device(backend: str, name: str | None) -> torch.device:
    """Raises ValueError where the kernels do not run."""
    device = pick_device(name)
    if backend == "native":
        if not (native_cpu.instruction_sets() if device.type == "cpu" else native_cuda.built()):
            raise ValueError(f"the extension has no kernels for {device.type}; python -m sparse_attn.doctor says why")
        return device
    if not TRITON_INSTALLED:
        raise ValueError("Triton is not installed; install sparse-attn[gpu]")
    if device.type == "cpu" and not interpreting():
        raise ValueError("on a CPU only Triton's interpreter runs the kernels; set TRITON_INTERPRET=1")
    return device


if __name__ == "__main__":
    sys.exit(main())
