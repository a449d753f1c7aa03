"""Checks of arguments that several functions share."""

from __future__ import annotations


def expect_flags(or_none: bool = False, **flags: object) -> None:
    """Raises TypeError for a flag that is neither True nor False, such as the text "no"; `or_none` allows None too."""
    for name, value in flags.items():
        if not (isinstance(value, bool) or (or_none and value is None)):
            raise TypeError(f"{name} is {value!r}, expected {'True, False or None' if or_none else 'True or False'}")
