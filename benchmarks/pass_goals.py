"""What whole passes of a model are to reach, and how far SQuAD, long-document and collection results are from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .pages import row_name
from .squad.summary import fastest, fastest_peer
from .squad.table import is_own, mask_text

Row = dict[str, Any]
Results = dict[str, Any]


@dataclass(frozen=True)
class Reached:
    """A goal, and what was measured.

    Attributes:
        what: is measured, in words.
        goal: what it shall be, in words.
        figure: what it is, in words; rounded so that a goal just missed does not look met.
        met: whether the goal is.
    """

    what: str
    goal: str
    figure: str
    met: bool


def at_least(what: str, ratio: float, goal: float) -> Reached:
    rounded = math.floor(round(ratio * 100, 6)) / 100
    return Reached(what, f"at least {goal:g}x as fast", f"{rounded:.2f}x", ratio >= goal)


# (device type, dtype) -> how many times as fast as these rows the pass of BERT-base's shape shall be; None: any peer
_PASSES = {
    ("cpu", "float32"): (("eager-padded", 4.0), ("sdpa-sorted", 1.2)),
    ("cpu", "bfloat16"): (("eager-padded", 4.5), ("sdpa-sorted", 1.2)),
    ("cuda", "bfloat16"): (("eager-padded", 4.0), ("sdpa-padded", 2.0), (None, 1.1)),
}
_MATRIX_SHARES = {("cuda", "bfloat16"): 0.45}  # of the measured rate of matrix products, at least
_MEMORY = {"cpu": 0.6, "cuda": 0.5}  # of eager-padded, at most
_LONG = 2.0
_COLLECTION = 2.0
_F1 = 1.0  # points that pruning, and then rounding, may lose after recovery


def squad_goals(results: Results) -> Iterator[Reached]:
    """Times and memory with BERT-base's shape, accuracy after fine-tuning and recovery."""
    own = [row for row in results["rows"] if is_own(row)]
    if not own:
        return
    if results["model"] == "bert-base-shape":
        yield from _pass_goals(results, fastest(own))
    elif results["arguments"]["finetune"]:
        yield from _accuracy_goals(results, own)


def _pass_goals(results: Results, own: Row) -> Iterator[Reached]:
    device = results.get("device_type", "cpu")
    by_name = {row["variant"]: row for row in results["rows"]}
    for name, goal in _PASSES.get((device, own["dtype"]), ()):
        other = fastest_peer(results) if name is None else by_name.get(name)
        if other is not None:
            what = f"{_named(own)} against {other['variant']}"
            yield at_least(what, other["seconds"] / own["seconds"], goal)
    least = _MATRIX_SHARES.get((device, own["dtype"]))
    if least is not None and "matrix_share" in own:
        share, figure = own["matrix_share"], f"{math.floor(round(own['matrix_share'] * 100, 6))}%"
        yield Reached(f"{_named(own)}, of the matrix rate", f"at least {least:.0%}", figure, share >= least)
    eager = by_name.get("eager-padded")
    if eager is not None:
        share = own["peak_memory_bytes"] / eager["peak_memory_bytes"]
        goal = _MEMORY[device]
        figure = _percent(share)
        if own.get("loaded_memory_bytes") and eager.get("loaded_memory_bytes"):
            beyond, eager_beyond = (row["peak_memory_bytes"] - row["loaded_memory_bytes"] for row in (own, eager))
            figure += f" ({_percent(beyond / eager_beyond)} beyond the loaded model)"
        yield Reached(f"peak memory of {_named(own)}, of eager-padded's", f"at most {goal:.0%}", figure, share <= goal)


def _percent(share: float) -> str:
    return f"{math.ceil(round(share * 100, 6))}%"


def _accuracy_goals(results: Results, own: Sequence[Row]) -> Iterator[Reached]:
    dense = next((row for row in results["rows"] if row["mask"] is None), None)
    kinds = {(row["granularity"], row["bits"]): row for row in own}  # padded or not, the answers are the same
    exact = {granularity: row for (granularity, bits), row in kinds.items() if bits is None}
    for row in kinds.values():
        other = dense if row["bits"] is None else exact.get(row["granularity"])
        if other is None:
            continue
        difference = row["f1"] - other["f1"]
        what = f"F1 of {_named(row)} against {_named(other)}"
        goal, figure = f"at least {-_F1:+g}", f"{math.floor(round(difference * 100, 6)) / 100:+.2f}"
        yield Reached(what, goal, figure, difference >= -_F1)


def long_goals(results: Results) -> Iterator[Reached]:
    """Our fastest pass over long documents against the fastest peer."""
    own = [row for row in results["rows"] if row["variant"].startswith("sparse")]
    peers = [row for row in results["rows"] if not row["variant"].startswith("sparse")]
    if own and peers:
        best, peer = (min(rows, key=lambda row: row["p50_s"]) for rows in (own, peers))
        name = row_name(best["variant"], best["mask"], bits=best["bits"])
        yield at_least(f"{name} against {peer['variant']}", peer["p50_s"] / best["p50_s"], _LONG)


def collection_goals(results: Results) -> Iterator[Reached]:
    """Each model's and kind of batches' collection against `output_attentions=True`."""
    taken = {(row["model"], row["batches"], row["way"]): row["median_s"] for row in results["rows"]}
    for (model, batches, way), seconds in taken.items():
        plain = taken.get((model, batches, "output_attentions"))
        if way == "collect_averages" and plain is not None:
            yield at_least(f"{model}, {batches}: against output_attentions", plain / seconds, _COLLECTION)


def _named(row: Row) -> str:
    return row_name(row["variant"], None if row["mask"] is None else mask_text(row), bits=row["bits"])
