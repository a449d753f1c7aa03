"""The page shows old and new results, needs nothing but itself, and takes any names."""

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks.report import RESULTS
from benchmarks.squad import __main__ as squad
from benchmarks.squad.html import page, write_page
from benchmarks.squad.html_charts import row_labels, sweep_charts, sweep_key
from benchmarks.squad.table import COLUMNS, cells
from sparse_attn import GlobalMask
from tests.benchmarks.html_reading import read_html, text_of

COMMITTED = sorted(RESULTS.glob("*/squad-*.json"))
EVIL = "<script src='https://a.b/c.js'>alert(\"1\")</script> & $title ${facts}"
LINKING = {"src", "srcset", "href", "xlink:href", "action", "poster", "data", "background"}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def results():
    """As an early version wrote them, with fewer fields than now; tests change them."""
    return read(Path(__file__).with_name("squad_sample.json"))


@pytest.fixture
def newer(results):
    """Results with every field that a row may have, sweeps, and rows that could not be measured."""
    dense, sparse = results["rows"][0], results["rows"][2]
    deviations = {"em_spread": {"deviation": 0.41}, "f1_spread": {"deviation": 0.37}}
    spread = {**deviations, "model": "tiny"}
    results["rows"] = [
        {**dense, **spread, "variant": "eager-padded", "mask": None, "energy_joules": 1234.5},
        {**sparse, **spread, "variant": "flex", "attention": "flex", "mask": "abc"},
        {**sparse, **spread, "variant": "sparse-unpadded", "mask": "abc", "granularity": "tile", "bits": 1},
    ]
    swept = [
        {**sparse, "granularity": granularity, "sparsity": sparsity, "f1": f1, "seconds": seconds}
        for granularity, shift in (("element", 0), ("tile", 1))
        for sparsity, f1, seconds in ((0.0, 65.0 + shift, 9.0), (0.5, 64.0 + shift, 8.0), (0.955, 60.0 + shift, 7.0))
    ]
    rounded = [{**sparse, "bits": bits, "f1": 60.0 + (bits or 9)} for bits in (None, 3, 1)]
    results["sweeps"] = [{"name": "sparsity", "rows": swept}, {"name": "bits", "rows": rounded}]
    results["absent"] = [
        {"variant": "flash-unpadded", "reason": "flash-attn is not installed"},
        {"variant": "sparse-compiled", "bits": 3, "reason": "no compiler"},
    ]
    results["failed"] = [{"variant": "flex", "sparsity": 0.9, "granularity": "tile", "reason": "was killed"}]
    return results


def tables(root) -> dict[str, list[list[str]]]:
    """Heading of the section -> texts of all rows of its tables."""
    return {
        text_of(section.find("h2")): [[text_of(cell) for cell in row] for row in section.iter("tr")]
        for section in root.iter("section")
    }


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_file_has_a_page_with_its_table(path):
    results = read(path)
    root = read_html(page(results))
    found = tables(root)
    lines = found["Results"][1:]
    assert len(lines) == len(results["rows"])
    shown = [COLUMNS.index(name) for name in ("EM", "F1", "seconds", "peak memory", "speed-up")]
    for row, line in zip(results["rows"], lines):
        assert line[0].startswith(row["variant"])
        assert {cells(row)[index] for index in shown} <= set(line)
        assert row["mask"] is None or f"{row['sparsity']:.0%} {row['granularity']}" in line[0]
        assert row["bits"] is None or f"{row['bits']} bits" in line[0]
    header = text_of(root.find(".//header"))
    for field in ("device", "model", "date", "commit"):
        assert results[field] in header
    assert results["data"]["name"] in header
    assert ["published, dense", "81.02", "88.63", "95.41", "6.85 GB", "1.00x"] in found["Published figures"]
    measured = text_of(next(part for part in root.iter("section") if text_of(part[0]) == "How it was measured"))
    for text in (results["averages_from"], results["peak_memory"], results["versions"]["torch"], "--batch-size"):
        assert text in measured
    assert ("Not measured" in found) == bool(results["absent"] or results["failed"])
    assert not any(heading.startswith("Mask") for heading in found)


def test_the_page_needs_nothing_outside_and_no_script(newer):
    written = page(newer, [GlobalMask.random(2, 2, 32, sparsity=0.5)])
    elements = list(read_html(written).iter())
    links = [value for element in elements for name, value in element.attrib.items() if name in LINKING]
    assert len(links) == 4 and all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe", "object", "base"} & {element.tag for element in elements}
    assert not any(name.startswith("on") for element in elements for name in element.attrib)
    for outside in ("http:", "https:", "url(", "@import", "$"):  # the last: a placeholder that was not filled
        assert outside not in written


def test_charts_show_time_memory_and_f1_of_each_row(newer):
    root = read_html(page(newer))
    section = next(part for part in root.iter("section") if text_of(part[0]) == "Time, memory and accuracy")
    assert [text_of(figure.find("figcaption")).split()[0] for figure in section.iter("figure")] == [
        "Seconds",
        "Peak",
        "F1",
    ]
    for figure in section.iter("figure"):
        assert [bar.get("class") for bar in figure.iter("rect")] == ["dense", "dense", "own"]
    texts = [text_of(text) for text in section.iter("text")]
    assert "12.32" in texts and "1.39" in texts and "65.8" in texts
    assert "sparse-unpadded, 90% tile, 1 bit" in texts


