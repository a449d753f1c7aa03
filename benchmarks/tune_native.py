"""Measures the native kernels beside the Triton kernels: `python -m benchmarks.tune_native --help`.

It finds how the native kernels are best cut, and writes that and whether they are the faster ones into the tuning table
of this machine's GPU, from which backend="auto" then chooses: for inference by the forward pass, for training by both.
Run it after `benchmarks.tune`: then both are at their best.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from sparse_attn.backends import native_cuda, triton
from sparse_attn.kernels.configuration import (
    TABLES,
    BlockConfig,
    Problem,
    architecture_of,
    choose,
    choose_native,
    read_table,
    table_name,
    use_table,
)

from .device import no_gpu
from .options import OneLineParser, fail, file_to_write
from .tuning.problems import PROBLEMS, TuningProblem

# A multiprocessor has registers for 12 warps, in the backward pass for 8.
CONFIGS = tuple(BlockConfig(warps, parts) for warps, parts in ((10, 1), (12, 1), (8, 1), (12, 2)))
BACKWARD_CONFIGS = tuple(BlockConfig(warps, parts) for warps, parts in ((8, 1), (6, 1), (8, 2)))
_LEAST_GAIN = 1.02  # by less, times differ from run to run
_SCREEN_SECONDS, _FINAL_SECONDS = 0.01, 0.1
_LIMIT = 5e-3  # largest relative difference of the two kernels' results


def native_problems() -> list[TuningProblem]:
    """The tuning problems that the native forward kernel can compute. Those without rounding are trained too."""
    return [
        problem
        for problem in PROBLEMS
        if problem.kernel == "forward"
        and problem.head_dim in native_cuda.HEAD_DIMS
        and problem.dtype == torch.float16
        and problem.workload.length <= native_cuda.MAX_LENGTH
    ]


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = OneLineParser(
        prog="python -m benchmarks.tune_native",
        description="Measures the native kernel beside the Triton kernel and writes which one is faster into a table.",
    )
    parser.add_argument(
        "--output",
        type=file_to_write,
        metavar="FILE",
        help="default: kernels/tuning/<gpu>.json, where the package finds it",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 where nothing can be measured, 1 where a kernel failed."""
    options = parse_options(arguments)
    if not torch.cuda.is_available() or not native_cuda.built():
        no_kernels = "the extension has no CUDA kernels: build it where nvcc is on the search path"
        what = no_kernels if torch.cuda.is_available() else f"{no_gpu()}; run this on a machine with one"
        return fail("tune_native", what, status=2)
    from .tuning.bench import Layouts
    from .tuning.sweep import device_measure
    from .tuning.table import TableFile

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    path = options.output or TABLES / table_name(name)
    table = TableFile(path, name, architecture_of(device))
    layouts, measure, failed = Layouts(device), device_measure(device), 0
    for tuned in native_problems():
        for what, tune in (("", tune_forward), ("training: ", tune_training))[: 1 if tuned.bits else 2]:
            try:
                line = tune(tuned, layouts, measure, table, device)
            except Exception as error:  # one problem less in the table
                failed, line = failed + 1, f"{type(error).__name__}: {' '.join(str(error).split())}"
            print(f"{tuned.name}: {what}{line}", flush=True)
            if path.exists():
                use_table(read_table(path))
    return int(failed > 0)


def tune_forward(tuned: TuningProblem, layouts, measure, table, device: torch.device) -> str:
    """Measures a problem and writes what came out into the table. Returns a line about it."""
    from .tuning.bench import Bench

    bench = Bench(tuned, device, layouts.of(tuned))
    bench.prepare()
    calls = _right(CONFIGS, bench.native_caller, lambda output: bench.compare_outputs(output, _LIMIT))
    triton_call = bench.caller(choose(bench.problem, device))
    return _measured(calls, triton_call, bench.problem, tuned.name, measure, table)


def tune_training(tuned: TuningProblem, layouts, measure, table, device: torch.device) -> str:
    """The same for the forward and the backward pass together; the forward kernel is cut as the table says."""
    from .tuning.bench import Bench, compare

    bench = Bench(tuned, device, layouts.of(tuned))
    problem = replace(bench.problem, kernel="backward")
    kind = (tuned.head_dim, tuned.dtype)
    forward = choose_native(bench.problem, device)
    triton_call = bench.training_caller(triton, lambda layout: triton.layout_arguments(layout, *kind, None, True))
    expected = triton_call()

    def caller(config: BlockConfig) -> Callable:
        return bench.training_caller(
            native_cuda, lambda layout: native_cuda.configured_arguments(layout, *kind, forward, config)
        )

    def check(gradients) -> None:
        for own, other in zip(gradients, expected, strict=True):
            compare(own, other, _LIMIT, "the Triton kernel's")

    calls = _right(BACKWARD_CONFIGS, caller, check)
    return _measured(calls, triton_call, problem, f"training-{tuned.name}", measure, table)


def _right(
    configs: Iterable[BlockConfig], caller: Callable[[BlockConfig], Callable], check: Callable[[Any], None]
) -> dict[BlockConfig, Callable]:
    """The configurations that compute what `check` takes; says why others do not. Raises the last one's error where
    none does."""
    calls, failure = {}, None
    for config in configs:
        try:
            call = caller(config)
            check(call())
            calls[config] = call
        except Exception as error:
            failure = error
            print(f"{config.warps} warps, {config.parts} parts: {type(error).__name__}: {error}", file=sys.stderr)
    if not calls:
        raise failure
    return calls


def _measured(
    calls: dict[BlockConfig, Callable], triton_call: Callable, problem: Problem, name: str, measure, table
) -> str:  # fmt: skip
    configs = list(calls)
    screened = measure(list(calls.values()), _SCREEN_SECONDS)
    best = min(zip(screened, configs, strict=True), key=lambda one: one[0])[1]
    own, other = measure([calls[best], triton_call], _FINAL_SECONDS)
    faster = own * _LEAST_GAIN < other
    table.add_native(problem, BlockConfig(best.warps, best.parts, faster), own, other, name)
    return f"native {1e3 * own:.1f} us ({best.warps} warps, {best.parts} parts), Triton {1e3 * other:.1f} us"


if __name__ == "__main__":
    sys.exit(main())
