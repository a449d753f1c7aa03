"""Invented names, years, numbers and choices, none twice in a passage where there are enough."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_GIVEN = (
    "Alda Anselm Berno Brita Carel Corvin Delia Dorin Edda Emmo Falko Fenna Gesa Gorm Hanno Hedda Ilka Ivo "
    "Joris Jutta Katla Kuno Lorin Lisbet Mirel Merten Nanna Nils Odo Orla Petra Quint Runa Rolf Sefa Sten "
    "Tamsin Tilo Ulla Udo Vero Viggo Wanda Wim Yorick Ylva Zita Zeno"
)
_SURNAME = (
    "Hal Bren Cor Dun Ell Fen Gar Hol Ing Jor Kel Lor Mar Nor Os Pell Quen Ros Stan Tor Ull Ves Wen Yar Zel",
    "beck low strom wick ander mond ley sen hurst quist more rath kamp vane dahl",
)
_TOWN = (
    "Ash Bram Crow Dray East Fal Grim Hasel Iver Kirn Lang Mel Nether Otter Pen Quarn Red Salt Thorn Under",
    "ford mouth stead haven bury minster wick by holm field bridge gate ham ton",
)
_RIVER = (
    "Or Tav Bol Nes Ull Gren Sil Wey Dar Lom Fis Cal Hod Pir Ems Var",
    "ren va ow itz en der sa mel una ick",
)
_HILL = (
    "Tar Kol Brus Scar Gil Mor Ruk Stav Hel Dov Fjor Gran Lund Vid",
    "row vin dal horn sen tind berg nes lan mar",
)
_REGION = "Tol Esk Wend Nord Sor Ald Bret Hev Kar Lis Ran Vol Ost Fer Jut", "mark land dale shire garde wold"
_ISLAND = "Sker Hol Brim Gull Farn Stok Linn Vas Ram Tern", "ness holm ey rock point sand"
_SHIP = (
    "Silver Brave Merry Northern Quiet Golden Swift Scarlet Faithful Distant",
    "Gull Maid Star Falcon Rose Lark Pearl Wave Comet Otter",
)
_COUNTS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
_MONTHS = {
    "January": 31,
    "February": 28,
    "March": 31,
    "April": 30,
    "May": 31,
    "June": 30,
    "July": 31,
    "August": 31,
    "September": 30,
    "October": 31,
    "November": 30,
    "December": 31,
}
_DATES = [f"{day} {month}" for month, days in _MONTHS.items() for day in range(1, days + 1)]
_TRIES = 200


@dataclass(frozen=True)
class ValueLine:
    """`let NAME, NAME = KIND ARGUMENTS` of a topic: slots that are drawn together and differ."""

    names: tuple[str, ...]
    kind: str
    arguments: str


class Names:
    """Invented names; a kind's names start over, in a new order, only when all have been given out."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._parts = {
            "surname": _SURNAME,
            "town": _TOWN,
            "river": _RIVER,
            "hillname": _HILL,
            "region": _REGION,
            "island": _ISLAND,
        }
        self._left: dict[str, list[str]] = {}

    def draw(self, kind: str) -> str:
        """One name of a kind: person, town, river, hill, hillname, region, island or shipname."""
        if kind == "person":
            return f"{self._rng.choice(_GIVEN.split())} {self.draw('surname')}"
        if kind == "hill":
            name = self.draw("hillname")
            return self._rng.choice([f"Mount {name}", f"{name} Peak"])
        if not self._left.get(kind):
            separator = " " if kind == "shipname" else ""
            first, last = _SHIP if kind == "shipname" else self._parts[kind]
            pairs = [(a, b) for a in first.split() for b in last.split()]
            names = [a + separator + b for a, b in pairs if a.lower() != b and a[-2:] != 2 * b[0]]
            self._rng.shuffle(names)
            self._left[kind] = names
        return self._left[kind].pop()


def draw_values(lines: tuple[ValueLine, ...], names: Names, rng: random.Random, used: set[str]) -> dict[str, str]:
    """Values for the slots of `lines`, and NAME.last for the surname of a person.

    `used` holds the values the passage has already and is added to. Choices (`of`) may come a second time
    in a passage, never in one set of values; all other values differ within a passage.
    """
    values: dict[str, str] = {}
    for line in lines:
        drawn = _draw_apart(line, names, rng, used)
        values.update(zip(line.names, drawn, strict=True))
        used.update(drawn)
        if line.kind == "person":
            values.update({f"{name}.last": values[name].split()[-1] for name in line.names})
    return values


def _draw_apart(line: ValueLine, names: Names, rng: random.Random, used: set[str]) -> list[str]:
    for _ in range(_TRIES):
        drawn = _DRAW[line.kind](line, names, rng)
        if not used.intersection(drawn):
            return drawn
    if line.kind == "of":
        return drawn
    raise ValueError(f"no unused values left for {', '.join(line.names)}: widen the range of {line.kind!r}")


def _draw_names(line: ValueLine, names: Names, rng: random.Random) -> list[str]:
    return [names.draw(line.kind) for _ in line.names]


def _draw_years(line: ValueLine, names: Names, rng: random.Random) -> list[str]:
    """LOW HIGH [SHORTEST LONGEST]: bounds of the first year, and of the time from each to the next."""
    low, high, *gap = map(int, line.arguments.split())
    years = [rng.randint(low, high)]
    while len(years) < len(line.names):
        years.append(years[-1] + rng.randint(*gap))
    return [str(year) for year in years]


def _draw_numbers(line: ValueLine, names: Names, rng: random.Random) -> list[str]:
    """LOW HIGH [STEP]; of the kind `rising`, the smallest number first."""
    low, high, *step = map(int, line.arguments.split())
    numbers = rng.sample(range(low, high + 1, *step), len(line.names))
    return [f"{number:,}" for number in (sorted(numbers) if line.kind == "rising" else numbers)]


def _draw_decimals(line: ValueLine, names: Names, rng: random.Random) -> list[str]:
    low, high = (round(10 * float(bound)) for bound in line.arguments.split())
    return [f"{tenths / 10:.1f}" for tenths in sorted(rng.sample(range(low, high + 1), len(line.names)))]


def _draw_counts(line: ValueLine, names: Names, rng: random.Random) -> list[str]:
    low, high = map(int, line.arguments.split())
    return rng.sample(_COUNTS.split()[low : high + 1], len(line.names))


def _draw_dates(line: ValueLine, names: Names, rng: random.Random) -> list[str]:
    return [_DATES[day] for day in sorted(rng.sample(range(len(_DATES)), len(line.names)))]


def _draw_choices(line: ValueLine, names: Names, rng: random.Random) -> list[str]:
    return rng.sample([choice.strip() for choice in line.arguments.split(",")], len(line.names))


_DRAW: dict[str, Callable[[ValueLine, Names, random.Random], list[str]]] = {
    **dict.fromkeys(("person", "town", "river", "hill", "hillname", "region", "island", "shipname"), _draw_names),
    "year": _draw_years,
    "number": _draw_numbers,
    "rising": _draw_numbers,
    "decimal": _draw_decimals,
    "count": _draw_counts,
    "date": _draw_dates,
    "of": _draw_choices,
}
KINDS = frozenset(_DRAW)
