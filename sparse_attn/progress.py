"""Progress bars for long steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], description: str, enabled: bool = True) -> Iterator[Item]:
    """Yields the items and shows how far they are on stderr; `enabled=False` shows nothing."""
    return iter(tqdm(items, desc=description, disable=not enabled, dynamic_ncols=True))