def test_newer_fields_are_shown_where_they_say_something(newer):
    newer["rows"][1]["dtype"] = "bfloat16"
    heading, *lines = tables(read_html(page(newer)))["Results"]
    assert {len(line) for line in lines} == {len(heading)}
    assert [line[heading.index("energy")] for line in lines] == ["1,234 J", "–", "–"]
    assert lines[0][heading.index("F1")] == "65.81 ± 0.37"
    assert [line[0] for line in lines] == [
        "eager-paddedfloat32",
        "flex90% element, bfloat16",
        "sparse-unpadded90% tile, 1 bit, float32",
    ]


def test_a_sweep_is_two_charts_a_key_and_a_table(newer):
    root = read_html(page(newer))
    section = next(part for part in root.iter("section") if text_of(part[0]) == "Sweep over sparsity")
    assert [text_of(figure.find("figcaption")) for figure in section.iter("figure")] == [
        "F1 against seconds",
        "F1 against peak memory",
    ]
    for figure in section.iter("figure"):
        assert len(list(figure.iter("circle"))) == 6 and len(list(figure.iter("polyline"))) == 2
        labels = [text_of(text) for text in figure.iter("text") if text.get("class") == "value"]
        assert labels == ["0%", "50%", "95.5%"] * 2
    assert [text_of(item) for item in section.iter("li")] == ["sparse-sorted, element", "sparse-sorted, tile"]
    assert len(list(section.iter("tr"))) == 7
    assert sweep_key(newer["sweeps"][1]) == ""
    bits = next(part for part in root.iter("section") if text_of(part[0]) == "Sweep over bits")
    labels = [text_of(text) for text in bits.iter("text") if text.get("class") == "value"]
    assert labels == ["none", "3", "1"] * 2


def test_without_accuracy_figures_are_absent_and_sweeps_are_bars(newer):
    for row in [*newer["rows"], *(row for sweep in newer["sweeps"] for row in sweep["rows"])]:
        row["em"] = row["f1"] = None
        row["f1_spread"] = row["em_spread"] = None
    root = read_html(page(newer))
    heading, *lines = tables(root)["Results"]
    assert {line[heading.index("F1")] for line in lines} == {line[heading.index("EM")] for line in lines} == {"–"}
    captions = [text_of(caption) for caption in root.iter("figcaption")]
    assert captions == ["Seconds (shorter is better)", "Peak memory, GB (shorter is better)"] * 3
    assert sweep_key(newer["sweeps"][0]) == ""
    assert "95.5%: sparse-sorted, tile" in sweep_charts(newer["sweeps"][0])["Seconds (shorter is better)"]


def test_a_sweep_row_without_f1_leaves_a_gap_only_for_itself(newer):
    newer["sweeps"][1]["rows"][1]["f1"] = None
    charts = sweep_charts(newer["sweeps"][1])
    assert all(chart.count("<circle") == 2 for chart in charts.values()) and len(charts) == 2


def test_rows_that_could_not_be_measured_have_their_reasons(newer):
    lines = tables(read_html(page(newer)))["Not measured"]
    assert lines[1:] == [
        ["flash-unpadded", "absent", "flash-attn is not installed"],
        ["sparse-compiled, 3 bits", "absent", "no compiler"],
        ["flex, 90% tile", "failed", "was killed"],
    ]


def test_every_mask_has_its_pictures(results):
    masks = [GlobalMask.random(2, 3, 32, sparsity=0.5, granularity=one) for one in ("element", "tile")]
    root = read_html(page(results, masks))
    headings = [text_of(heading) for heading in root.iter("h2")]
    assert [heading for heading in headings if heading.startswith("Mask")] == ["Mask, element", "Mask, tile"]
    assert len(list(root.iter("img"))) == 12


def test_labels_name_model_and_dtype_only_where_they_differ():
    rows = [
        {"variant": "sdpa", "dtype": "float32", "model": "m"},
        {"variant": "sdpa", "dtype": "bfloat16", "model": "m"},
    ]
    assert row_labels(rows) == ["sdpa, float32", "sdpa, bfloat16"]
    assert row_labels([{"variant": "sparse-sorted", "sparsity": 0.999, "bits": 2}]) == ["sparse-sorted, 99.9%, 2 bits"]


def poisoned(value):
    """The same content with every text that a user may have chosen replaced."""
    if isinstance(value, dict):
        return {
            name: content if name == "name" and content in ("sparsity", "bits") else poisoned(content)
            for name, content in value.items()
        }
    if isinstance(value, list):
        return [poisoned(content) for content in value]
    return EVIL if isinstance(value, str) else value


