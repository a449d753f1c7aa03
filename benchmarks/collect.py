"""Collecting average attention beside `output_attentions=True`: `python -m benchmarks.collect --help`.

The plain way asks transformers' eager attention for all probabilities of a batch and adds them up, rows of padding left
out. Both must give the same averages before they are timed, in turns; peak memory is that of a process for each.
Prints a table and writes JSON.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from sparse_attn import AttentionAverages, collect_averages
from sparse_attn.squad.reading import read_squad
from sparse_attn.squad.windows import MODEL_INPUTS, collate, length_sorted_batches, make_windows

from .device import circumstances, pick_device, synchronize
from .measure import in_own_process, peak_memory
from .options import OneLineParser, at_least, chosen, fail, file_to_write, names
from .pages import ABSENT, Table, write_json
from .squad.checkpoints import load_model, load_tokenizer, packaged_model
from .squad.data import OWN_QUESTIONS
from .squad.shapes import build_shape
from .verdicts import Wrong

MODELS = ("minilm", "bert-base-shape")
BATCHES = {
    "padded": "in the order of the data, padded to the greatest length",
    "longest": "in the order of the data, padded to the longest window of each batch",
    "sorted": "sorted by length",
}
MAX_LENGTH = 384
TOLERANCE = 5e-6  # of a mean: models in float32 are 1e-6 off the same model in float64, whatever adds them up
COLUMNS = ("model", "batches", "way", "seconds", "windows/s", "against output_attentions", "peak memory")

Batch = dict[str, torch.Tensor]


def output_attentions(model: PreTrainedModel, batches: Sequence[Batch]) -> AttentionAverages:
    """The plain way. The products with the mask are summed over the batch: of einsum, matmul and this, the fastest."""
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    device = next(model.parameters()).device
    sums = torch.zeros(layers, heads, MAX_LENGTH, MAX_LENGTH, dtype=torch.float64, device=device)
    counts = torch.zeros(MAX_LENGTH, MAX_LENGTH, device=device)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            real = inputs["attention_mask"].float()
            length = real.shape[1]
            for layer, attention in enumerate(model(**inputs, output_attentions=True).attentions):
                sums[layer, :, :length, :length] += (attention * real[:, None, :, None]).sum(0)
            counts[:length, :length] += real.T @ real
    return AttentionAverages(sums.cpu(), counts.long().cpu())


def collected(model: PreTrainedModel, batches: Sequence[Batch]) -> AttentionAverages:
    return collect_averages(model, batches, max_length=MAX_LENGTH, shard=False, progress=False)


WAYS: dict[str, Callable[[PreTrainedModel, Sequence[Batch]], AttentionAverages]] = {
    "output_attentions": output_attentions,
    "collect_averages": collected,
}


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = OneLineParser(prog="python -m benchmarks.collect", description="Times the collection of averages.")
    parser.add_argument("--data", type=Path, default=OWN_QUESTIONS, help="SQuAD v1.1 file (default: own questions)")
    parser.add_argument("--windows", type=at_least(1), default=64, help="drawn from it (default: %(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="(default: %(default)s)")
    parser.add_argument("--models", type=names, help=f"by commas, of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--batches", type=names, help=f"by commas, of {', '.join(BATCHES)} (default: all)")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="of each way (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--json", type=file_to_write, metavar="OUT", default="results/collect.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for input of no use, 1 where the two ways disagree or a figure is missing."""
    options = parse_options(arguments)
    try:
        device = pick_device(options.device)
        models = chosen("--models", options.models, list(MODELS))
        kinds = chosen("--batches", options.batches, list(BATCHES))
        made = {kind: make_batches(kind, options.data, options.windows, options.batch_size) for kind in kinds}
        failures: list[str] = []
        rows = [
            row
            for name in models
            for kind in kinds
            for row in measure(name, kind, made[kind], options, device, failures)
        ]
    except (ValueError, OSError, ImportError) as error:
        return fail("collect", error, status=2)
    except Wrong as error:
        return fail("collect", error, status=1)
    batches = next(iter(made.values()))
    results = {
        **circumstances(device),
        "arguments": {"data": options.data.name, "batch_size": options.batch_size, "repeats": options.repeats},
        "windows": sum(len(batch["input_ids"]) for batch in batches),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "rows": rows,
        "failures": failures,
    }
    table(results).print()
    try:
        write_json(results, options.json)
    except OSError as error:
        return fail("collect", error, status=1)
    print(options.json)
    return int(bool(failures))


