"""results.json, results.md and results.png of the SQuAD benchmark."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .device import commit, describe_device, versions
from .pages import complete_files
from .squad_chart import draw
from .squad_models import Models
from .squad_setting import Setting
from .squad_table import PUBLISHED, markdown


def summary(setting: Setting, models: Models, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of results.json."""
    options = {name: value for name, value in vars(setting.options).items() if name not in ("cache", "output")}
    for name in ("model", "data", "train_data", "mask"):  # what a file is called, not where it lies
        options[name] = None if options[name] is None else Path(options[name]).name
    checkpoints = {"dense": models.dense, "sparse": models.sparse}
    return {
        "device": describe_device(setting.device),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "arguments": options,
        "model": setting.model_name,
        "data": {
            "name": setting.data_name,
            "questions": len(setting.questions),
            "windows": len(setting.windows),
            "tokens": sum(len(window.input_ids) for window in setting.windows),
        },
        "averages_from": setting.averages_from,
        "peak_memory": (
            "peak of torch's allocator"
            if setting.device.type == "cuda"
            else "peak resident size of each row's own process, libraries included"
        ),
        "checkpoints": {
            kind: {field: value for field, value in asdict(checkpoint).items() if field != "path"}
            for kind, checkpoint in checkpoints.items()
        },
        "seconds": {"tokenisation": setting.tokenisation_seconds, **models.seconds},
        "rows": rows,
        "published": list(PUBLISHED),
    }


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Writes the three files; each is complete or not there at all."""
    with complete_files(folder) as unfinished:
        (unfinished / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (unfinished / "results.md").write_text(markdown(results), encoding="utf-8")
        draw(results, unfinished / "results.png")
