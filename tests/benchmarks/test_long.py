"""`python -m benchmarks.long`, on short documents."""

import json

import pytest
import torch

from benchmarks import long, long_variants
from benchmarks.long_variants import Document, Variant, Wrong, check, variants_on


def test_measures_every_variant(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(long, "_in_own_process", lambda document, variant: 10**9)
    out = tmp_path / "long.json"
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
    assert long.main([*arguments, "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [(row["variant"], row["mask"], row["bits"]) for row in results["rows"]] == [
        ("sdpa", "dense", None), ("sparse", "element", None), ("sparse", "tile", None), ("sparse", "tile", 3),
    ]  # fmt: skip
    for row in results["rows"]:
        assert row["tokens_per_second"] == pytest.approx(256 / row["p50_s"])
    assert results["document"]["length"] == 256 and results["failures"] == []
    text = capsys.readouterr().out
    assert "1.00x" in text and "1.00 GB" in text


def test_memory_is_that_of_a_process_of_its_own():
    document = Document(1, 64, 1, 0.5, "float32", "cpu")
    assert 10**8 < long._in_own_process(document, Variant("sdpa", "sdpa")) < 10**10


def test_wrong_variants_are_not_timed(monkeypatch):
    document = Document(1, 256, 1, 0.3, "float32", "cpu")
    check(document, Variant("sparse", "sdpa", "element"))
    make = long_variants.make
    monkeypatch.setattr(long_variants, "make", lambda *arguments: lambda inputs: 1.01 * make(*arguments)(inputs))
    with pytest.raises(Wrong, match="off by 1.0e-02 of its size"):
        check(document, Variant("sparse", "sdpa", "element"))
    rows, failures = long.measure(document, [Variant("sdpa", "sdpa")], 0.01)
    assert rows == [] and failures[0]["variant"] == "sdpa, dense"


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