def make_batches(kind: str, data: Path, count: int, batch_size: int) -> list[Batch]:
    """The same windows whatever the kind of batches, at most `count`."""
    tokenizer = load_tokenizer(packaged_model())
    windows = make_windows(read_squad(data), tokenizer, max_length=MAX_LENGTH)
    windows = random.Random(0).sample(windows, min(count, len(windows)))
    indices = length_sorted_batches(windows, batch_size)
    if kind != "sorted":
        in_order = range(len(windows))
        indices = [in_order[first : first + batch_size] for first in range(0, len(windows), batch_size)]
    pad_to = MAX_LENGTH if kind == "padded" else None
    batches = [collate([windows[index] for index in batch], tokenizer.pad_token_id, pad_to) for batch in indices]
    return [{name: batch[name] for name in MODEL_INPUTS} for batch in batches]


def load(name: str, device: torch.device) -> PreTrainedModel:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name == "minilm":
        return load_model(packaged_model())[0].to(device)
    return build_shape(name, 0, torch.float32, "sdpa").to(device)


def measure(
    name: str, kind: str, batches: list[Batch], options: Namespace, device: torch.device, failures: list[str]
) -> list[dict]:
    """A row for each way; what could not be measured of it is added to `failures`. Raises Wrong where the averages
    disagree."""
    model = load(name, device)
    means = [way(model, batches).mean for way in WAYS.values()]  # also warms both up
    difference = (means[0] - means[1]).abs().max().item()
    if not difference <= TOLERANCE:
        raise Wrong(f"{name}, {kind}: averages differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way, run in WAYS.items():
            synchronize(device)
            start = time.perf_counter()
            run(model, batches)
            synchronize(device)
            seconds[way].append(time.perf_counter() - start)
    del model
    return [
        {
            "model": name,
            "batches": kind,
            "way": way,
            "median_s": statistics.median(taken),
            "seconds": taken,
            "largest_difference": difference,
            "peak_memory_bytes": _in_own_process(name, kind, way, options, device, failures),
        }
        for way, taken in seconds.items()
    ]


def _in_own_process(
    name: str, kind: str, way: str, options: Namespace, device: torch.device, failures: list[str]
) -> int | None:
    try:
        return in_own_process(memory_of, name, kind, way, options, device)
    except RuntimeError as error:  # no memory left, or a process that was killed
        failures.append(f"{name}, {kind}, {way}: peak memory: {' '.join(str(error).split())}")
        return None


def memory_of(name: str, kind: str, way: str, options: Namespace, device: torch.device) -> int:
    """Peak memory of one way in bytes, the model included; on a CPU also Python and its libraries."""
    batches, model = make_batches(kind, options.data, options.windows, options.batch_size), load(name, device)
    return peak_memory(lambda: WAYS[way](model, batches), device)


def table(results: dict[str, Any]) -> Table:
    """The rows as they are shown."""
    rows, arguments = results["rows"], results["arguments"]
    plain = {(row["model"], row["batches"]): row["median_s"] for row in rows if row["way"] == "output_attentions"}
    cells = [
        [
            row["model"], row["batches"], row["way"], f"{row['median_s']:.2f}",
            f"{results['windows'] / row['median_s']:.1f}",
            f"{plain[row['model'], row['batches']] / row['median_s']:.2f}x",
            ABSENT if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
        ]
        for row in rows
    ]  # fmt: skip
    return Table(
        title=f"{results['device']}: average attention of {results['windows']} windows, {results['tokens']:,} tokens",
        columns=COLUMNS,
        rows=cells,
        text_columns=3,
        notes=[
            f"{arguments['data']}, batches of {arguments['batch_size']}, median of {arguments['repeats']}",
            *(f"{kind}: {text}" for kind, text in BATCHES.items() if kind in {row["batches"] for row in rows}),
            *results.get("failures", []),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
