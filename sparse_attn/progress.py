"""Progress bars for long steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def progress(
    iterable: Iterable[Item], description: str, total: int | None = None, enabled: bool = True
) -> Iterator[Item]:
    """Yields the items of `iterable` and shows how far it is on stderr; `enabled=False` shows nothing."""
    return iter(tqdm(iterable, desc=description, total=total, disable=not enabled, dynamic_ncols=True))
