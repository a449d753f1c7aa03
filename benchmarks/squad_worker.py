"""Measures one row of the SQuAD table: `python -m benchmarks.squad_worker SPEC.json OUT`.

A process of its own, so that its peak memory is that of one variant. SPEC.json holds the fields of `Job`.
Writes OUT.json (the fields of `Measured`) and OUT.safetensors: `start` and `end`, float32 [tokens of all
windows], the logits of the last pass, windows in the order of the inputs file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForQuestionAnswering
from transformers.utils import logging

from sparse_attn import GlobalMask, patch_bert
from sparse_attn.progress import progress
from sparse_attn.squad.windows import Window, collate

from .measure import current_memory, peak_memory, reset_peak_memory, timed_passes


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        label: text of the progress bar.
        checkpoint: folder or hub name of the model.
        attention: implementation of transformers to load it with.
        mask: file of a global mask to patch it with, or None.
        bits: width of the probability quantiser, or None.
        dtype: name of a torch dtype.
        device: "cpu" or "cuda".
        inputs: file of `write_inputs`, the same for all variants.
        pad_to: length that every batch is padded to, or None for the longest window of each.
        repeats: timed passes.
        trust_remote_code: run code that comes with the model.
    """

    label: str
    checkpoint: str
    attention: str
    mask: str | None
    bits: int | None
    dtype: str
    device: str
    inputs: str
    pad_to: int | None
    repeats: int
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        seconds: of each timed pass over all windows: batching, transfer, model, logits back.
        peak_memory_bytes: allocator peak of the passes (GPU), or peak resident size of this process (CPU).
        loaded_memory_bytes: held by the model before the first pass (GPU), or resident by then (CPU).
    """

    seconds: list[float]
    peak_memory_bytes: int
    loaded_memory_bytes: int | None


def write_inputs(
    path: Path, windows: list[Window], batches: list[list[int]], pad_token_id: int, input_names: list[str]
) -> None:
    """Writes what all variants are fed with. `batches` are indices of windows."""
    content = {
        "windows": [[window.input_ids, window.token_type_ids] for window in windows],
        "batches": batches,
        "pad_token_id": pad_token_id,
        "input_names": input_names,
    }
    path.write_text(json.dumps(content))


def measure(job: Job) -> tuple[Measured, dict[str, torch.Tensor]]:
    """Runs the passes of `job`; returns the figures and the logits of the last pass."""
    device = torch.device(job.device)
    model = AutoModelForQuestionAnswering.from_pretrained(
        job.checkpoint,
        attn_implementation=job.attention,
        dtype=getattr(torch, job.dtype),
        local_files_only=Path(job.checkpoint).is_dir(),
        trust_remote_code=job.trust_remote_code,
    )
    model = model.eval().to(device)
    if job.mask is not None:
        patch_bert(model, GlobalMask.load(job.mask), bits=job.bits)
    inputs = json.loads(Path(job.inputs).read_text())
    windows = [
        Window(index, input_ids, token_types, [], 0, 0)
        for index, (input_ids, token_types) in enumerate(inputs["windows"])
    ]
    batches = inputs["batches"]
    ticks = progress(range((1 + job.repeats) * len(batches)), job.label)
    run_pass = _pass_over(model, windows, batches, job.pad_to, inputs, ticks, device)
    loaded = current_memory(device)
    reset_peak_memory(device)
    seconds, logits = timed_passes(run_pass, device, job.repeats)
    peak = peak_memory(device)
    next(ticks, None)  # closes the bar
    order = sorted(range(len(windows)), key=[index for batch in batches for index in batch].__getitem__)
    start, end = (torch.cat([tensors[position] for position in order]) for tensors in logits)
    return Measured(seconds, peak, loaded), {"start": start, "end": end}


def _pass_over(
    model, windows, batches, pad_to, inputs, ticks: Iterator[int], device: torch.device
) -> Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """A pass over all batches; it returns start and end logits: of each window, as batched, a [tokens]."""

    @torch.inference_mode()
    def run_pass():
        starts, ends = [], []
        for indices in batches:
            batch = collate([windows[index] for index in indices], inputs["pad_token_id"], pad_to)
            outputs = model(**{name: batch[name].to(device) for name in inputs["input_names"]})
            for kept, logits in ((starts, outputs.start_logits), (ends, outputs.end_logits)):
                logits = logits.float().cpu()
                kept.extend(row[: len(windows[index].input_ids)] for index, row in zip(indices, logits))
            next(ticks)
        return starts, ends

    return run_pass


def main(arguments: list[str]) -> None:
    spec, out = Path(arguments[0]), Path(arguments[1])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    measured, logits = measure(Job(**json.loads(spec.read_text())))
    save_file(logits, out.with_suffix(".safetensors"))
    out.with_suffix(".json").write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main(sys.argv[1:])
