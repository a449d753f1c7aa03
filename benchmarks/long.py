"""Whole passes of an encoder over long documents, dense and sparse: `python -m benchmarks.long --help`.

The model has BERT-base's shape with 4,096 positions and random weights, the masks keep 10 % of the positions: a band,
global tokens and stripes of keys. Attention is about half of the dense arithmetic at that length. Times are taken in
turns in one process, peak memory after that: in the same process on a GPU, in one for each variant on a CPU. Writes
JSON when the times are there and again after every figure of memory, and prints a table, also after an interrupt, and
where the file cannot be written.
"""

from __future__ import annotations

import gc
import sys
from argparse import Namespace
from typing import Any

import torch

from .device import circumstances, pick_device
from .long_variants import Document, Variant, check, forget_layouts, inputs_of, make, variants_on
from .measure import current_memory, in_own_process, peak_memory
from .options import DTYPES, OneLineParser, at_least, chosen, fail, file_to_write, kept_share, names, positive
from .pages import ABSENT, Table, write_json
from .timing import make_timer, percentiles, time_in_turns

COLUMNS = ("variant", "mask", "bits", "seconds", "tokens/s", "against sdpa", "peak memory")


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = OneLineParser(prog="python -m benchmarks.long", description="Times encoders on long documents.")
    parser.add_argument("--length", type=at_least(64), default=4096, help="tokens of a document (default: %(default)s)")
    parser.add_argument("--batch", type=at_least(1), help="documents (default: 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--layers", type=at_least(1), default=12, help="(default: %(default)s)")
    parser.add_argument("--density", type=kept_share, default=0.1, help="kept share (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--variants", type=names, help="by commas (default: all that the device is for)")
    parser.add_argument(
        "--seconds", type=positive, default=20.0, help="of time for each variant (default: %(default)s)"
    )
    parser.add_argument("--json", type=file_to_write, metavar="OUT", default="results/long.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 for input of no use, 1 where a variant failed or the file could not be written, 130
    after an interrupt."""
    options = parse_options(arguments)
    try:
        device = pick_device(options.device)
        document = _document(options, device)
        known = variants_on(device)
        wanted = chosen("--variants", options.variants, list(dict.fromkeys(one.name for one in known)))
    except ValueError as error:
        return fail("long", error, status=2)
    variants = [one for one in known if one.name in wanted]
    rows, failures, interrupted = measure(document, variants, options.seconds)
    results: dict[str, Any] = {
        **circumstances(device),
        "document": {name: value for name, value in vars(document).items() if name != "device_type"},
        "rows": list(rows.values()),
        "failures": failures,
    }
    try:
        write_json(results, options.json)
        for variant, row in () if interrupted else rows.items():
            try:
                row["peak_memory_bytes"] = _memory(document, variant)
            except RuntimeError as error:  # no memory left, or a process that was killed
                failures.append(_failure(variant, error, "peak memory: "))
            write_json(results, options.json)
    except KeyboardInterrupt:
        interrupted = True
    except OSError as error:
        table(results).print()
        return fail("long", error, status=1)
    table(results).print()
    print(options.json)
    if interrupted:
        return fail("long", "interrupted; what is missing was not measured", status=130)
    return int(bool(failures))


def _failure(variant: Variant, error: Exception, what: str = "") -> dict[str, str]:
    return {"variant": variant.label, "reason": what + " ".join(str(error).split())}


def _document(options: Namespace, device: torch.device) -> Document:
    gpu = device.type == "cuda"
    return Document(
        batch=options.batch or (8 if gpu else 1),
        length=options.length,
        layers=options.layers,
        density=options.density,
        dtype=options.dtype or ("bfloat16" if gpu else "float32"),
        device_type=device.type,
    )


def measure(
    document: Document, variants: list[Variant], seconds: float
) -> tuple[dict[Variant, dict[str, Any]], list[dict[str, str]], bool]:
    """Rows in the order of `variants`, still without peak memory; what failed; and whether an interrupt ended it."""
    device = torch.device(document.device_type)
    inputs, timer, calls, failures, interrupted = inputs_of(document), make_timer(device), {}, [], False
    try:
        for variant in variants:
            try:
                check(document, variant)
                forward = make(document, variant)
                calls[variant] = timer.prepare(lambda forward=forward: forward(inputs), seconds)
            except Exception as error:  # also of compilers, which have their own kinds
                failures.append(_failure(variant, error))
        time_in_turns(timer, list(calls.values()), [seconds] * len(calls))
    except KeyboardInterrupt:
        interrupted = True
    rows = {}
    for variant, timed in calls.items():
        if timed.failure is not None:
            failures.append(_failure(variant, timed.failure))
            continue
        if interrupted and len(timed.milliseconds) < 2:
            continue
        p20, p50, p80 = (milliseconds / 1e3 for milliseconds in percentiles(timed.milliseconds))
        rows[variant] = {
            "variant": variant.name, "mask": variant.mask, "bits": variant.bits, "dtype": document.dtype,
            "p20_s": p20, "p50_s": p50, "p80_s": p80, "tokens_per_second": document.batch * document.length / p50,
            "peak_memory_bytes": None,
        }  # fmt: skip
    return rows, failures, interrupted


def _memory(document: Document, variant: Variant) -> int:
    """Peak memory of one pass in bytes, the model included; on a CPU also Python and its libraries."""
    if document.device_type == "cuda":
        return _memory_here(document, variant)
    return in_own_process(_peak, document, variant)


def _memory_here(document: Document, variant: Variant) -> int:
    """As in a process of its own: nothing of other variants counts, and what they share is made again."""
    forget_layouts()
    torch.compiler.reset()
    gc.collect()
    held = current_memory(torch.device(document.device_type))  # by libraries: workspaces
    return _peak(document, variant) - held


def _peak(document: Document, variant: Variant) -> int:
    forward, inputs = make(document, variant), inputs_of(document)
    return peak_memory(lambda: forward(inputs), torch.device(document.device_type))


def table(results: dict[str, Any]) -> Table:
    """The rows, and what failed, as they are shown."""
    document, rows = results["document"], results["rows"]
    plain = next((row["p50_s"] for row in rows if row["variant"] == "sdpa"), None)
    cells = [
        [
            row["variant"], row["mask"], ABSENT if row["bits"] is None else str(row["bits"]), f"{row['p50_s']:.3f}",
            f"{row['tokens_per_second']:,.0f}", ABSENT if plain is None else f"{plain / row['p50_s']:.2f}x",
            ABSENT if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
        ]
        for row in rows
    ]  # fmt: skip
    shape = f"{document['batch']} x {document['length']:,} tokens, {document['layers']} layers, {document['dtype']}"
    return Table(
        title=f"{results['device']}: {shape}",
        columns=COLUMNS,
        rows=cells,
        text_columns=2,
        notes=[f"{failure['variant']}: {failure['reason']}" for failure in results["failures"]],
    )


if __name__ == "__main__":
    sys.exit(main())
