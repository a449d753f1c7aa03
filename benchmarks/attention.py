"""Attention kernels and their peers side by side: `python -m benchmarks.attention --help`.

Every variant is compared with float64 before it is timed; all variants of a workload are timed in turns, with flushed
caches. Prints one table; --json writes the results. `pytest benchmarks/attention.py --benchmark-only` runs squad384's
forward pass on the first layer of each mask through pytest-benchmark.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .attention_inputs import Inputs
from .attention_run import LazyMasks, Settings, checked_call, planned, run
from .attention_table import print_table
from .attention_variants import Variant, all_variants
from .attention_workloads import FORWARD, MASKS, PASSES, WORKLOADS, Workload, default_workloads
from .device import pick_device, synchronize
from .options import DTYPES, OneLineParser, at_least, chosen, fail, file_to_write, names, positive
from .pages import write_json
from .verdicts import Absent

_SECONDS = {"cuda": 0.5, "cpu": 2.0}


def parse_options(arguments: list[str] | None = None) -> Namespace:
    """The options; a bad one ends the program with one line on stderr and exit status 2."""
    parser = OneLineParser(
        prog="python -m benchmarks.attention",
        description="Times attention over global masks beside other attention kernels, after checking all results.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--workloads", type=names, help=f"by commas, of {', '.join(one.name for one in WORKLOADS)} "
        "(default: all on a GPU; those up to 2,048 tokens, in smaller batches, on a CPU)",
    )  # fmt: skip
    parser.add_argument("--passes", type=names, help=f"by commas, of {', '.join(PASSES)} (default: both)")
    parser.add_argument("--variants", type=names, help="names by commas (default: all)")
    parser.add_argument("--masks", type=names, help=f"by commas, of {', '.join(MASKS)} (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--seconds", type=positive, help="to time a variant for (default: 0.5, on a CPU 2)")
    parser.add_argument("--budget", type=positive, help="seconds after which no further workload is begun")
    parser.add_argument("--json", type=file_to_write, metavar="OUT", help="file for the results")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the inputs (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark. Returns the exit status: 2 for input of no use, 1 where nothing could be measured or a kernel
    of this package computed something wrong."""
    options = parse_options(arguments)
    try:
        settings, workloads, variants = _asked_for(options)
    except ValueError as error:
        return fail("attention", error, status=2)
    try:
        results = run(workloads, variants, settings, keep=partial(_write, options.json))
    except OSError as error:
        return fail("attention", error, status=1)
    print_table(results)
    wrong = {row["variant"] for row in results["absent"] if row.get("wrong")}
    if own := sorted(wrong & {variant.name for variant in variants if variant.ours}):
        return fail("attention", f"wrong results of {', '.join(own)}: see the reasons above", status=1)
    return 0 if results["rows"] else 1


def _write(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        write_json(results, path)


def _asked_for(options: Namespace) -> tuple[Settings, list[Workload], list[Variant]]:
    """Raises ValueError for a GPU or names that do not exist."""
    device = pick_device(options.device)
    by_name = {workload.name: workload for workload in WORKLOADS}
    asked = options.workloads
    if asked is None:
        asked = [workload.name for workload in default_workloads(device)]
    workloads = [by_name[name].on(device) for name in chosen("--workloads", asked, list(by_name))]
    here = [variant for variant in all_variants() if device.type in variant.devices]
    variant_names = chosen("--variants", options.variants, [variant.name for variant in here])
    settings = Settings(
        device=device,
        dtype=getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32")),
        passes=tuple(chosen("--passes", options.passes, list(PASSES))),
        masks=tuple(chosen("--masks", options.masks, list(MASKS))),
        seconds=options.seconds or _SECONDS[device.type],
        budget=options.budget,
        seed=options.seed,
    )
    return settings, workloads, [variant for variant in here if variant.name in variant_names]


def pytest_generate_tests(metafunc) -> None:
    """The cases of pytest-benchmark: squad384 forward, each variant on the first layer of each mask."""
    if "benchmarked" not in metafunc.fixturenames:
        return
    settings, workloads, variants = _asked_for(parse_options(["--workloads", "squad384", "--passes", FORWARD]))
    inputs = Inputs(workloads[0], settings.device, settings.dtype, settings.seed)
    masks = LazyMasks(workloads[0], settings.device)
    cases = [
        (entry.variant, entry.case, entry.layers[0])
        for entry in planned(workloads[0], FORWARD, masks, variants, settings, inputs)
        if entry.reason is None
    ]
    labels = [f"{variant.name}-{case.mask}-{case.bits or 'no'}-bits" for variant, case, _ in cases]
    metafunc.parametrize("benchmarked", cases, ids=labels)


def test_attention(benchmark, benchmarked) -> None:
    """One case through pytest-benchmark: launched from Python, after a check that its result is right."""
    import pytest

    variant, case, layer = benchmarked
    try:
        call, error = checked_call(variant, case, layer, expected={})
    except (Absent, RuntimeError) as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{case.workload.name}, {case.direction}"
    benchmark.extra_info |= {"mask": case.mask, "bits": case.bits, "layer": 0, "error": error}

    def once() -> None:
        call()
        synchronize(case.inputs.device)

    benchmark(once)


if __name__ == "__main__":
    sys.exit(main())
