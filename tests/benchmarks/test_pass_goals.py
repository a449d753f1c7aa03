"""Goals for whole passes, on made-up results."""

from benchmarks.pass_goals import collection_goals, long_goals, squad_goals
from benchmarks.squad.summary import SUMMARY_COLUMNS, heading, published_cells, summary_cells


def row(variant, seconds, memory=1.0, mask=None, bits=None, f1=None, granularity=None):
    return {
        "variant": variant, "attention": "sparse" if variant.startswith("sparse") else "sdpa", "seconds": seconds,
        "peak_memory_bytes": memory * 1e9, "mask": mask, "bits": bits, "f1": f1, "em": f1, "dtype": "float32",
        "granularity": granularity, "sparsity": 0.9 if mask else 0.0, "speedup": 8.0 / seconds,
    }  # fmt: skip


def results(rows, model="bert-base-shape", finetune=False):
    return {"model": model, "arguments": {"finetune": finetune}, "rows": rows}


TIMES = [
    row("eager-padded", 8.0, 2.0), row("sdpa-sorted", 2.39), row("sdpa-unpadded", 2.2),
    row("sparse-padded", 4.0, 1.5, "element 0.9"), row("sparse-unpadded", 2.0, 1.21, "element 0.9"),
]  # fmt: skip


def test_a_pass_is_compared_with_each_peer_and_its_memory_with_eager():
    times, sorted_peer, memory = squad_goals(results(TIMES))
    assert (times.figure, times.goal, times.met) == ("4.00x", "at least 4x as fast", True)
    assert (sorted_peer.figure, sorted_peer.met) == ("1.19x", False), "not rounded to the goal"
    assert (memory.figure, memory.goal, memory.met) == ("61%", "at most 60%", False)
    assert "sparse-unpadded" in memory.what
    assert list(squad_goals(results(TIMES[:3]))) == []
    *_, memory = squad_goals(results([{**one, "loaded_memory_bytes": 1e9} for one in TIMES]))
    assert memory.figure == "61% (21% beyond the loaded model)"


def test_on_a_gpu_the_best_peer_counts():
    rows = [{**one, "dtype": "bfloat16"} for one in TIMES]
    found = list(squad_goals({**results(rows), "device_type": "cuda"}))
    assert [one.goal for one in found] == ["at least 4x as fast", "at least 1.1x as fast", "at most 50%"]
    assert found[1].what.endswith("against sdpa-unpadded") and found[1].met
    rows = [{**one, "matrix_share": 0.4499} for one in rows]
    *_, share, _ = squad_goals({**results(rows), "device_type": "cuda"})
    assert (share.goal, share.figure, share.met) == ("at least 45%", "44%", False)


def test_accuracy_is_compared_with_dense_and_bits_with_none():
    rows = [
        row("sparse-padded", 1, mask="element 0.9", f1=45.0, granularity="element"),
        row("eager-padded", 1, f1=46.0),
        row("sparse-unpadded", 1, mask="element 0.9", f1=45.0, granularity="element"),
        row("sparse-unpadded", 1, mask="tile 0.9", f1=44.999, granularity="tile"),
        row("sparse-unpadded", 1, mask="tile 0.9", bits=3, f1=45.5, granularity="tile"),
    ]
    found = list(squad_goals(results(rows, "minilm", finetune=True)))
    assert [(one.figure, one.met) for one in found] == [("-1.00", True), ("-1.01", False), ("+0.50", True)]
    assert "3 bits against sparse-unpadded, 90% tile" in found[2].what
    assert list(squad_goals(results(rows, "minilm"))) == [], "pruned without recovery"


def test_long_documents_and_collections():
    rows = [{"variant": name, "mask": mask, "bits": None, "p50_s": seconds} for name, mask, seconds in (
        ("eager", "dense", 9.0), ("sdpa", "dense", 4.0), ("sparse", "element", 2.5), ("sparse", "tile", 2.0),
    )]  # fmt: skip
    (one,) = long_goals({"rows": rows})
    assert (one.what, one.figure, one.met) == ("sparse, tile against sdpa", "2.00x", True)
    assert list(long_goals({"rows": rows[:2]})) == []
    flex = {"variant": "flex", "mask": "tile", "bits": None, "p50_s": 2.2}
    (one,) = long_goals({"rows": [*rows, flex]})
    assert (one.what, one.figure, one.met) == ("sparse, tile against flex", "1.10x", False)
    ways = [
        {"model": "m", "batches": kind, "way": way, "median_s": seconds}
        for kind, plain in (("padded", 4.0), ("sorted", 3.9))
        for way, seconds in (("output_attentions", plain), ("collect_averages", 2.0))
    ]
    assert [(one.figure, one.met) for one in collection_goals({"rows": ways})] == [("2.00x", True), ("1.95x", False)]


def test_the_summary_shows_the_baseline_the_fastest_peer_and_the_fastest_of_ours():
    measured = {**results(TIMES), "data": {"name": "x"}, "device": "a CPU", "checkpoints": {"dense": {}}}
    measured["arguments"] = {"dtype": "float32"}
    named, *figures = summary_cells(measured, "file.json")
    assert named == "[bert-base-shape, x, float32](file.json)"
    assert figures == [
        "a CPU", "8.00", "sdpa-unpadded 2.20", "sparse-unpadded 2.00", "90%", "4.00x", "1.10x", "–",
        "2.00 GB → 1.21 GB",
    ]  # fmt: skip
    trained = {"losses": [1.0], "how": "distilled"}
    measured |= {"checkpoints": {"dense": {}, "sparse": trained}, "rows": [{**one, "f1": 50.0} for one in TIMES]}
    measured["rows"].append({**TIMES[-1], "bits": 3, "seconds": 1.0, "f1": 49.0})
    assert summary_cells(measured, "")[4:6] == ["sparse-unpadded 1.00", "90%, 3 bits, trained with it"]
    assert summary_cells(measured, "")[8] == "50.00 → 49.00"
    assert len(published_cells()) == len(SUMMARY_COLUMNS) == len(figures) + 1


def test_a_heading_tells_runs_with_other_levels_apart():
    measured = {**results(TIMES), "data": {"name": "x"}}
    measured["arguments"] = {"dtype": "float32"}
    assert heading(measured) == "bert-base-shape, x, float32"
    measured["rows"] = [*TIMES, {**TIMES[-1], "bits": 3, "table": "calibrated"}]
    assert heading(measured) == "bert-base-shape, x, float32, calibrated levels"
