"""Measures the rows of the SQuAD table and of its sweeps, each in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sparse_attn import GlobalMask
from sparse_attn.distributed import rank_and_world
from sparse_attn.squad.answers import best_answers
from sparse_attn.squad.metrics import exact_match_and_f1

from ..ceilings import measure_matrix_rate
from ..launched import first_of, is_first, of_all
from ..verdicts import Absent
from .checkpoints import Checkpoint, input_names
from .feeding import windows_of, write_inputs
from .keys import Keys
from .masks import make_mask
from .models import Models
from .process import VariantFailed, merged, run_worker
from .setting import Setting
from .sweeps import swept_variants
from .table import print_row, with_speedups
from .variants import Variant
from .worker import Job, Measured

Row = dict[str, Any]


@dataclass
class Outcome:
    """What became of the rows.

    Attributes:
        rows: of the table, in order, with the fields of results.json.
        measured: their variants.
        sweeps: name and rows of each sweep.
        absent: what cannot run on this machine: the fields that name a row, and a reason.
        failed: what ended without a result, likewise.
        unwritten: why rows could not be written to the output folder; None if all were.
        interrupted: whether that ended it before all was measured.
    """

    rows: list[Row] = field(default_factory=list)
    measured: list[Variant] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    absent: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    unwritten: str | None = None
    interrupted: bool = False


def measure_rows(setting: Setting, models: Mapping[str | None, Models]) -> Outcome:
    """Measures the variants and sweeps of `setting`, with the models of each granularity. Rows are printed, and written
    to the folder `rows` of the output, as soon as they are there; --resume reads them from it."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="sparse_attn-") as folder:
        bench = _Bench(setting, models, Path(folder), outcome)
        found: dict[Variant, Row | None] = {}
        try:
            for variant in sorted(setting.variants, key=lambda one: one.compiles):  # what takes minutes comes last
                found[variant] = bench.row(variant)
        except KeyboardInterrupt:
            outcome.interrupted = True
        outcome.measured = [variant for variant in setting.variants if found.get(variant) is not None]
        outcome.rows = [found[variant] for variant in outcome.measured]
        baseline = outcome.rows[0] if outcome.rows else None
        for sweep in [] if outcome.interrupted else setting.options.sweep:
            swept = swept_variants(sweep, setting.granularities)
            rows = [row for variant in swept if (row := bench.row(variant)) is not None]
            outcome.sweeps.append({"name": sweep.name, "rows": with_speedups(rows, baseline)})
        outcome.rows = with_speedups(outcome.rows)
    return outcome


