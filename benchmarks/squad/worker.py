"""Measures one row of the SQuAD table: `python -m benchmarks.squad.worker SPEC.json OUT`.

A process of its own, so that its peak memory is that of one variant. SPEC.json holds the fields of `Job`.
Writes OUT.json (the fields of `Measured`) and OUT.safetensors: `start` and `end`, float32 [tokens of all
windows], the logits of the last pass, windows in the order of the inputs file. Where the variant cannot run on this
machine, OUT.json says {"absent": reason}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForQuestionAnswering, PreTrainedModel
from transformers.utils import logging

from sparse_attn import GlobalMask, QuantizationTable, patch_model
from sparse_attn.integrations.models import encoder_of
from sparse_attn.integrations.packing import Packing
from sparse_attn.progress import with_progress

from ..measure import current_memory, peak_memory, timed_passes
from ..verdicts import Absent
from .arithmetic import attention_flops, linear_flops_per_token
from .feeding import Feed, Inputs, blocks_feed, packed_feed, padded_feed
from .peers import use_flash, use_flex, use_packed
from .shapes import SHAPES, build_shape


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        label: text of the progress bar.
        checkpoint: folder or hub name of the model, or the name of a shape.
        attention, padding, compiled, onednn: of the `Variant`.
        mask: file of a global mask, or None.
        tables: threshold and levels of the quantiser in each layer; None for no rounding.
        dtype: name of a torch dtype.
        device: "cpu", or "cuda" with or without a number.
        inputs: file of `write_inputs`, the same for all variants.
        max_length: length that batches are padded to where the variant says so.
        repeats: timed passes.
        seed: of a shape's weights.
        trust_remote_code: run code that comes with the model.
    """

    label: str
    checkpoint: str
    attention: str
    padding: str
    compiled: bool
    onednn: bool | None
    mask: str | None
    tables: list | None
    dtype: str
    device: str
    inputs: str
    max_length: int
    repeats: int
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        seconds: of each timed pass over all windows: batching, transfer, model, logits back.
        warm_up_seconds: of the pass before them.
        joules: that a pass took; None where no driver tells.
        peak_memory_bytes: `measure.peak_memory` of the batch with most tokens.
        loaded_memory_bytes: held by the model before the first pass (GPU), or resident by then (CPU).
        processed_tokens: of a pass, with the padding that the model works on.
        flops: that a pass needs, counted on real tokens and kept positions.
        kernel: which function computes a peer's attention, where the variant's name leaves it open.
    """

    seconds: list[float]
    warm_up_seconds: float
    joules: float | None
    peak_memory_bytes: int
    loaded_memory_bytes: int | None
    processed_tokens: int
    flops: float
    kernel: str | None


def measure(job: Job) -> tuple[Measured, dict[str, torch.Tensor]]:
    """Runs the passes of `job`; returns the figures and the logits of the last pass. Raises Absent."""
    device = torch.device(job.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    inputs = Inputs.read(job.inputs)
    model = _loaded(job).to(device)
    flops_per_token = linear_flops_per_token(model)
    model, kernel = _prepared(job, model)
    feed = _feed(job, inputs, model, device)
    forward = torch.compile(model, dynamic=True) if job.compiled and job.attention != "sparse" else model
    tokens = [_processed_tokens(job, inputs, feed, batch) for batch in inputs.batches]
    largest = [inputs.batches[tokens.index(max(tokens))]] if tokens else []  # none: other processes have all batches
    ticks = with_progress(range(len(largest) + (1 + job.repeats) * len(inputs.batches)), job.label)
    loaded = current_memory(device)
    peak = max(peak_memory(_pass_over(forward, largest, feed, ticks), device), loaded or 0)  # Linux counts in batches
    timed = timed_passes(_pass_over(forward, inputs.batches, feed, ticks), device, job.repeats)
    next(ticks, None)  # closes the bar
    start, end = inputs.restored(timed.result)
    lengths = inputs.windows.lengths
    mask = None if job.mask is None else GlobalMask.load(job.mask)
    measured = Measured(
        seconds=timed.seconds,
        warm_up_seconds=timed.warm_up_seconds,
        joules=timed.joules,
        peak_memory_bytes=peak,
        loaded_memory_bytes=loaded,
        processed_tokens=sum(tokens),
        flops=flops_per_token * int(lengths.sum()) + attention_flops(model.config, lengths, mask),
        kernel=kernel,
    )
    return measured, {"start": start.contiguous(), "end": end.contiguous()}


def _loaded(job: Job) -> PreTrainedModel:
    dtype = getattr(torch, job.dtype)
    attention = "eager" if job.attention == "eager" else "sdpa"
    if job.checkpoint in SHAPES:
        return build_shape(job.checkpoint, job.seed, dtype, attention)
    return AutoModelForQuestionAnswering.from_pretrained(
        job.checkpoint,
        attn_implementation=attention,
        dtype=dtype,
        local_files_only=Path(job.checkpoint).is_dir(),
        trust_remote_code=job.trust_remote_code,
    ).eval()


def _prepared(job: Job, model: PreTrainedModel) -> tuple[PreTrainedModel, str | None]:
    """The model with the variant's attention, and by which function that is computed."""
    if job.attention == "packed":
        return model, use_packed(model)
    if job.attention == "flash":
        return model, use_flash(model)
    if job.attention == "flex":
        return model, use_flex(model, GlobalMask.load(job.mask))
    if job.attention == "sparse":
        tables = None if job.tables is None else [QuantizationTable(*table) for table in job.tables]
        patch_model(model, GlobalMask.load(job.mask), tables, unpad=job.padding == "none", onednn=job.onednn)
        if job.compiled:  # layer by layer: what drops padding between them has shapes that depend on the data
            for layer in _layers(model):
                layer.compile(dynamic=True)
    return model, None


