"""Global masks of a real model, committed with the benchmarks: 6 layers x 12 heads x 384 x 384, density 10 %.

They come from the average attention of all-MiniLM-L6-v2 over windows of SQuAD questions (their metadata say which), as
`python -m benchmarks.masks.make` made them: files of `GlobalMask.save`, compressed with xz.
"""

from __future__ import annotations

import lzma
import tempfile
from functools import cache
from pathlib import Path

from sparse_attn import GlobalMask

GRANULARITIES = ("element", "tile")
SPARSITY = 0.9


def mask_file(granularity: str) -> Path:
    return Path(__file__).with_name(f"minilm-squad-{SPARSITY}-{granularity}.safetensors.xz")


@cache
def real_mask(granularity: str) -> GlobalMask:
    """The committed mask of a granularity, "element" or "tile"."""
    with tempfile.TemporaryDirectory(prefix="sparse_attn-") as folder:
        path = Path(folder) / "mask.safetensors"
        path.write_bytes(lzma.decompress(mask_file(granularity).read_bytes()))
        return GlobalMask.load(path)
