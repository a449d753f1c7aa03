"""The calls whose hardware counters `benchmarks.counters` reads: `python -m benchmarks.counted_calls WORKLOAD`.

Each is checked, warmed up, and then runs once in an NVTX range that bears its name; a profiler counts nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch

from .attention_inputs import Inputs
from .attention_run import LazyMasks, Settings, checked_call, planned
from .attention_variants import own_variants
from .attention_workloads import MASKS, PASSES, WORKLOADS, Workload
from .pages import row_name
from .timing import WARM_UPS

KERNELS = ("triton", "native")


def named_calls(workload: Workload, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    """This package's kernels on the first layer of each sparse mask: forward, rounded or not, and forward+backward."""
    settings, masks = Settings(device, dtype, masks=MASKS[1:]), LazyMasks(workload, device)
    kernels = [variant for variant in own_variants() if variant.name in KERNELS]
    for direction in PASSES:
        inputs, expected = Inputs(workload, device, dtype, settings.seed), {}
        for entry in planned(workload, direction, masks, kernels, settings, inputs):
            name = row_name(entry.variant.name, entry.case.mask, direction, bits=entry.case.bits)
            try:
                call, _ = checked_call(entry.variant, entry.case, entry.layers[0], expected, settings.seed)
            except Exception as reason:  # of one call: the others are counted all the same
                print(f"{name}: {reason}", file=sys.stderr)
                continue
            yield name, call


def run_counted(name: str, call: Callable) -> None:
    """One call on a GPU for the profiler to see, after some that it does not."""
    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    # Ranges are a thread's own: the backward pass must not take another.
    with torch.autograd.set_multithreading_enabled(False), torch.cuda.nvtx.range(name):
        call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(arguments: list[str]) -> None:
    (workload,) = (one for one in WORKLOADS if one.name == arguments[0])
    for name, call in named_calls(workload, torch.device("cuda"), torch.float16):
        run_counted(name, call)


if __name__ == "__main__":
    main(sys.argv[1:])