def test_names_from_users_are_shown_and_never_run(newer):
    newer = poisoned(copy.deepcopy(newer))
    newer["notes"] = [EVIL]
    newer["arguments"][EVIL] = newer["versions"][EVIL] = EVIL
    newer["seconds"][EVIL] = 1.0
    mask = GlobalMask.random(1, 1, 16, sparsity=0.5)
    mask.metadata["granularity"] = EVIL
    root = read_html(page(newer, [mask]))
    assert not any(element.tag == "script" for element in root.iter())
    assert not any(element.get("src", "data:").split(":")[0] != "data" for element in root.iter())
    lines = tables(root)
    assert EVIL in text_of(root.find(".//title")) and EVIL in text_of(root.find(".//h1"))
    assert lines["Results"][1][0].startswith(EVIL) and lines["Not measured"][1][2] == EVIL
    assert EVIL in text_of(root.find(".//header"))
    boxes = [box for box in root.iter("div") if box.get("class") == "scroll"]
    assert [box.get("aria-label") for box in boxes] == [text_of(caption) for caption in root.iter("caption")]


def test_names_in_a_key_are_shown_and_never_run(newer):
    for row in newer["sweeps"][0]["rows"]:
        row["granularity"] += EVIL
    assert [text_of(item) for item in read_html(sweep_key(newer["sweeps"][0])).iter("li")] == [
        f"sparse-sorted, element{EVIL}",
        f"sparse-sorted, tile{EVIL}",
    ]


def test_tables_and_pictures_can_be_read_aloud(newer):
    root = read_html(page(newer, [GlobalMask.random(2, 2, 32, sparsity=0.5)]))
    assert root.find("html").get("lang") == "en" and text_of(root.find(".//title"))
    metas = {meta.get("name"): meta.get("content") for meta in root.iter("meta")}
    assert "width=device-width" in metas["viewport"]
    for table in root.iter("table"):
        assert text_of(table.find("caption"))
        assert {cell.get("scope") for cell in table.findall("thead/tr/th")} == {"col"}
        assert all(cell.text for cell in table.findall("thead/tr/th"))
        assert all(row.find("th").get("scope") == "row" for row in table.findall("tbody/tr"))
    assert all(image.get("alt") for image in root.iter("img"))
    for drawing in root.iter("svg"):
        assert drawing.get("aria-hidden") == "true" or (drawing.get("role") == "img" and drawing.get("aria-label"))
    boxes = [box for box in root.iter("div") if box.get("class") == "scroll"]
    assert len(boxes) == len(list(root.iter("table")))
    assert all(box.get("tabindex") == "0" and box.get("role") == "region" and box.get("aria-label") for box in boxes)


def luminance(color: str) -> float:
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_of_wcag_2(results, scheme):
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6});", block))
        for block in re.findall(r":root \{(.*?)\}", page(results), re.S)
    )
    color = {"light": light, "dark": dark}[scheme]
    assert light.keys() == dark.keys() and light != dark
    for behind in ("page", "box", "own-row"):
        assert contrast(color["ink"], color[behind]) >= 7
        assert contrast(color["soft"], color[behind]) >= 4.5
    for drawn in ("dense", "own", "c1", "c2", "c3", "c4", "c5"):
        assert contrast(color[drawn], color["page"]) >= 3


def test_the_page_of_a_large_model_stays_small(newer):
    newer["rows"] = [newer["rows"][number % 3] for number in range(40)]
    masks = [GlobalMask.random(24, 16, 96, sparsity=sparsity) for sparsity in (0.9, 0.5)]
    assert len(page(newer, masks).encode()) < 1_500_000


def test_the_file_is_the_page(results, tmp_path):
    results["model"] = "modèle"
    mask = GlobalMask.random(2, 2, 16, sparsity=0.5)
    write_page(results, [mask], tmp_path / "results.html")
    assert (tmp_path / "results.html").read_text(encoding="utf-8") == page(results, [mask])


def test_the_command_writes_the_page_of_what_it_measured(in_process, arguments, tmp_path):
    sweep = ["--sweep", "sparsity", "0,0.9", "--granularity", "tile,element", "--repeats", "1"]
    assert squad.main([*arguments, "--variants", "sdpa-unpadded,sparse-unpadded", *sweep]) == 0
    root = read_html((tmp_path / "results" / "results.html").read_text(encoding="utf-8"))
    found = tables(root)
    dense, *sparse = (line[0] for line in found["Results"][1:])
    assert dense == "sdpa-unpadded"
    # Tiles that hold the diagonal are more than a tenth of a short mask.
    pruned = [re.fullmatch(r"sparse-unpadded([\d.]+)% (tile|element)", name).groups() for name in sparse]
    assert [granularity for _, granularity in pruned] == ["tile", "element"]
    assert 60 < float(pruned[0][0]) < float(pruned[1][0]) == 90
    assert {"Sweep over sparsity", "Mask, tile", "Mask, element"} <= found.keys()
    sweep = next(part for part in root.iter("section") if text_of(part[0]) == "Sweep over sparsity")
    assert len(list(sweep.iter("figure"))) == 2 and len(list(sweep.iter("circle"))) == 2 * 4 + 2
