"""A mask's pictures show where it keeps what."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.squad.mask_pictures import (
    LEVELS,
    block_densities,
    colors,
    levels,
    mask_pictures,
    mask_section,
    png,
    upper_bound,
)
from sparse_attn import GlobalMask
from tests.benchmarks.html_reading import read_html, text_of


def read_picture(uri: str) -> Image.Image:
    start, _, content = uri.partition(",")
    assert start == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content, validate=True)))


def test_a_block_has_the_share_of_its_positions_that_is_kept():
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[:4, 4:] = True  # the block at the top right
    keep[4, 0] = True  # one of sixteen
    assert block_densities(keep, 2).tolist() == [[0.0, 1.0], [0.0625, 0.0]]


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((3, 5), (3, 5)), ((100, 100), (16, 16)), ((17, 17), (16, 16)), ((40, 80), (8, 16)), ((1, 500), (1, 16))],
)
def test_blocks_cover_masks_of_any_length(shape, blocks):
    densities = block_densities(torch.ones(shape, dtype=torch.bool), 16)
    assert densities.shape == blocks and (densities == 1).all()
    corner = torch.zeros(shape, dtype=torch.bool)
    corner[-1, -1] = True
    marked = block_densities(corner, 16) > 0
    assert marked[-1, -1] and marked.sum() == 1


def test_levels_tell_any_kept_position_from_none():
    densities = np.array([0.0, 1e-6, 0.1, 0.5, 1.0])
    found = levels(densities)
    assert found[0] == 0 and found[1] == 1 and found[-1] == LEVELS - 1
    assert (np.diff(found.astype(int)) > 0).all()
    for density, level in zip(densities[1:], found[1:]):
        assert upper_bound(level - 1) < density <= upper_bound(level)


def test_a_picture_has_a_pixel_a_block_in_the_colour_of_its_level():
    densities = np.array([[0.0, 1.0, 0.1], [0.25, 0.0, 0.0]])
    picture = Image.open(io.BytesIO(png(densities)))
    assert picture.format == "PNG" and picture.size == (3, 2)
    expected = [[colors()[level] for level in row] for row in levels(densities)]
    assert np.asarray(picture.convert("RGB")).tolist() == [[list(color) for color in row] for row in expected]
    assert len(set(colors())) == LEVELS


def test_each_layer_and_head_has_its_own_picture():
    mask = GlobalMask.from_function(lambda layer, head, query, key: key == 2 * layer + head, 2, 2, 6)
    pictures = mask_pictures(mask, 10_000)
    assert [len(layer) for layer in pictures] == [2, 2]
    for layer in range(2):
        for head in range(2):
            lit = np.asarray(read_picture(pictures[layer][head])) == LEVELS - 1
            assert lit.all(0).tolist() == [key == 2 * layer + head for key in range(6)]


def test_pictures_become_smaller_until_all_of_them_fit():
    mask = GlobalMask.random(2, 3, 130, sparsity=0.9)
    widths = []
    for most_bytes in (900_000, 5_000, 1):
        pictures = mask_pictures(mask, most_bytes)
        size = sum(len(picture) for layer in pictures for picture in layer)
        widths.append(read_picture(pictures[1][2]).width)
        assert size <= most_bytes or widths[-1] == 8
    assert widths[0] == 64 > widths[1] > widths[2] == 8


def test_the_section_is_a_table_with_a_row_a_layer_and_densities_as_text():
    mask = GlobalMask.from_function(lambda layer, head, query, key: key <= 2 * layer + head, 3, 2, 10, 20)
    root = read_html(mask_section(mask))
    assert "10 queries x 20 keys" in text_of(root.find(".//caption"))
    assert [text_of(cell) for cell in root.findall(".//thead//th")] == ["layer", "Head 0", "Head 1"]
    rows = root.findall(".//tbody/tr")
    assert len(rows) == 3
    for layer, row in enumerate(rows):
        assert text_of(row.find("th")) == f"Layer {layer}{(4 * layer + 3) / 40:.1%} kept"
        for head, cell in enumerate(row.findall("td")):
            assert text_of(cell).strip() == f"{(2 * layer + head + 1) / 20:.1%}"
            assert cell.find("img").get("alt") == f"Layer {layer}, head {head}"


def test_what_a_mask_file_says_about_itself_is_escaped():
    mask = GlobalMask(torch.ones(1, 1, 4, 4, dtype=torch.bool), {"granularity": "<b>&"})
    assert text_of(read_html(mask_section(mask)).find(".//h2")) == "Mask, <b>&"
