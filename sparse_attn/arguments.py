"""Checks of arguments that several functions share."""

from __future__ import annotations


def expect_flags(**flags: object) -> None:
    """Raises TypeError for a flag that is neither True nor False, such as the text "no"."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected True or False")
