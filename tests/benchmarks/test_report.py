"""The pages that show results show the committed ones."""

import json
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.attention_goals import outcomes
from benchmarks.attention_results import newest_results
from benchmarks.attention_table import absence_lines, goal_lines, milliseconds, print_table
from benchmarks.missed_goals import RECORD, missed_lines, reasons_of
from benchmarks.pages import between_markers, complete_files, rate
from benchmarks.pass_goals import collection_goals, long_goals, squad_goals
from benchmarks.report import (
    IMAGES,
    NO_GPU,
    README,
    RESULTS,
    SECTIONS,
    attention_rows,
    attention_section,
    attention_summary,
    draw_pictures,
    main,
    pass_section,
    pictures,
    read_results,
    squad_section,
    squad_summary,
)
from sparse_attn import GlobalMask, is_patched, log_table
from sparse_attn.integrations.routing import SparseAttentionState
from tests.benchmarks.attention_samples import make_results, make_row

ROWS = (
    make_row("triton", 0.02, mask="element", timing="stream"), make_row("triton", 0.021, mask="tile", bits=3),
    make_row("triton", 0.016, mask="tile"), make_row("sdpa-flash", 0.05), make_row("flex", 0.08, mask="element"),
    make_row("sdpa-flash", 0.15, direction="forward+backward"),
)  # fmt: skip
ABSENT = {"workload": "squad384", "pass": "forward", "variant": "flash-attn", "mask": "dense", "bits": None}


@pytest.fixture
def folder(tmp_path):
    """A folder of results with two of one device, one of them older, and one of another dtype."""
    folder = tmp_path / "benchmarks" / "results"
    (folder / "h200").mkdir(parents=True)
    absent = [ABSENT | {"reason": "not installed"}]
    older = make_results([make_row("triton", 99.0, mask="tile")], date="2026-01-01T00:00:00+00:00")
    for name, results in (
        ("attention-2.json", make_results(ROWS, absent)),
        ("attention-1.json", older),
        ("attention-3.json", make_results(ROWS[:4], dtype="bfloat16")),
    ):
        (folder / "h200" / name).write_text(json.dumps(results))
    return folder


def test_pages_show_the_committed_results():
    assert main(["--check"]) == 0, "a page is out of date: run python -m benchmarks.report"


def test_a_changed_figure_shows(tmp_path):
    source = next(RESULTS.glob("*/squad-policyqa-finetuned.json"))  # its baseline is eager-padded
    results = json.loads(source.read_text())
    results["rows"][0]["em"] = 12.34
    folder = tmp_path / "benchmarks" / "results"
    (folder / "device").mkdir(parents=True)
    (folder / "device" / "squad-x.json").write_text(json.dumps(results))
    section = squad_section(folder)
    assert "| 12.34 |" in section
    for text in (section, squad_summary(folder)):
        assert "benchmarks/results/device/squad-x.json" in text
    results["rows"] = [row for row in results["rows"] if row["variant"] != "eager-padded"]
    (folder / "device" / "squad-x.json").write_text(json.dumps(results))
    assert "squad-x.json" not in squad_summary(folder) and "squad-x.json" in squad_section(folder)
    begin, end = SECTIONS[0].markers
    assert section in between_markers(f"a {begin} old {end} b", begin, end, section)


def test_the_examples_of_the_readme_run(model_folder, tmp_path, monkeypatch):
    first, second = (part.split("```")[0] for part in README.read_text(encoding="utf-8").split("```python\n")[1:])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(first.replace("deepset/bert-base-cased-squad2", str(model_folder)), names)
    assert names["logits"].shape[0] == 2 and is_patched(names["model"])
    pruned = names["model"]
    exec(second, names)
    assert GlobalMask.load("pruned/mask.safetensors") == names["mask"]
    assert is_patched(names["model"]) and names["model"] is not pruned and not is_patched(names["dense"])
    state = next(module for module in names["model"].modules() if isinstance(module, SparseAttentionState))
    assert [table.bits for table in state.tables] == [3, 3] and log_table(3) not in state.tables
    assert torch.equal(names["model"].qa_outputs.weight, pruned.qa_outputs.weight)


