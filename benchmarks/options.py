"""What the command lines of the benchmarks share: errors of one line, and types of arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, named after the module that `python -m` runs, and ends with exit status 2."""

    @property
    def module(self) -> str:
        return self.prog.removeprefix("python -m ")

    def error(self, message: str):
        self.exit(2, f"{self.module}: error: {message} (--help lists the options)\n")


def fail(module: str, error: Exception | str, status: int) -> int:
    """Says in one line on stderr why a command ends, and returns its exit status."""
    print(f"benchmarks.{module}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def at_least(least: int, most: float = float("inf")) -> Callable[[str], int]:
    """The type of whole numbers from `least` to `most`."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; expected at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large; expected at most {most}")
        return value

    return whole_number


def number(text: str) -> float:
    """The type of numbers."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def positive(text: str) -> float:
    """The type of numbers above 0."""
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is no finite number above 0")
    return value


def kept_share(text: str) -> float:
    """The type of shares above 0, up to 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no share above 0 and up to 1")
    return value


def names(text: str) -> list[str]:
    """The type of names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def chosen(option: str, asked: list[str] | None, known: list[str]) -> list[str]:
    """The names among `known` that were asked for, in the order of `known`; all if None. Raises ValueError."""
    if asked is None:
        return known
    if not asked or set(asked) - set(known):
        raise ValueError(f"{option} {','.join(asked)}: expected names among {', '.join(known)}")
    return [name for name in known if name in asked]


def file_to_write(text: str) -> Path:
    """The type of files that can be written."""
    path = Path(text)
    if path.is_dir() or not _can_hold_files(path.parent):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


def folder_to_write(text: str) -> Path:
    """The type of folders that can be written to, or made."""
    path = Path(text).expanduser()
    if not _can_hold_files(path):
        raise argparse.ArgumentTypeError(f"{path} is not a folder that can be written to")
    return path


def _can_hold_files(folder: Path) -> bool:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
