"""Candidate configurations: a grid to begin with, the neighbours of good ones, and which are not worth a try."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from sparse_attn.kernels.configuration import KernelConfig, Problem
from sparse_attn.layout import ROWS

COLUMNS = (16, 32, 64, 128)
WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3, 5, 7)  # rows are gathered by loaded columns: a copy runs (stages - 1) // 2 steps ahead
HELD = (0, 64, 128, 256, 512)
_HELD_FIRST = 128

_WARP = 32
_REGISTERS = 216  # 32-bit words a thread for tiles; the chip's 255 also hold addresses
_ROW_TILE, _COLUMN_TILE = 16, 8  # of a matrix instruction's result


@dataclass(frozen=True)
class ListFacts:
    """What the lists for one size of row groups look like: entries of the shortest and longest, and whether they can
    be split."""

    shortest: int
    longest: int
    splits: bool


def grid(problem: Problem) -> Iterator[KernelConfig]:
    """Where a search without better knowledge begins."""
    columns = COLUMNS[1:] if problem.element_bytes == 2 else COLUMNS[:3]
    for rows, wide, warps in product(ROWS, columns, WARPS):
        if warps > 1 or rows == 16:
            yield KernelConfig(rows, wide, warps, num_stages=3)
    if problem.kernel == "forward":
        for rows, held, warps in product(ROWS[:3], (128, 256, 512), (4, 8)):
            wide = columns[0] if rows > 16 else columns[1]
            yield KernelConfig(rows, wide, warps, num_stages=3, held=held)


def neighbours(config: KernelConfig) -> Iterator[KernelConfig]:
    """Configurations that differ in one respect, or in rows and warps together."""
    for name, values in (("num_stages", STAGES), ("columns", COLUMNS), ("num_warps", WARPS), ("rows", ROWS)):
        own = getattr(config, name)
        below, above = [value for value in values if value < own], [value for value in values if value > own]
        for value in below[-1:] + above[:1]:
            yield replace(config, **{name: value})
    if config.held == 0:
        yield replace(config, held=_HELD_FIRST)
    else:
        smaller, larger = [held for held in HELD if held < config.held], [held for held in HELD if held > config.held]
        for held in dict.fromkeys((0, *smaller[-1:], *larger[:1])):
            yield replace(config, held=held)
    yield replace(config, split=not config.split)
    for rows, warps in ((config.rows * 2, config.num_warps * 2), (config.rows // 2, config.num_warps // 2)):
        if rows in ROWS and warps in WARPS:
            yield replace(config, rows=rows, num_warps=warps)


def refusal(config: KernelConfig, problem: Problem, facts: ListFacts, shared_limit: int) -> str | None:
    """Why a configuration is not worth compiling, in few words; None if it is.

    Args:
        facts: of the lists for `config.rows`.
        shared_limit: bytes of shared memory that one block can have.
    """
    if config.split and not facts.splits:
        return "nothing to split"
    if config.held:
        if problem.kernel != "forward":
            return "holds nothing"
        if config.split:
            return "split lists are not held"
        if facts.shortest > config.held:
            return "no list fits what is held"
        if config.held >= 4 * config.columns * -(-facts.longest // config.columns):
            return "holds far more than any list"
    for columns in (config.columns, config.held) if config.held else (config.columns,):
        tiles = config.rows // _ROW_TILE * (columns // _COLUMN_TILE)
        if tiles < config.num_warps:
            return "warps without work"
        one_step = config.num_stages == 1 or columns == config.held
        if _registers(config, problem, columns, one_step) > _REGISTERS:
            return "registers"
        if _shared_bytes(config, problem, columns, 1 if one_step else _steps_held(config.num_stages)) > shared_limit:
            return "shared memory"
    return None


def _head_block(problem: Problem) -> int:
    return max(16, 1 << (problem.head_dim - 1).bit_length())


def _registers(config: KernelConfig, problem: Problem, columns: int, one_step: bool) -> float:
    """32-bit words a thread for accumulators, scores and rows that are loaded without a pipeline."""
    block, words = _head_block(problem), problem.element_bytes / 4
    scores = config.rows * columns * (1 if problem.kernel == "forward" else 2)
    operand = config.rows * columns * words
    if problem.element_bytes == 4:
        operand *= 2  # high and low halves of a float32 product
    sums = config.rows * block * (2 if problem.kernel == "grad_key_value" else 1)
    gathered = 2 * columns * block * words if one_step else 0
    return (sums + scores + operand + gathered) / (_WARP * config.num_warps)


def _steps_held(num_stages: int) -> int:
    """Whose tiles lie in shared memory at a time: gathers follow their indices, so every other stage loads tiles."""
    return num_stages if num_stages < 3 else (num_stages - 1) // 2 + 1


def _shared_bytes(config: KernelConfig, problem: Problem, columns: int, steps: int) -> int:
    """Two gathered tiles a step, and the group's own rows where the matrix unit reads them from shared memory."""
    own = config.rows * (1 if problem.kernel == "forward" else 2)
    return (2 * steps * columns + own) * _head_block(problem) * problem.element_bytes
