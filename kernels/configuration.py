"""Which configuration a kernel runs with: data in configurations.json, by head_dim and element size.

This module needs no Triton, so that a backend can choose a layout for a kernel without importing it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class KernelConfig:
    """How a kernel is cut: `rows` in a group (queries, or keys where the mask is transposed), `columns` list entries a
    step."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def _read(path: Path) -> dict[str, dict[tuple[int, int], KernelConfig]]:
    fields = KernelConfig.__dataclass_fields__
    return {
        kernel: {
            (entry["head_dim"], entry["element_bytes"]): KernelConfig(**{name: entry[name] for name in fields})
            for entry in entries
        }
        for kernel, entries in json.loads(path.read_text()).items()
    }


# Kernel ("forward", "grad_query", "grad_key_value") -> (largest head_dim, element bytes) -> configuration. Read at
# import and not on demand, since torch.compile traces the choice.
SHIPPED_CONFIGS = _read(Path(__file__).with_name("configurations.json"))


def config(kernel: str, head_dim: int, element_bytes: int) -> KernelConfig:
    """The configuration for the smallest shipped head_dim that holds `head_dim`."""
    configs = SHIPPED_CONFIGS[kernel]
    fitting = [size for size, size_bytes in configs if size_bytes == element_bytes and size >= head_dim]
    if not fitting:
        raise ValueError(f"no configuration of {kernel} for head_dim {head_dim} with {element_bytes}-byte elements")
    return configs[min(fitting), element_bytes]
