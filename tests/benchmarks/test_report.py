"""The pages that show results show the committed ones."""

import json

import pytest

from benchmarks.report import BEGIN, END, RESULTS, main, rendered, squad_section


def test_readme_shows_the_committed_results():
    assert main(["--check"]) == 0, "README.md is out of date: run python -m benchmarks.report"


def test_a_changed_figure_shows(tmp_path):
    source = next(RESULTS.glob("*/squad-*.json"))
    results = json.loads(source.read_text())
    results["rows"][0]["em"] = 12.34
    folder = tmp_path / "benchmarks" / "results"
    (folder / "device").mkdir(parents=True)
    (folder / "device" / "squad-x.json").write_text(json.dumps(results))
    section = squad_section(folder)
    assert "| 12.34 |" in section and "benchmarks/results/device/squad-x.json" in section
    assert section in rendered(f"a {BEGIN} old {END} b", section)


def test_committed_results_name_no_machine_path():
    for path in RESULTS.glob("*/*.json"):
        assert "/" not in json.dumps(json.loads(path.read_text())["arguments"])


def test_missing_markers_are_named():
    with pytest.raises(ValueError, match="lacks"):
        rendered("no markers", "section")
