"""`python -m benchmarks.long`, on short documents."""

import json
import weakref

import pytest
import torch

from benchmarks import long, long_variants
from benchmarks.long_variants import Document, Variant, check, variants_on
from benchmarks.pages import ABSENT
from benchmarks.timing import HostTimer
from benchmarks.verdicts import Wrong
from tests.helpers import CUDA


def test_measures_every_variant(tmp_path, capsys, monkeypatch):
    out, written = tmp_path / "long.json", []

    def memory(document, variant):
        written.append([row["peak_memory_bytes"] for row in json.loads(out.read_text())["rows"]])
        if variant.bits:
            raise RuntimeError("out of\nmemory")
        return 10**9

    monkeypatch.setattr(long, "_memory", memory)
    arguments = [
        "--device",
        "cpu",
        "--length",
        "256",
        "--layers",
        "1",
        "--density",
        "0.3",
        "--seconds",
        "0.01",
        "--variants",
        "sdpa,sparse",
    ]
    assert long.main([*arguments, "--json", str(out)]) == 1
    results = json.loads(out.read_text())
    assert [(row["variant"], row["mask"], row["bits"]) for row in results["rows"]] == [
        ("sdpa", "dense", None), ("sparse", "element", None), ("sparse", "tile", None), ("sparse", "tile", 3),
    ]  # fmt: skip
    for row in results["rows"]:
        assert row["tokens_per_second"] == pytest.approx(256 / row["p50_s"])
    assert results["document"]["length"] == 256
    assert results["failures"] == [{"variant": "sparse, tile, 3 bits", "reason": "peak memory: out of memory"}]
    assert written == [[10**9] * known + [None] * (4 - known) for known in range(4)], "times first, then each figure"
    text = capsys.readouterr().out
    assert "1.00x" in text and "1.00 GB" in text
    assert [cells[-1] for cells in long.table(results).rows] == ["1.00 GB"] * 3 + [ABSENT]


def test_a_file_that_cannot_be_written_costs_no_table(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(long, "write_json", full)
    small = ["--length", "64", "--layers", "1", "--seconds", "0.01", "--variants", "sdpa"]
    assert long.main([*small, "--device", "cpu", "--json", str(tmp_path / "long.json")]) == 1
    printed = capsys.readouterr()
    assert "1.00x" in printed.out and "benchmarks.long: error: [Errno 28]" in printed.err


def test_an_interrupt_costs_what_was_not_yet_measured(tmp_path, capsys, monkeypatch):
    out, rounds = tmp_path / "long.json", []
    repeat = HostTimer.repeat

    def interrupted_in_the_third(timer, timed):
        if len(rounds) == 2:
            raise KeyboardInterrupt
        rounds.append(len(timed))
        repeat(timer, timed)

    monkeypatch.setattr(HostTimer, "repeat", interrupted_in_the_third)
    small = ["--length", "64", "--layers", "1", "--density", "0.9", "--seconds", "0.01", "--variants", "sdpa,eager"]
    assert long.main([*small, "--device", "cpu", "--json", str(out)]) == 130
    rows = json.loads(out.read_text())["rows"]
    assert [(row["variant"], row["peak_memory_bytes"]) for row in rows] == [("eager", None), ("sdpa", None)]
    printed = capsys.readouterr()
    assert "1.00x" in printed.out and "interrupted" in printed.err


def test_memory_on_a_cpu_is_that_of_a_process_of_its_own():
    document = Document(1, 64, 1, 0.5, "float32", "cpu")
    assert 10**8 < long._memory(document, Variant("sdpa", "sdpa")) < 10**10


def test_memory_on_a_gpu_is_measured_here_without_what_others_hold(monkeypatch):
    document = Document(1, 256, 2, 0.5, "float32", "cuda")
    lists = weakref.ref(long_variants._mask(document, "tile", 256).layout(0).lists(16))
    monkeypatch.setattr(long, "current_memory", lambda device: 30 if lists() is None else 1000)
    monkeypatch.setattr(long, "_peak", lambda document, variant: 100)
    assert long._memory(document, Variant("sparse", "sdpa", "tile")) == 70


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_memory_on_a_gpu_does_not_depend_on_what_was_measured_before():
    document = Document(2, 512, 2, 0.5, "bfloat16", "cuda")
    variant = Variant("sparse", "sdpa", "tile")
    long._memory(document, variant)  # libraries make their workspaces
    first = long._memory(document, variant)
    long.measure(document, [variant, Variant("eager", "eager")], 0.01)
    assert long._memory(document, variant) == pytest.approx(first, rel=0.01)


def test_wrong_variants_are_not_timed(monkeypatch):
    document = Document(1, 256, 1, 0.3, "float32", "cpu")
    check(document, Variant("sparse", "sdpa", "element"))
    make = long_variants.make
    monkeypatch.setattr(long_variants, "make", lambda *arguments: lambda inputs: 1.01 * make(*arguments)(inputs))
    with pytest.raises(Wrong, match="off by 1.0e-02 of its size"):
        check(document, Variant("sparse", "sdpa", "element"))
    rows, failures, _ = long.measure(document, [Variant("sdpa", "sdpa")], 0.01)
    assert rows == {} and failures[0]["variant"] == "sdpa, dense"


def test_a_mask_is_checked_on_the_first_tokens_of_its_own_length():
    """Short masks of little density do not exist: global tokens and stripes keep more."""
    document = Document(1, 2048, 1, 0.1, "float32", "cpu")
    check(document, Variant("sparse", "sdpa", "tile"))


def test_bad_options(tmp_path, capsys):
    assert long.main(["--variants", "sparse,dense", "--json", str(tmp_path / "out.json")]) == 2
    assert "expected names among eager, sdpa, sparse" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        long.parse_options(["--json", str(tmp_path)])
    assert {one.name for one in variants_on(torch.device("cuda"))} >= {"compiled", "sparse-compiled"}


def test_a_density_above_1_is_refused(capsys):
    with pytest.raises(SystemExit):
        long.main(["--density", "2"])
    assert "--density: 2.0 is no share above 0 and up to 1" in capsys.readouterr().err
