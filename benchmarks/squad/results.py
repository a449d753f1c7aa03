"""results.json, results.md, results.html and the pictures of the SQuAD benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparse_attn import GlobalMask
from sparse_attn.distributed import rank_and_world
from sparse_attn.squad.reading import misplaced_answers

from ..device import circumstances
from ..pages import complete_files
from .chart import draw, draw_sweep
from .checkpoints import Checkpoint
from .html import write_page
from .models import Models
from .rows import Outcome
from .setting import Setting
from .table import PUBLISHED, markdown


def summary(setting: Setting, models: Mapping[str | None, Models], outcome: Outcome) -> dict[str, Any]:
    """The content of results.json; `models` are those of each granularity."""
    left_out = ("cache", "output", "resume")
    options = {name: value for name, value in vars(setting.options).items() if name not in left_out}
    options["sweep"] = [asdict(sweep) for sweep in options["sweep"]]
    for name in ("model", "data", "train_data", "mask", "recover_text"):  # what a file is called, not where it lies
        options[name] = None if options[name] is None else Path(options[name]).name
    return {
        **circumstances(setting.device),
        "processes": rank_and_world()[1],
        "arguments": options,
        "model": setting.model_name,
        "data": {
            "name": setting.data_name,
            "questions": len(setting.questions),
            "windows": len(setting.windows),
            "tokens": sum(len(window.input_ids) for window in setting.windows),
            "misplaced_answers": misplaced_answers(setting.questions),
        },
        "random_weights": setting.random_weights,
        "averages_from": setting.averages_from,
        "peak_memory": (
            "peak of torch's allocator in the largest batch"
            if setting.device.type == "cuda"
            else "peak resident size of each row's own process in its largest batch, libraries included, freed memory "
            "handed back"
        ),
        "energy": _energy_source(setting, outcome),
        "checkpoints": {
            kind: {field: value for field, value in asdict(checkpoint).items() if field != "path"}
            for kind, checkpoint in _checkpoints(models).items()
        },
        "seconds": {"tokenisation": setting.tokenisation_seconds, **_seconds(models)},
        "rows": outcome.rows,
        "sweeps": outcome.sweeps,
        "absent": outcome.absent,
        "failed": outcome.failed,
        "published": list(PUBLISHED),
    }


def write_results(results: dict[str, Any], masks: Sequence[GlobalMask], folder: Path) -> None:
    """Writes the files, numbers before pictures; each is complete or not there at all. The page shows the `masks` of
    the rows. Raises OSError that names the folder."""
    try:
        with complete_files(folder) as unfinished:
            (unfinished / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            (unfinished / "results.md").write_text(markdown(results), encoding="utf-8")
        _draw_all(results, masks, folder)
    except OSError as error:
        raise OSError(f"results cannot be written to {folder}: {error}") from error


def _draw_all(results: dict[str, Any], masks: Sequence[GlobalMask], folder: Path) -> None:
    with complete_files(folder) as unfinished:
        draw(results, unfinished / "results.png")
        for sweep in results["sweeps"]:
            if sweep["rows"]:
                draw_sweep(results, sweep, unfinished / f"results-{sweep['name']}.png")
        write_page(results, masks, unfinished / "results.html")


def _named(models: Mapping[str | None, Models], name: str) -> dict[str, Models]:
    """The models by `name`, which says the granularity as well where there are several."""
    return {name if len(models) == 1 else f"{name}, {one}": found for one, found in models.items()}


def _checkpoints(models: Mapping[str | None, Models]) -> dict[str, Checkpoint]:
    dense = next(iter(models.values())).dense
    rounded = {name: found.rounded for name, found in _named(models, "rounded").items() if found.rounded is not None}
    return {"dense": dense, **{name: found.sparse for name, found in _named(models, "sparse").items()}, **rounded}


def _seconds(models: Mapping[str | None, Models]) -> dict[str, float]:
    """How long each step took, of all granularities together."""
    steps: dict[str, float] = {}
    for found in models.values():
        for step, seconds in found.seconds.items():
            steps[step] = steps.get(step, 0.0) + seconds
    return steps


def _energy_source(setting: Setting, outcome: Outcome) -> str | None:
    if all(row.get("energy_joules") is None for row in outcome.rows):
        return None
    return "NVML's counter of the GPU" if setting.device.type == "cuda" else "RAPL's counters of all CPU sockets"
