"""Accuracy, time and memory of dense and sparse attention on SQuAD: `python -m benchmarks.squad --help`.

Collects a model's average attention, prunes it to a global mask, and measures each variant in a process of
its own on identical batches. Prints one table and writes results.json, results.md, results.html and pictures.
Under `torchrun` or `accelerate launch` the processes share training, averages and batches.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import replace

import torch
from transformers.utils import logging

from ..launched import is_first, launched
from ..options import fail
from .options import parse_options
from .results import summary, write_results
from .rows import Outcome, measure_rows
from .seeds import ModelsByGranularity, measure_seeds
from .setting import Setting, read_setting
from .table import print_header, print_table


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark. Returns the exit status: 2 for input of no use, 1 for a run that failed or of which a row
    did, 130 for one that was interrupted."""
    options = parse_options(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return _read_and_run(options)
    except KeyboardInterrupt:
        return fail("squad", "interrupted; --resume goes on from the rows that are printed above", status=130)


def _read_and_run(options: Namespace) -> int:
    with ExitStack() as processes:
        try:
            processes.enter_context(launched(options.device))
            setting = read_setting(options)
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            return fail("squad", error, status=2)
        try:
            return _run(setting)
        except OSError as error:
            return fail("squad", error, status=1)


def _run(asked: Setting) -> int:
    outcomes: list[Outcome] = []

    def measure(setting: Setting, models: ModelsByGranularity) -> list[dict]:
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
        if outcomes:  # another seed, for its accuracy
            setting = replace(setting.with_options(sweep=[]), variants=outcomes[0].measured)
            print(f"seed {setting.options.seed + len(outcomes)}:")
        else:
            print_header()
        outcomes.append(measure_rows(setting, models))
        if outcomes[-1].interrupted and (asked.options.seeds > 1 or not outcomes[-1].rows):
            raise KeyboardInterrupt  # with other seeds to come, these accuracies are none of --seeds
        return outcomes[-1].rows

    models, rows = measure_seeds(asked, measure)
    if not rows:
        return fail("squad", "no row could be measured", status=1)
    results = summary(asked, models, replace(outcomes[0], rows=rows, failed=_all_failed(asked, outcomes)))
    print_table(results)
    output = asked.options.output
    if is_first():
        write_results(results, [found.mask for found in models.values() if found.mask is not None], output)
    print(f"{output}: results.json, results.md, results.html and pictures")
    if outcomes[0].interrupted:
        raise KeyboardInterrupt
    return int(any(one.failed or one.unwritten is not None for one in outcomes))


def _all_failed(asked: Setting, outcomes: list[Outcome]) -> list[dict]:
    """What ended without a result, with the seed where that is not the first."""
    first, *others = outcomes
    later = [
        {**row, "reason": f"seed {seed}: {row['reason']}"}
        for seed, outcome in enumerate(others, asked.options.seed + 1)
        for row in outcome.failed
    ]
    return [*first.failed, *later]


if __name__ == "__main__":
    sys.exit(main())
