"""Accuracy, time and memory of dense and sparse attention on SQuAD: `python -m benchmarks.squad --help`.

Collects a model's average attention, prunes it to a global mask, and measures each variant in a process of
its own on identical batches. Prints one table and writes results.json, results.md and results.png.
"""

from __future__ import annotations

import sys

import torch
from transformers.utils import logging

from .squad_models import make_models
from .squad_options import parse_options
from .squad_results import summary, write_results
from .squad_rows import VariantFailed, measure_rows
from .squad_setting import read_setting
from .squad_table import print_table


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark. Returns the exit status: 2 for input of no use, 1 for a run that failed."""
    options = parse_options(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        setting = read_setting(options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        return _fail(error, status=2)
    models = make_models(setting)
    setting.model = None  # the memory is for the variants
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        rows = measure_rows(setting, models)
    except VariantFailed as error:
        return _fail(error, status=1)
    results = summary(setting, models, rows)
    print_table(results)
    try:
        write_results(results, options.output)
    except OSError as error:
        return _fail(error, status=1)
    print(f"{options.output}: results.json, results.md and results.png")
    return 0


def _fail(error: Exception, status: int) -> int:
    print(f"benchmarks.squad: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
