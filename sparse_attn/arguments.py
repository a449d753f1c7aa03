"""Checks of arguments that several functions share. TypeError: of the wrong kind; ValueError: out of range.

Numbers may be NumPy's, and tensors or symbols where a model is traced. Python's come first: torch.compile cannot ask
these whether they have a method.
"""

from __future__ import annotations


def expect_flags(or_none: bool = False, **flags: object) -> None:
    """Raises TypeError for a flag that is neither True nor False, such as the text "no"; `or_none` allows None too."""
    for name, value in flags.items():
        if not (isinstance(value, bool) or (or_none and value is None)):
            raise TypeError(f"{name} is {value!r}, expected {'True, False or None' if or_none else 'True or False'}")


def expect_whole(least: int | None = 1, or_none: bool = False, **numbers: object) -> None:
    """Raises TypeError for what is no whole number, and ValueError for one below `least`, if there is such a bound."""
    for name, value in numbers.items():
        if or_none and value is None:
            continue
        whole = not isinstance(value, bool) and (isinstance(value, int) or hasattr(value, "__index__"))
        if whole and (least is None or value >= least):
            continue
        bound = "" if least is None else f", at least {least}"
        message = f"{name} is {value!r}, expected a whole number{bound}{', or None' if or_none else ''}"
        raise ValueError(message) if whole else TypeError(message)


def expect_kind(kinds: type | tuple[type, ...], expected: str, **values: object) -> None:
    """Raises TypeError for a value of none of these kinds; `expected` says what it should be, and where from."""
    for name, value in values.items():
        if not isinstance(value, kinds):
            raise TypeError(f"{name} is {type(value).__name__}, expected {expected}")


def expect_numbers(or_none: bool = False, **numbers: object) -> None:
    """Raises TypeError for what is no number."""
    for name, value in numbers.items():
        if not (isinstance(value, (int, float)) or hasattr(value, "__float__") or (or_none and value is None)):
            raise TypeError(f"{name} is {value!r}, expected a number{', or None' if or_none else ''}")


def expect_shares(or_none: bool = False, **shares: object) -> None:
    """Raises TypeError for what is no number, and ValueError for one outside [0, 1)."""
    expect_numbers(or_none, **shares)
    for name, value in shares.items():
        if value is not None and not 0.0 <= value < 1.0:
            ending = ", or None" if or_none else ""
            raise ValueError(f"{name} is {value}, expected a share in [0, 1), such as 0.1 for 10 %{ending}")
