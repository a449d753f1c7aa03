"""Runs the searches of many problems side by side: while some candidates are timed, others are compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from sparse_attn.kernels.configuration import KernelConfig, Problem

from ..timing import DeviceTimer, Timer, percentiles, time_in_turns
from ..verdicts import Wrong
from .bench import Bench
from .candidates import grid, neighbours, refusal
from .compiling import CompilePool, Launch, reason_of, recorded
from .problems import TuningProblem
from .search import GRID_MOST, LIKE_MOST, Found, Search

SCREEN_SECONDS, FINAL_SECONDS = 0.002, 0.05  # of kernel time, for each candidate
_SEEDS = 10  # candidates that a similar problem begins with
_RESERVE_SECONDS = 5.0  # to time the finalists of what is open when the time is over

Call = Callable[[], None]
Measure = Callable[[Sequence[Call], float], list[float]]  # medians in milliseconds, each call timed for some seconds


class DeviceBroken(RuntimeError):
    """A launch after which the GPU computes nothing any more for this process.

    Attributes:
        tuned: the problem that was being tuned.
        problem: its key in a table, or None where its tensors could not be made.
        config: the candidate that ran last, or None where that is not known.
    """

    def __init__(self, reason: str, tuned: TuningProblem, problem: Problem | None, config: KernelConfig | None):
        which = "its default configuration or several candidates" if config is None else config
        super().__init__(f"{tuned.name} with {which}: {reason}")
        self.tuned, self.problem, self.config = tuned, problem, config


@dataclass(frozen=True)
class Tuned:
    """The outcome for one problem.

    Attributes:
        tuned: the problem.
        problem: its key in a table; None where its tensors could not even be made.
        default: the configuration that the package ships for all devices.
        layers: masks that the kernel ran on, one after the other, in every timed call.
        found: the result, or None, and `reason` says why.
    """

    tuned: TuningProblem
    problem: Problem | None = None
    default: KernelConfig | None = None
    layers: int = 0
    found: Found | None = None
    reason: str = ""


@dataclass
class _Open:
    """A problem whose search has begun; `finish_by` is a time of the clock."""

    bench: Bench
    search: Search
    finish_by: float
    prepared: bool = False
    launches: dict[KernelConfig | None, list[Launch]] = field(default_factory=dict)

    def launches_of(self, config: KernelConfig | None) -> list[Launch]:
        """Those of a configuration; None means those of the default ones that must run first. None at all where they
        cannot even be prepared, which running them tells."""
        if config not in self.launches:
            run = self.bench.launch_defaults if config is None else self.bench.caller(config)
            try:
                self.launches[config] = recorded(run)
            except Exception:
                self.launches[config] = []
        return self.launches[config]

    @property
    def wanted(self) -> list[KernelConfig | None]:
        return self.search.waiting if self.prepared else [None, *self.search.waiting]


class Sweep:
    """Searches in the order of importance.

    Args:
        make_bench: makes the tensors of a problem.
        compiler: compiles ahead.
        measure: times calls.
        shared_limit: bytes of shared memory that one block can have.
        first: candidates of every search's first round, instead of a grid or a similar problem's best.
        broke: whether a candidate is known to break the GPU for the process that runs it.
    """

    def __init__(
        self,
        make_bench: Callable[[TuningProblem], Bench],
        compiler: CompilePool,
        measure: Measure,
        shared_limit: int,
        first: Sequence[KernelConfig] | None = None,
        clock: Callable[[], float] = time.monotonic,
        broke: Callable[[Problem, KernelConfig], bool] = lambda problem, config: False,
    ):
        self._make_bench, self._compiler, self._measure = make_bench, compiler, measure
        self._shared_limit, self._first, self._clock, self._broke = shared_limit, first, clock, broke
        self._best: dict[str, list[KernelConfig]] = {}  # of finished problems

    def run(self, problems: Sequence[TuningProblem], seconds: float) -> Iterator[Tuned]:
        """Yields each problem's outcome as soon as it is known, for as many as the time suffices.

        Raises DeviceBroken, after which nothing can be measured in this process.
        """
        start = self._clock()
        end = start + seconds - _RESERVE_SECONDS
        shares, total = 0.0, sum(problem.share for problem in problems)
        waiting = []
        for problem in problems:
            shares += problem.share
            waiting.append((problem, start + (end - start) * shares / total))
        running: list[_Open] = []
        while (waiting or running) and self._clock() < end:
            yield from self._begin(waiting, running)
            self._step(running)
            for one in list(running):
                if one.search.finished or (self._clock() >= one.finish_by and len(one.search.times) > 1):
                    running.remove(one)
                    yield self._finished(one)
        for one in running:
            if len(one.search.times) > 1:
                yield self._finished(one)

    def _begin(self, waiting: list[tuple[TuningProblem, float]], running: list[_Open]) -> Iterator[Tuned]:
        """Opens problems, so that there is always something to compile. Similar ones wait for the one they are like.
        Yields those that cannot be opened."""
        while waiting and sum(len(one.wanted) for one in running) < 2 * self._compiler.processes:
            open_names = {one.bench.tuned.name for one in running}
            ready = [place for place, (problem, _) in enumerate(waiting) if problem.like not in open_names]
            if not ready:
                return
            problem, finish_by = waiting.pop(ready[0])
            try:
                bench = self._make_bench(problem)
                running.append(_Open(bench, self._search(bench), finish_by))
            except Exception as error:  # too little memory, for example: the next problem may be smaller
                _raise_if_broken(problem, None, None, error)
                yield Tuned(problem, reason=reason_of(error))

    def _search(self, bench: Bench) -> Search:
        facts = cache(bench.facts)

        def refused(config: KernelConfig) -> str | None:
            if self._broke(bench.problem, config):
                return "broke the GPU before"
            return refusal(config, bench.problem, facts(config.rows), self._shared_limit)

        if self._first is not None:
            return Search(bench.default, self._first, lambda config: (), refused, GRID_MOST)
        similar = self._best.get(bench.tuned.like)
        if similar:
            return Search(bench.default, similar, neighbours, refused, LIKE_MOST)
        return Search(bench.default, grid(bench.problem), neighbours, refused, GRID_MOST)

    def _step(self, running: list[_Open]) -> None:
        """Tries the first candidate that is compiled, or waits for one."""
        wanted = [(one, config) for one in running for config in one.wanted]
        self._compiler.request([launched for one, config in wanted for launched in one.launches_of(config)])
        for one, config in wanted:
            if not one.prepared and config is not None:
                continue
            outcomes = [self._compiler.outcome(launched) for launched in one.launches_of(config)]
            if None not in outcomes:
                self._try(one, config, next(filter(None, outcomes), ""))
                return
        self._compiler.wait(0.05)

    def _try(self, one: _Open, config: KernelConfig | None, reason: str) -> None:
        search, bench = one.search, one.bench
        try:
            if reason:
                raise RuntimeError(reason)
            if config is None:
                bench.prepare()
                one.prepared = True
                return
            bench.check(config)
            (milliseconds,) = self._measure([bench.caller(config)], SCREEN_SECONDS)
            bench.compare()
            search.record(config, milliseconds)
        except Exception as error:  # of the compiler, the driver or a comparison: the next candidate may do better
            _raise_if_broken(bench.tuned, bench.problem, config, error)
            reason = reason or (f"wrong: {error}" if isinstance(error, Wrong) else reason_of(error))
            if config is not None:
                search.fail(config, reason)
            else:
                one.prepared = True
                for other in list(search.waiting):
                    search.fail(other, f"the default configuration, {reason}")

    def _finished(self, one: _Open) -> Tuned:
        self._best[one.bench.tuned.name] = one.search.best(_SEEDS)
        finalists = one.search.finalists
        outcome = Tuned(one.bench.tuned, one.bench.problem, one.bench.default, one.bench.layers)
        if not finalists:
            reason = next(iter(one.search.failures.values()), "nothing was tried")
            return replace(outcome, reason=reason)
        try:
            times = self._measure([one.bench.caller(config) for config in finalists], FINAL_SECONDS)
        except Exception as error:
            _raise_if_broken(one.bench.tuned, one.bench.problem, None, error)
            return replace(outcome, reason=reason_of(error))
        return replace(outcome, found=one.search.found(dict(zip(finalists, times, strict=True))))


def device_measure(device: torch.device) -> Measure:
    """Times calls on a GPU: graphs, flushed caches, in turns."""
    timer = DeviceTimer(device)
    return lambda calls, seconds: measured(timer, calls, seconds)


def measured(timer: Timer, calls: Sequence[Call], seconds: float) -> list[float]:
    timed = [timer.prepare(call, seconds) for call in calls]
    time_in_turns(timer, timed, [seconds] * len(timed))
    for one in timed:
        if one.failure is not None:
            raise one.failure
    return [percentiles(one.milliseconds)[1] for one in timed]


def _raise_if_broken(
    tuned: TuningProblem, problem: Problem | None, config: KernelConfig | None, error: Exception
) -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except Exception as broken:
        raise DeviceBroken(reason_of(error), tuned, problem, config) from broken
