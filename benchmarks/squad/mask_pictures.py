"""Pictures of a global mask for an HTML page, one a layer and head: how much of each block of positions is kept."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from sparse_attn import GlobalMask

from .html_parts import row_of_markup, section, table_of_markup
from .svg_charts import WIDTH, svg, text

LEVELS = 16  # colours of a picture: four bits a pixel
SIDES = (64, 48, 32, 24, 16, 8)  # pixels of a picture's longer side, the first that fits


def mask_section(mask: GlobalMask, most_bytes: int = 900_000) -> str:
    """The section with the mask's pictures of `most_bytes`, a row a layer and a column a head, in markup."""
    density = mask.density()
    per_layer = density.mean(1)
    body = []
    for layer, pictures in enumerate(mask_pictures(mask, most_bytes)):
        cells = "".join(
            f'<td><img src="{picture}" alt="Layer {layer}, head {head}"> {density[layer, head]:.1%}</td>'
            for head, picture in enumerate(pictures)
        )
        body.append(row_of_markup(f"Layer {layer}", cells, under=f"{per_layer[layer]:.1%} kept"))
    granularity = mask.metadata.get("granularity")
    caption = (
        f"{mask.query_len} queries x {mask.key_len} keys, {density.mean():.1%} kept. "
        "Queries run from top to bottom, keys from left to right; under each picture, the share of positions that the "
        "head keeps. Layers and heads are counted from 0."
    )
    columns = ["layer", *(f"Head {head}" for head in range(mask.heads))]
    return section(
        f"Mask, {granularity}" if granularity else "Mask", _scale(), table_of_markup(caption, columns, body, "masks")
    )


def _scale() -> str:
    """The key of the colours, in markup."""
    step = WIDTH / LEVELS
    parts = [
        f'<rect x="{level * step:g}" y="0" width="{step:g}" height="14" fill="rgb{color}"/>'
        for level, color in enumerate(colors())
    ]
    parts.append(text(0, 30, "none kept", "tick"))
    for level in (5, 10):
        parts.append(text((level + 1) * step, 30, f"{upper_bound(level):.0%}", "tick", "middle"))
    parts.append(text(WIDTH, 30, "all kept", "tick", "end"))
    drawing = svg(parts, 34, "Colours of the pictures: from dark, no position of a block kept, to light, all kept")
    return f'<div class="scale">{drawing}</div>'


def mask_pictures(mask: GlobalMask, most_bytes: int) -> list[list[str]]:
    """A PNG data URI per layer and head: [layers][heads], queries from top to bottom, keys from left to right.

    All have the same scale. They are as large as `most_bytes` for all of them together allows, and have at least
    8 pixels a side.
    """
    for side in SIDES:
        pictures = [[_data_uri(png(block_densities(keep, side))) for keep in layer] for layer in mask.keep]
        if sum(len(picture) for layer in pictures for picture in layer) <= most_bytes:
            break
    return pictures


def block_densities(keep: torch.Tensor, side: int) -> np.ndarray:
    """Share of positions kept in each block of a head's mask.

    Args:
        keep: bool [query_len, key_len].
        side: number of blocks along the longer side; at most one block a position.

    Returns float32 [row blocks, column blocks]. Neighbours share a position where lengths are no multiples of blocks.
    """
    shrink = min(1.0, side / max(keep.shape))
    blocks = [max(1, round(length * shrink)) for length in keep.shape]
    return adaptive_avg_pool2d(keep[None].float(), blocks)[0].numpy()


def levels(densities: np.ndarray) -> np.ndarray:
    """The colour of each density in [0, 1]: uint8, by its square root, and 0 for blocks without any kept position."""
    return np.ceil(np.sqrt(densities) * (LEVELS - 1)).astype(np.uint8)


def upper_bound(level: int) -> float:
    """The largest density that `levels` gives this level."""
    return (level / (LEVELS - 1)) ** 2


def colors() -> list[tuple[int, int, int]]:
    """Red, green and blue, 0 to 255, of each level."""
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0, 1, LEVELS), bytes=True)
    return [tuple(shade[:3].tolist()) for shade in shades]


def png(densities: np.ndarray) -> bytes:
    """A picture of densities [rows, columns], a pixel each, with `colors` as its palette."""
    from PIL import Image

    rows, columns = densities.shape
    picture = Image.frombytes("P", (columns, rows), levels(densities).tobytes())
    picture.putpalette([part for color in colors() for part in color])
    file = io.BytesIO()
    picture.save(file, format="PNG", bits=4, optimize=True)
    return file.getvalue()


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