def _layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    for stack in encoder_of(model).stacks:
        for child in stack.children():
            if isinstance(child, torch.nn.ModuleList):
                yield from child


def _feed(job: Job, inputs: Inputs, model: PreTrainedModel, device: torch.device) -> Feed:
    if job.attention in ("packed", "flash"):
        return packed_feed(inputs, device, model)
    if job.attention == "flex":
        return blocks_feed(inputs, device, job.max_length)
    return padded_feed(inputs, device, job.max_length if job.padding == "max" else None)


@torch.no_grad()
def _processed_tokens(job: Job, inputs: Inputs, feed: Feed, batch: list[int]) -> int:
    """Those that the model works on, the padding that it sees included."""
    if job.padding != "none":
        return feed(batch)["input_ids"].numel()
    packing = Packing.of(feed(batch)["attention_mask"].bool()) if job.attention == "sparse" else None
    return packing.rows if isinstance(packing, Packing) else int(inputs.windows.lengths[batch].sum())


def _pass_over(model, batches: list[list[int]], feed: Feed, ticks: Iterator[int]) -> Callable[[], list[torch.Tensor]]:
    """A pass over all batches; it returns the start and end logits of each, float32 [2, rows, length] on the host."""

    @torch.no_grad()  # nested tensors do not work in inference mode
    def run_pass() -> list[torch.Tensor]:
        logits = []
        for indices in batches:
            outputs = model(**feed(indices))
            logits.append(torch.stack((outputs.start_logits, outputs.end_logits)).float())
            next(ticks)
        return [one.cpu() for one in logits]

    return run_pass


def main(arguments: list[str]) -> None:
    spec, out = Path(arguments[0]), Path(arguments[1])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        measured, logits = measure(Job(**json.loads(spec.read_text())))
    except Absent as reason:
        out.with_suffix(".json").write_text(json.dumps({"absent": str(reason)}))
        return
    save_file(logits, out.with_suffix(".safetensors"))
    out.with_suffix(".json").write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main(sys.argv[1:])
