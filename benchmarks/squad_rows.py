"""Measures the rows of the SQuAD table, each in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sparse_attn.squad.answers import best_answers
from sparse_attn.squad.metrics import exact_match_and_f1
from sparse_attn.squad.windows import length_sorted_batches

from .device import ROOT
from .squad_checkpoints import input_names
from .squad_models import Models
from .squad_setting import Setting
from .squad_table import with_speedups
from .squad_variants import Variant
from .squad_worker import Job, Measured, write_inputs


class VariantFailed(RuntimeError):
    """The process that measured a variant ended without a result."""


def measure_rows(setting: Setting, models: Models) -> list[dict[str, Any]]:
    """A row for each variant of `setting`, in order, with the fields of results.json.

    Raises VariantFailed, which names the variant.
    """
    with tempfile.TemporaryDirectory(prefix="sparse_attn-") as name:
        folder = Path(name)
        batches = length_sorted_batches(setting.windows, setting.options.batch_size)
        pad_token_id, names = setting.tokenizer.pad_token_id, input_names(setting.tokenizer)
        write_inputs(folder / "inputs.json", setting.windows, batches, pad_token_id, names)
        if models.mask is not None:
            models.mask.save(folder / "mask.safetensors")
        rows = [
            _row(setting, models, variant, *_measured(setting, models, variant, folder / str(index)))
            for index, variant in enumerate(setting.variants)
        ]
    return with_speedups(rows)


def _measured(setting: Setting, models: Models, variant: Variant, stem: Path) -> tuple[Measured, dict]:
    """The figures and logits that the worker finds for `variant`; its files start with `stem`."""
    folder = stem.parent
    job = Job(
        label=variant.label,
        checkpoint=(models.sparse if variant.masked else models.dense).path,
        attention=variant.attention,
        mask=str(folder / "mask.safetensors") if variant.masked else None,
        bits=variant.bits,
        dtype=variant.dtype,
        device=setting.device.type,
        inputs=str(folder / "inputs.json"),
        pad_to=setting.options.max_length if variant.padding == "max" else None,
        repeats=setting.options.repeats,
        trust_remote_code=setting.options.trust_remote_code,
    )
    spec, out = stem.with_suffix(".spec.json"), stem.with_suffix(".json")
    spec.write_text(json.dumps(asdict(job)))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.squad_worker", str(spec), str(out)]
    finished = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
    if finished.returncode != 0 or not out.exists():
        how = (
            f"was killed by signal {-finished.returncode} (out of memory?)"
            if finished.returncode < 0
            else f"ended with exit status {finished.returncode}"
        )
        raise VariantFailed(f"{variant.label}: the process that measured it {how}; its message stands above")
    return Measured(**json.loads(out.read_text())), load_file(out.with_suffix(".safetensors"))


def _row(setting: Setting, models: Models, variant: Variant, measured: Measured, logits: dict) -> dict[str, Any]:
    lengths = [len(window.input_ids) for window in setting.windows]
    start = time.perf_counter()
    answers = best_answers(
        setting.questions, setting.windows, logits["start"].split(lengths), logits["end"].split(lengths)
    )
    decoding_seconds = time.perf_counter() - start
    exact_match, f1 = exact_match_and_f1(answers, setting.questions)
    seconds = statistics.median(measured.seconds)
    return {
        "variant": variant.name,
        "attention": "sparse" if variant.masked else variant.attention,
        **_mask_fields(setting, models, variant),
        "bits": variant.bits,
        "dtype": variant.dtype,
        "padding": variant.padding,
        "checkpoint": (models.sparse if variant.masked else models.dense).name,
        "em": exact_match,
        "f1": f1,
        "seconds": seconds,
        "seconds_of_repeats": measured.seconds,
        "decoding_seconds": decoding_seconds,
        "tokens_per_second": sum(lengths) / seconds,
        "windows_per_second": len(lengths) / seconds,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "loaded_memory_bytes": measured.loaded_memory_bytes,
    }


def _mask_fields(setting: Setting, models: Models, variant: Variant) -> dict[str, Any]:
    if not variant.masked:
        return {"sparsity": 0.0, "granularity": None, "density": 1.0}
    density = models.mask.density().mean().item()
    if setting.given_mask is None:
        return {
            "sparsity": setting.options.sparsity,
            "granularity": setting.options.granularity,
            "density": density,
        }
    granularity = setting.given_mask.metadata.get("granularity")
    return {"sparsity": round(1 - density, 6), "granularity": granularity, "density": density}