def test_committed_results_name_no_machine_path():
    for path in RESULTS.glob("*/*.json"):
        results = json.loads(path.read_text())
        assert "/" not in json.dumps(results.get("arguments", results.get("document")))


def test_every_shown_picture_is_committed():
    for path, results in newest_results(RESULTS):
        for name in pictures(path, results).values():
            assert (IMAGES / name).exists(), "run python -m benchmarks.report"


def test_passes_are_shown_with_their_goals():
    section = pass_section(RESULTS)
    assert "| where | what | goal | measured | met |" in section
    for kind in ("long", "collect"):
        for path in RESULTS.glob(f"*/{kind}-*.json"):
            assert f"(../benchmarks/results/{path.parent.name}/{path.name})" in section


def test_every_missed_goal_of_the_committed_results_has_its_reason():
    missed = {}
    for path, found in newest_results(RESULTS):
        missed[path] = [one.goal.name for one in outcomes(found) if one.met is False]
    for kind, goals in (("squad", squad_goals), ("long", long_goals), ("collect", collection_goals)):
        for path, found in read_results(RESULTS, kind):
            missed[path] = [one.what for one in goals(found) if not one.met]
    for path, names in missed.items():
        explained = [goal for goals in reasons_of(path).values() for goal in goals]
        assert sorted(explained) == sorted(names), f"{path}: missed.json beside it explains other goals"
    for record in RESULTS.glob(f"*/{RECORD}"):
        assert {record.with_name(name) for name in json.loads(record.read_text())} <= missed.keys()


def test_reasons_stand_with_the_goals_that_they_explain(tmp_path):
    results = tmp_path / "squad-x.json"
    assert missed_lines(results, ["a", "b"]) == [f"- {name}: nobody has written down why" for name in "ab"]
    reasons = [{"goals": ["c", "a"], "why": "too slow"}, {"goals": ["d"], "why": "met since"}]
    (tmp_path / RECORD).write_text(json.dumps({results.name: reasons}))
    assert missed_lines(results, ["a", "b", "c"]) == ["- c; a: too slow", "- b: nobody has written down why"]
    assert missed_lines(tmp_path / "other.json", []) == []


def test_missing_markers_are_named():
    with pytest.raises(ValueError, match="lacks"):
        between_markers("no markers", *SECTIONS[0].markers, "section")


def test_the_newest_results_of_each_device_and_dtype_are_shown(folder):
    found = newest_results(folder)
    assert [(path.name, results["dtype"]) for path, results in found] == [
        ("attention-2.json", "float16"),
        ("attention-3.json", "bfloat16"),
    ]
    other = make_results(ROWS, device="AMD EPYC", device_type="cpu", dtype="float32")
    (folder / "a-cpu").mkdir()
    (folder / "a-cpu" / "attention-x.json").write_text(json.dumps(other))
    assert newest_results(folder)[-1][1]["device"] == "AMD EPYC"  # GPUs come first


def test_the_summary_compares_with_the_fastest_dense_peer(folder):
    summary = attention_summary(folder)
    row = (
        "| squad384 | forward | sdpa-flash 0.0500 | 0.0800 (0.62x) | 0.0200 (2.50x) | 0.0160 (3.12x) | 0.0210 (2.38x) |"
    )
    assert row in summary
    assert "| squad384 | forward+backward | sdpa-flash 0.150 | – | – | – | – |" in summary
    assert "NVIDIA H200, float16" in summary and NO_GPU not in summary and "99" not in summary


