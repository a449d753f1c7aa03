"""Runs of the attention benchmark on tiny workloads."""

import json
import warnings

import pytest
import torch

from benchmarks import attention_run
from benchmarks.attention_run import Settings, run
from benchmarks.attention_variants import Variant, all_variants
from benchmarks.attention_workloads import FORWARD, FORWARD_BACKWARD, PASSES
from benchmarks.ceilings import Ceilings
from benchmarks.pages import write_json
from benchmarks.verdicts import Absent
from sparse_attn.backends import BACKENDS
from tests.benchmarks.attention_samples import packed_workload, tiny_workload

CPU = torch.device("cpu")
ROW_FIELDS = {
    "workload", "pass", "variant", "mask", "bits", "dtype", "p20_ms", "p50_ms", "p80_ms", "batch", "density", "work",
    "memory_share", "arithmetic_share", "error", "timing", "layers", "repetitions",
}  # fmt: skip


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(attention_run, "measure_ceilings", lambda *_: Ceilings(1e10, 1e11))


def settings(**fields):
    return Settings(**{"device": CPU, "dtype": torch.float32, "seconds": 1e-3} | fields)


def dense(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def variant(name, attend, **fields):
    return Variant(name, lambda case: attend, **fields)


def test_a_run_measures_every_variant_and_fits_the_schema(tmp_path):
    workloads = [tiny_workload(bits=(None, 3)), packed_workload()]
    variants = [one for one in all_variants() if "cpu" in one.devices]
    results = run(workloads, variants, settings())
    write_json(results, tmp_path / "new" / "attention-x.json")
    assert json.loads((tmp_path / "new" / "attention-x.json").read_text()) == results
    assert {"device", "commit", "date", "versions", "dtype", "ceilings", "seconds", "workloads"} <= results.keys()
    assert results["ceilings"] == {"copy_bytes_per_second": 1e10, "matrix_flops_per_second": 1e11}
    assert results["workloads"]["packed"]["lengths"] == [40, 17, 5] and results["workloads"]["tiny"]["tokens"] == 96

    rows = {(row["workload"], row["pass"], row["variant"], row["mask"], row["bits"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"])
    own = [name for name in BACKENDS if name not in ("reference", "triton")]
    for name in own:
        for direction in PASSES:
            assert ("tiny", direction, name, "tile", None) in rows and (
                "packed",
                direction,
                name,
                "element",
                None,
            ) in rows
        assert ("tiny", FORWARD, name, "element", 3) in rows
        assert ("tiny", FORWARD_BACKWARD, name, "element", 3) not in rows
        assert ("packed", FORWARD, name, "element", 3) not in rows
    for direction in PASSES:
        for name in ("eager", "sdpa-cpu"):
            assert ("tiny", direction, name, "dense", None) in rows and (
                "packed",
                direction,
                name,
                "element",
                None,
            ) in rows
        assert ("packed", direction, "sdpa-nested", "dense", None) in rows
        assert ("tiny", direction, "sdpa-nested", "dense", None) not in rows
    for row in results["rows"]:
        assert row.keys() == ROW_FIELDS
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert 0 <= row["error"] < 1e-4 and row["timing"] == "host" and row["repetitions"] >= 3
        assert row["layers"] == (1 if row["mask"] == "dense" else 2)
    tile = rows["tiny", FORWARD, own[0], "tile", None]
    assert tile["memory_share"] == pytest.approx(4 * 96 * 32 * 4 / 1e10 / (tile["p50_ms"] / 1e3))
    assert tile["arithmetic_share"] == pytest.approx(
        4 * 16 * tile["density"] * 2 * 2 * 48 * 48 / 1e11 / (tile["p50_ms"] / 1e3)
    )
    flex = [(one["pass"], one["reason"]) for one in results["absent"] if one["variant"] == "flex"]
    assert (FORWARD_BACKWARD, "no backward pass on CPUs") in flex and len(flex) == len(results["absent"]) == 12


def test_a_wrong_variant_gets_no_time():
    variants = [variant("right", dense), variant("wrong", lambda q, k, v: dense(q, k, v) * 1.01)]
    results = run([tiny_workload()], variants, settings())
    assert {row["variant"] for row in results["rows"]} == {"right"}
    assert [one["variant"] for one in results["absent"]] == ["wrong", "wrong"]
    assert "relative error 1.0e-02" in results["absent"][0]["reason"]


def test_whatever_a_peer_raises_is_a_reason():
    def absent(case):
        raise Absent("not installed")

    def boom(query, key, value):
        raise KeyError("/home/someone/lib/peer.py broke")

    calls = iter(range(10))

    def late(query, key, value):
        if next(calls) > 3:  # after the check and the warm-up
            raise RuntimeError("late")
        return dense(query, key, value)

    def kernelless(query, key, value):
        warnings.warn("Flash attention kernel not used because: (Triggered internally)", stacklevel=1)
        warnings.warn("It takes no mask. (Triggered internally at /a/b.cpp:1)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    def greedy(query, key, value):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    def spoiler(query, key, value):
        output = dense(query, key, value)
        key.data.sub_(1.0)
        return output

    variants = [
        Variant("absent", absent), variant("boom", boom), variant("late", late), variant("greedy", greedy),
        variant("spoiler", spoiler), variant("kernelless", kernelless), variant("good", dense),
    ]  # fmt: skip
    results = run([tiny_workload()], variants, settings(passes=(FORWARD,)))
    reasons = {one["variant"]: one["reason"] for one in results["absent"]}
    assert reasons == {
        "absent": "not installed",
        "boom": "KeyError: 'peer.py broke'",
        "late": "RuntimeError: late",
        "greedy": "out of memory",
        "spoiler": "changes its inputs",
        "kernelless": "RuntimeError: No available kernel. Aborting execution. It takes no mask.",
    }
    assert [row["variant"] for row in results["rows"]] == ["good"]
    assert all({"workload", "pass", "variant", "mask", "reason"} <= one.keys() for one in results["absent"])


def test_an_error_of_the_device_ends_one_pass_and_not_the_run(monkeypatch):
    def broken(timer, timed, seconds):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(attention_run, "time_in_turns", broken)
    results = run([tiny_workload()], [variant("good", dense)], settings())
    assert results["rows"] == []
    assert [one["reason"] for one in results["absent"]] == ["RuntimeError: illegal memory access"] * 2


def test_a_workload_that_cannot_be_made_does_not_end_the_run():
    def masks(granularity, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    own = [one for one in all_variants() if one.ours and "cpu" in one.devices]
    results = run([tiny_workload(name="large", masks=masks), tiny_workload()], own, settings(passes=(FORWARD,)))
    assert {row["workload"] for row in results["rows"]} == {"tiny"}
    assert [(one["workload"], one["variant"], one["reason"]) for one in results["absent"]] == [
        ("large", "all", "out of memory")
    ]


def test_masks_and_passes_can_be_chosen():
    results = run([tiny_workload()], all_variants(), settings(passes=(FORWARD_BACKWARD,), masks=("tile",)))
    assert {(row["pass"], row["mask"]) for row in results["rows"]} == {(FORWARD_BACKWARD, "tile")}


def test_a_budget_leaves_workloads_out_and_says_which(capsys):
    workloads = [tiny_workload(), tiny_workload(name="later")]
    results = run(workloads, [variant("good", dense)], settings(budget=1e-9))
    assert results["left_out"] == ["tiny", "later"] and results["workloads"] == {}
    assert "left out, since 1e-09 s were over: tiny, later" in capsys.readouterr().err
    assert run(workloads, [variant("good", dense)], settings(budget=60.0))["left_out"] == []