class _Bench:
    """What all rows share while they are measured; files for the workers lie in `folder`."""

    def __init__(self, setting: Setting, models: Mapping[str | None, Models], folder: Path, outcome: Outcome):
        self.setting, self.models, self.folder, self.outcome = setting, models, folder, outcome
        options = setting.options
        rank, processes = rank_and_world()
        batches = [setting.batches[first::processes] for first in range(processes)]  # of each process
        self.shares = [windows_of(own) for own in batches]
        self.lengths = [len(window.input_ids) for window in setting.windows]
        self.inputs = folder / "inputs.json"
        names = input_names(setting.tokenizer)
        write_inputs(self.inputs, setting.windows, batches[rank], setting.tokenizer.pad_token_id, names)
        self.keys = Keys(setting, self.inputs)
        self.masks: dict[tuple[str | None, float | None], GlobalMask] = {}
        self.done: dict[str, Row] = {}
        self.store = options.output / "rows"

    def row(self, variant: Variant) -> Row | None:
        """The row of a variant, measured or taken from an earlier run; None if it is absent or failed."""
        mask = self._mask(variant)
        names = self._names(variant, mask)
        job = self._job(variant, mask)
        key = first_of(self.keys.of(job, mask, names))
        row = self.done.get(key)
        if row is not None:
            return row
        row = first_of(self._resumed(key))
        if row is None:
            try:
                row = {**names, **self._figures(*self._measured(job))}
            except Absent as reason:
                self._note(self.outcome.absent, names, f"absent: {reason}", str(reason))
                return None
            except (VariantFailed, ValueError) as error:  # logits that are not finite
                self._note(self.outcome.failed, names, f"failed: {error}", str(error))
                if is_first():
                    print(f"benchmarks.squad: error: {variant.label}: {error}", file=sys.stderr)
                return None
            if is_first():
                self._keep(key, row)
        self.done[key] = row
        print_row(row)
        return row

    def _mask(self, variant: Variant) -> GlobalMask | None:
        if not variant.masked:
            return None
        models = self.models[variant.granularity]
        if variant.sparsity is None:
            return models.mask
        place = (variant.granularity, variant.sparsity)
        if place not in self.masks:
            self.masks[place] = make_mask(self.setting, *place, models.seconds)
        return self.masks[place]

    def _checkpoint(self, variant: Variant) -> Checkpoint:
        return self._models(variant).checkpoint(variant)

    def _models(self, variant: Variant) -> Models:
        return self.models[variant.granularity if variant.masked else self.setting.granularities[0]]

    def _tables(self, variant: Variant) -> list | None:
        models = self._models(variant)
        tables = models.tables(variant.bits, models.checkpoint(variant))
        return None if tables is None else [[table.threshold, list(table.levels)] for table in tables]

    def _job(self, variant: Variant, mask: GlobalMask | None) -> Job:
        options = self.setting.options
        if mask is not None:
            mask.save(self.folder / "mask.safetensors")
        return Job(
            label=variant.label,
            checkpoint=self._checkpoint(variant).path,
            attention=variant.attention,
            padding=variant.padding,
            compiled=variant.compiled,
            onednn=variant.onednn,
            mask=None if mask is None else str(self.folder / "mask.safetensors"),
            tables=self._tables(variant),
            dtype=options.dtype,
            device=str(self.setting.device),
            inputs=str(self.inputs),
            max_length=options.max_length,
            repeats=options.repeats,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
        )

    def _names(self, variant: Variant, mask: GlobalMask | None) -> Row:
        """The fields that say what a row is."""
        checkpoint = self._checkpoint(variant)
        named = {"variant": variant.name, "attention": variant.attention, "model": self.setting.model_name}
        if mask is None:
            named |= {"mask": None, "sparsity": 0.0, "granularity": None, "density": 1.0}
        else:
            density = mask.density().mean().item()
            sparsity = self.setting.options.sparsity if variant.sparsity is None else variant.sparsity
            if self.setting.given_mask is not None:
                sparsity = round(1 - density, 6)
            text = f"{variant.granularity or 'given'} {sparsity:g}"
            named |= {"mask": text, "sparsity": sparsity, "granularity": variant.granularity, "density": density}
        return {
            **named,
            "bits": variant.bits,
            "table": None if variant.bits is None else self.setting.options.table,
            "dtype": self.setting.options.dtype,
            "padding": variant.padding,
            "compiled": variant.compiled,
            "checkpoint": checkpoint.name,
        }

    def _measured(self, job: Job) -> tuple[Measured, dict[str, list[torch.Tensor]]]:
        """What the workers of all processes find. Raises in every process what one of them is told."""
        try:
            own = run_worker(job, self.folder)
        except (Absent, VariantFailed) as error:
            own = error
        found = of_all(own)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return merged(found, self.shares, self.lengths, on_gpus=self.setting.device.type == "cuda")

    def _figures(self, measured: Measured, logits: dict[str, list[torch.Tensor]]) -> Row:
        setting, lengths = self.setting, self.lengths
        exact_match = f1 = decoding_seconds = None
        if not setting.random_weights:
            start = time.perf_counter()
            answers = best_answers(setting.questions, setting.windows, logits["start"], logits["end"])
            decoding_seconds = time.perf_counter() - start
            exact_match, f1 = exact_match_and_f1(answers, setting.questions)
        seconds = statistics.median(measured.seconds)
        return {
            "em": exact_match,
            "f1": f1,
            "seconds": seconds,
            "seconds_of_repeats": measured.seconds,
            "warm_up_seconds": measured.warm_up_seconds,
            "decoding_seconds": decoding_seconds,
            "tokens": sum(lengths),
            "padded_tokens": measured.processed_tokens,
            "tokens_per_second": sum(lengths) / seconds,
            "windows_per_second": len(lengths) / seconds,
            "peak_memory_bytes": measured.peak_memory_bytes,
            "loaded_memory_bytes": measured.loaded_memory_bytes,
            "flops": measured.flops,
            "matrix_share": measured.flops / seconds / self._matrix_rate,
            "energy_joules": measured.joules,
            "kernel": measured.kernel,
        }

    @cached_property
    def _matrix_rate(self) -> float:
        """Operations a second of large matrix products in all processes at the same time."""
        dtype = getattr(torch, self.setting.options.dtype)
        return sum(of_all(measure_matrix_rate(self.setting.device, dtype)))

    def _resumed(self, key: str) -> Row | None:
        path = self.store / f"{key}.json"
        if not self.setting.options.resume or not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            print(f"benchmarks.squad: {path} is damaged: the row is measured again", file=sys.stderr)
            return None

    def _keep(self, key: str, row: Row) -> None:
        """Writes a row for --resume. Where that fails, the run goes on: what it finds is still printed."""
        unfinished = self.store / f"{key}.unfinished"
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, self.store / f"{key}.json")
        except OSError as error:
            if self.outcome.unwritten is None:
                print(f"benchmarks.squad: error: rows cannot be written: {error}; the run goes on", file=sys.stderr)
            self.outcome.unwritten = str(error)

    def _note(self, notes: list[Row], names: Row, text: str, reason: str) -> None:
        if {**names, "reason": reason} not in notes:
            notes.append({**names, "reason": reason})
            print_row(names, text)
