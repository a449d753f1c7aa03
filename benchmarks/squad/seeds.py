"""Several seeds of fine-tuning and recovery: accuracy of each row as mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .models import Models, make_models
from .setting import Setting

ACCURACIES = ("em", "f1")
_NAMES = ("variant", "granularity", "sparsity", "bits")
Row = dict[str, Any]
ModelsByGranularity = dict[str | None, Models]


def measure_seeds(
    setting: Setting, measure: Callable[[Setting, ModelsByGranularity], list[Row]]
) -> tuple[ModelsByGranularity, list[Row]]:
    """The models of the first seed, and the rows with accuracies over --seeds seeds, counted from --seed.

    Time and memory are those of the first seed. With the others each variant runs once after warming up, for its
    answers.

    Args:
        setting: its model is given up after the first seed's checkpoints are made: the memory is for the variants.
        measure: the rows of a seed's models; it is called with --repeats 1 for all but the first.
    """
    options = setting.options
    first = _models(setting, options.seed)
    setting.model = None
    rows_per_seed = [measure(setting, first)]
    quick = setting.with_options(repeats=1)
    for seed in range(options.seed + 1, options.seed + options.seeds):
        rows_per_seed.append(measure(quick, _models(setting, seed)))
    return first, spread(rows_per_seed)


def spread(rows_per_seed: Sequence[Sequence[Row]]) -> list[Row]:
    """The first seed's rows, with the mean over seeds as `em` and `f1`, and `em_spread` and `f1_spread` beside them.

    A spread has `mean`, `deviation` (the sample standard deviation), `lowest`, `highest` and `values`, one for each
    seed that has the row. With a single value, or none, a row stays as it is.
    """
    by_name = [{_name(row): row for row in rows} for rows in rows_per_seed]
    return [_with_spread(row, [rows.get(_name(row), {}) for rows in by_name[1:]]) for row in rows_per_seed[0]]


def _models(setting: Setting, seed: int) -> ModelsByGranularity:
    return {one: make_models(setting.with_granularity(one), seed) for one in setting.granularities}


def _name(row: Row) -> tuple:
    return tuple(row.get(name) for name in _NAMES)


def _with_spread(row: Row, others: Sequence[Row]) -> Row:
    result = dict(row)
    for name in ACCURACIES:
        values = [one[name] for one in (row, *others) if one.get(name) is not None]
        if len(values) < 2:
            continue
        mean = statistics.fmean(values)
        result[name] = mean
        result[f"{name}_spread"] = {
            "mean": mean,
            "deviation": statistics.stdev(values),
            "lowest": min(values),
            "highest": max(values),
            "values": values,
        }
    return result
