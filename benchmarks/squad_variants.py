"""The rows of the SQuAD table: what is measured, as data."""

from __future__ import annotations

from dataclasses import dataclass

_PADDING_NAMES = {"longest": "sorted", "max": "padded"}


@dataclass(frozen=True)
class Variant:
    """One row of the table, measured in a process of its own.

    Attributes:
        name: what it is called; variants that differ in `bits` alone share a name.
        attention: implementation of transformers that the model is loaded with.
        masked: whether the model is patched with the global mask.
        bits: width of the probability quantiser; None = off.
        padding: "longest" pads a batch to its longest window, "max" to the greatest length.
        dtype: of weights and activations.
    """

    name: str
    attention: str
    masked: bool = False
    bits: int | None = None
    padding: str = "longest"
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """The name, with the bits if there are any."""
        if self.bits is None:
            return self.name
        return f"{self.name}, {self.bits} bit{'s' if self.bits > 1 else ''}"


def table_variants(padding: str, dtype: str, bits: int | None) -> list[Variant]:
    """The rows in order; the first is what the others' speed is compared with."""
    kind = _PADDING_NAMES[padding]
    shared = {"padding": padding, "dtype": dtype}
    rows = [
        Variant(f"eager-{kind}", "eager", **shared),
        Variant(f"sdpa-{kind}", "sdpa", **shared),
        Variant(f"sparse-{kind}", "sdpa", masked=True, **shared),
    ]
    if bits is not None:
        rows.append(Variant(f"sparse-{kind}", "sdpa", masked=True, bits=bits, **shared))
    return rows