def test_sections_have_goals_pictures_rows_and_absences(folder):
    section = attention_section(folder) + attention_rows(folder)
    assert "| squad384 | forward | tile | – | fastest dense peer | at least 2.2x as fast | 3.12x | yes | tri" in section
    assert "| squad384 | forward | tile | – | memory floor | at most 1.4x the time | 2.00x | no | triton" in section
    assert "| long4096 | forward | tile | – | fastest dense peer | at least 6x as fast | – | not measured |" in section
    assert "![Times](images/attention-h200.svg)" in section and "images/roofline-h200-bfloat16.svg" in section
    assert "| triton* | element | – | 0.0200 | 0.0180 to 0.0220 | 2.50x | 50% | 25% | 4e-04 |" in section
    assert "- flash-attn: not installed (squad384; forward; dense)" in section
    assert "Bandwidth: 4 TB/s" in section and "matrix rate: 800 TFLOP/s" in section
    assert "(../benchmarks/results/h200/attention-2.json)" in section
    assert "12,288 real tokens. Element mask: 10% of positions, 20% of the work by 16 queries" in section


def test_a_goal_just_missed_does_not_look_met():
    rows = [make_row("triton", 1.0, mask="element"), make_row("sdpa-flash", 1.7999)]
    assert any("at least 1.8x as fast | 1.79x | no |" in line for line in goal_lines(make_results(rows)))
    rows += [make_row("triton", 1.0501, mask="element", bits=3)]
    assert any("at most 1.05x the time | 1.06x | no |" in line for line in goal_lines(make_results(rows)))


def test_without_a_gpu_pages_say_so(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    assert attention_summary(folder).startswith(NO_GPU) and attention_section(folder).startswith(NO_GPU)


def test_pictures_are_the_same_for_the_same_results(folder, tmp_path):
    draw_pictures(folder, tmp_path / "first")
    draw_pictures(folder, tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == [
        "attention-h200-bfloat16.svg", "attention-h200.svg", "roofline-h200-bfloat16.svg", "roofline-h200.svg",
    ]  # fmt: skip
    for name in names:
        text = (tmp_path / "first" / name).read_text()
        assert text == (tmp_path / "second" / name).read_text()
        ElementTree.fromstring(text)
    times = (tmp_path / "first" / "attention-h200.svg").read_text()
    assert "triton, tile, 3 bits" in times and "0.0210" in times
    assert "bandwidth, 4 TB/s" in (tmp_path / "first" / "roofline-h200.svg").read_text()


def test_the_terminal_shows_every_row_uncut(capsys):
    print_table(make_results(ROWS, [ABSENT | {"reason": "[not] installed"}]))
    printed = capsys.readouterr().out
    for shown in ("squad384, forward+backward", "sdpa-flash", "triton*", "0.0180 to 0.0220", "2.50x", "of matrix rate"):
        assert shown in printed
    assert "flash-attn: [not] installed (squad384; forward; dense)" in printed and "…" not in printed


def test_absences_are_listed_one_by_one_where_a_product_would_say_too_much():
    same = [ABSENT | {"reason": "no", "mask": mask, "pass": one} for mask in ("a", "b") for one in ("x", "y")]
    assert absence_lines(same) == ["flash-attn: no (squad384; x, y; a, b)"]
    assert absence_lines([same[0], same[3]]) == ["flash-attn: no (squad384 x a; squad384 y b)"]
    assert absence_lines([ABSENT | {"reason": "no", "bits": 3}]) == [
        "flash-attn: no (squad384; forward; dense; 3 bits)"
    ]


def test_numbers_have_three_digits():
    assert [milliseconds(value) for value in (0.02131, 0.213, 2.13, 21.31, 213.1)] == [
        "0.0213", "0.213", "2.13", "21.3", "213",
    ]  # fmt: skip
    assert [rate(value, "B/s") for value in (4.21e12, 1.7e10, 5.0)] == ["4.21 TB/s", "17 GB/s", "5 B/s"]


def test_files_are_complete_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), complete_files(tmp_path / "new") as unfinished:
        (unfinished / "a").write_text("a")
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []
    with complete_files(tmp_path / "new") as unfinished:
        (unfinished / "a").write_text("a")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
