"""Makes the committed masks from a file of averages: `python -m benchmarks.masks.make AVERAGES`.

AVERAGES is what `collect_averages(model, batches).save(...)` wrote for the packaged MiniLM on the windows (384 tokens
that share 128) of the 1,190 English questions of XQuAD, which are questions of SQuAD v1.1's development set.
"""

from __future__ import annotations

import lzma
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from sparse_attn import AttentionAverages, GlobalMask

from ..options import fail
from . import GRANULARITIES, SPARSITY, mask_file

MODEL, DATA = "all-MiniLM-L6-v2", "XQuAD, English: 1,190 questions of SQuAD v1.1's development set"


def make(averages: AttentionAverages, granularity: str, path: Path) -> None:
    """Writes the compressed mask, whose metadata say what it was made from."""
    source = {"model": MODEL, "data": DATA, "windows": averages.sequences, "tokens": averages.tokens}
    mask = GlobalMask.from_averages(replace(averages, metadata=source), SPARSITY, granularity)
    with tempfile.TemporaryDirectory(prefix="sparse_attn-") as folder:
        plain = Path(folder) / "mask.safetensors"
        mask.save(plain)
        path.write_bytes(lzma.compress(plain.read_bytes(), preset=9 | lzma.PRESET_EXTREME))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        return fail("masks.make", "expected one argument, a file of averages", status=2)
    try:
        averages = AttentionAverages.load(arguments[0])
    except (OSError, ValueError) as error:
        return fail("masks.make", error, status=2)
    for granularity in GRANULARITIES:
        path = mask_file(granularity)
        make(averages, granularity, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
