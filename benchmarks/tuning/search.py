"""Searches the fastest configuration of a problem: a first round, then neighbours of the best until none is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sparse_attn.kernels.configuration import KernelConfig

BETTER = 0.98  # a winner takes at most this share of the default's time; less could be chance
GRID_MOST, LIKE_MOST = 140, 60  # candidates of a search that begins with a grid, or with those of another problem
_FINALISTS = 5
_FIRST_PARENTS, _PARENTS = 4, 2  # whose neighbours come next, after the first round and later
_PROGRESS = 0.99  # a round that leaves more than this share of the best time is the last one


@dataclass(frozen=True)
class Found:
    """What a search came to; times are medians in milliseconds, None where the default configuration failed.

    Attributes:
        winner: the default configuration unless another is clearly faster.
        runner_up: the second fastest and its time, if two configurations ran.
        tried: candidates that were timed.
        failed: how many were not, by reason.
    """

    winner: KernelConfig
    milliseconds: float
    default_milliseconds: float | None
    runner_up: tuple[KernelConfig, float] | None
    tried: int
    failed: dict[str, int]


class Search:
    """Which configurations to try next, given those tried so far.

    Args:
        default: the configuration to beat.
        first: candidates of the first round, besides the default.
        neighbours: of a configuration.
        refusal: why a configuration is not worth a try, or None.
        most: candidates to try at most.
    """

    def __init__(
        self,
        default: KernelConfig,
        first: Iterable[KernelConfig],
        neighbours: Callable[[KernelConfig], Iterable[KernelConfig]],
        refusal: Callable[[KernelConfig], str | None],
        most: int,
    ):
        self.default = default
        self.times: dict[KernelConfig, float] = {}
        self.failures: dict[KernelConfig, str] = {}
        self._neighbours, self._refusal, self._most = neighbours, refusal, most
        self._seen: set[KernelConfig] = {default}
        self._best_before = float("inf")
        self.waiting: list[KernelConfig] = [default, *self._new(first)]

    def record(self, config: KernelConfig, milliseconds: float) -> None:
        self.times[config] = milliseconds
        self._done(config)

    def fail(self, config: KernelConfig, reason: str) -> None:
        self.failures[config] = reason
        self._done(config)

    @property
    def finished(self) -> bool:
        return not self.waiting

    def best(self, count: int) -> list[KernelConfig]:
        """The fastest so far, fastest first."""
        return sorted(self.times, key=self.times.__getitem__)[:count]

    @property
    def finalists(self) -> list[KernelConfig]:
        """What to time again and with care: the fastest ones and the default, as far as it ran."""
        best = self.best(_FINALISTS)
        return best if self.default in best or self.default not in self.times else [*best, self.default]

    def found(self, final: dict[KernelConfig, float]) -> Found:
        """The result, given the times of the finalists. Raises ValueError if there are none."""
        if not final:
            raise ValueError("no configuration ran")
        ranking = sorted(final, key=final.__getitem__)
        winner, default_time = ranking[0], final.get(self.default)
        if default_time is not None and final[winner] > BETTER * default_time:
            winner = self.default
        others = [config for config in ranking if config != winner]
        runner_up = (others[0], final[others[0]]) if others else None
        reasons = Counter(reason.partition(":")[0] for reason in self.failures.values())
        return Found(winner, final[winner], default_time, runner_up, len(self.times), dict(reasons))

    def _done(self, config: KernelConfig) -> None:
        self.waiting.remove(config)
        if self.waiting or not self.times:
            return
        best = self.best(_FIRST_PARENTS if self._best_before == float("inf") else _PARENTS)
        if self.times[best[0]] <= _PROGRESS * self._best_before:
            self._best_before = self.times[best[0]]
            self.waiting = self._new(near for parent in best for near in self._neighbours(parent))

    def _new(self, configs: Iterable[KernelConfig]) -> list[KernelConfig]:
        """Those worth a try that have not been tried, as many as there is room for."""
        new = []
        for config in configs:
            if config not in self._seen and len(self._seen) < self._most and self._refusal(config) is None:
                self._seen.add(config)
                new.append(config)
        return new
