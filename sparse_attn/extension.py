"""The C++ extension sparse_attn._C: loaded at the first question about it, which registers its operators."""

from __future__ import annotations

import functools
import threading
import warnings
from pathlib import Path

import torch

_FROM_HERE = "in the project's folder `pip install --no-build-isolation"
HOW_TO_GET_IT = (
    "install a C++ compiler and build sparse_attn again where torch is installed: "
    f"{_FROM_HERE} --no-deps --force-reinstall .` (`-e .` for an editable installation)"
)
_loading = threading.Lock()


def how_to_install(extra: str) -> str:
    """How to install what an extra of pyproject.toml names; no package index has sparse_attn."""
    return f'{_FROM_HERE} ".[{extra}]"`'


def available() -> bool:
    """Whether the operators of the extension can be called."""
    return reason() is None


def reason() -> str | None:
    """Why the extension is not available; None where it is."""
    with _loading:
        return _load()


def warn_of_absence() -> None:
    """Says once in a process what is slower without the extension, and how to get it."""
    with _loading:
        _warn()


@functools.cache
def _warn() -> None:
    warnings.warn(
        "masks are packed by numpy on one thread and CPUs compute attention through torch, both slower, because "
        f"{_load()}. To speed them up, {HOW_TO_GET_IT}.",
        RuntimeWarning,
        stacklevel=5,
    )


@functools.cache
def _load() -> str | None:
    libraries = sorted(Path(__file__).resolve().parent.glob("_C*.so"))
    if not libraries:
        return "the C++ extension was not built when sparse_attn was installed"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the C++ extension {libraries[0]} cannot be loaded: {error.__cause__ or error}"
    return None
