"""Measures the native kernel beside the Triton kernel: `python -m benchmarks.tune_native --help`.

It finds how the native kernel is best cut, and writes that and whether it is the faster one into the tuning table of
this machine's GPU, from which backend="auto" then chooses. Run it after `benchmarks.tune`: then both are at their best.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable

import torch

from sparse_attn.backends import native_cuda
from sparse_attn.kernels.configuration import TABLES, BlockConfig, architecture_of, choose, table_name

from .options import OneLineParser, file_to_write
from .tuning.problems import PROBLEMS, TuningProblem

# A multiprocessor has registers for 12 warps.
CONFIGS = tuple(BlockConfig(warps, parts) for warps, parts in ((10, 1), (12, 1), (8, 1), (12, 2)))
_LEAST_GAIN = 1.02  # by less, times differ from run to run
_SCREEN_SECONDS, _FINAL_SECONDS = 0.01, 0.1
_LIMIT = 5e-3  # largest relative difference of the two kernels' results


def native_problems() -> list[TuningProblem]:
    """The tuning problems that the native kernel can compute."""
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
        what = "no GPU is available" if not torch.cuda.is_available() else "the extension was built without nvcc"
        print(f"benchmarks.tune_native: error: {what}", file=sys.stderr)
        return 2
    from .tuning.bench import Layouts
    from .tuning.sweep import device_measure
    from .tuning.table import TableFile

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    table = TableFile(options.output or TABLES / table_name(name), name, architecture_of(device))
    layouts, measure, failed = Layouts(device), device_measure(device), 0
    for tuned in native_problems():
        try:
            line = _tune(tuned, layouts, measure, table, device)
        except Exception as error:  # one problem less in the table
            failed, line = failed + 1, f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"{tuned.name}: {line}", flush=True)
    return int(failed > 0)


def _tune(tuned: TuningProblem, layouts, measure, table, device: torch.device) -> str:
    from .tuning.bench import Bench

    bench = Bench(tuned, device, layouts.of(tuned))
    bench.prepare()
    triton = bench.caller(choose(bench.problem, device))
    calls: dict[BlockConfig, Callable[[], None]] = {config: bench.native_caller(config) for config in CONFIGS}
    for call in calls.values():
        bench.compare_outputs(call(), _LIMIT)
    screened = measure(list(calls.values()), _SCREEN_SECONDS)
    best = min(zip(screened, CONFIGS, strict=True), key=lambda one: one[0])[1]
    own, other = measure([calls[best], triton], _FINAL_SECONDS)
    faster = own * _LEAST_GAIN < other
    table.add_native(bench.problem, BlockConfig(best.warps, best.parts, faster), own, other, tuned.name)
    return f"native {1e3 * own:.1f} us ({best.warps} warps, {best.parts} parts), Triton {1e3 * other:.1f} us"


if __name__ == "__main__":
    sys.exit(main())
