"""Which configurations a search tries, on which problems, and who compiles them."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import tune
from benchmarks.tuning.bench import typical_layers
from benchmarks.tuning.candidates import ListFacts, grid, neighbours, refusal
from benchmarks.tuning.compiling import CompilePool, reason_of
from benchmarks.tuning.problems import PROBLEMS
from benchmarks.tuning.search import GRID_MOST, Search
from sparse_attn import SparseLayout
from sparse_attn.kernels.configuration import KERNELS, KernelConfig, Problem

SHARED_LIMIT = 232448
HELD = KernelConfig(rows=16, columns=16, num_warps=2, num_stages=1, held=64)


def test_a_search_follows_the_best():
    """The least of a smooth function is found from afar, with few looks; what is refused is not tried."""
    best = KernelConfig(128, 64, 8, 5)

    def cost(config: KernelConfig) -> float:
        fields = ("rows", "columns", "num_warps", "num_stages")
        return 1 + sum(abs(math.log2(getattr(config, name) / getattr(best, name))) for name in fields) + config.held

    first = [KernelConfig(16, 64, 2, 2, held=64), KernelConfig(64, 16, 2, 2, held=128)]
    search = Search(
        KernelConfig(16, 16, 1, 1), first, neighbours, lambda config: "no" if config.split else None, GRID_MOST
    )
    while not search.finished:
        config = search.waiting[0]
        assert not config.split
        search.record(config, cost(config)) if config.columns != 128 else search.fail(config, "odd: too wide")
    assert search.best(1) == [best]
    assert len(search.times) + len(search.failures) <= GRID_MOST
    found = search.found({config: cost(config) for config in search.finalists})
    assert found.winner == best and found.failed["odd"] > 0
    with pytest.raises(ValueError, match="no configuration ran"):
        search.found({})


def test_candidates_fit_the_chip():
    facts = ListFacts(shortest=20, longest=300, splits=True)
    for kernel in KERNELS:
        for head_dim in (32, 64, 128):
            for size in (2, 4):
                problem = Problem(kernel, False, head_dim, size, 384, 2.0)
                usable = [one for one in grid(problem) if refusal(one, problem, facts, SHARED_LIMIT) is None]
                assert len(set(usable)) == len(usable) >= 20
    problem = Problem("forward", False, 64, 2, 384, 2.0)

    def why(config: KernelConfig, facts: ListFacts = facts, limit: int = SHARED_LIMIT) -> str | None:
        return refusal(config, problem, facts, limit)

    assert why(KernelConfig(128, 128, 2, 2)) == "registers"
    assert why(KernelConfig(64, 128, 4, 7), limit=100_000) == "shared memory"
    assert why(KernelConfig(64, 128, 4, 4), limit=100_000) is None  # as much as with 3 stages
    assert why(KernelConfig(16, 16, 8, 2)) == "warps without work"
    assert why(KernelConfig(64, 16, 2, 3, split=True), replace(facts, splits=False)) == "nothing to split"
    assert why(replace(HELD, held=512), replace(facts, longest=60)) == "holds far more than any list"
    assert why(HELD, replace(facts, shortest=65)) == "no list fits what is held"
    assert refusal(HELD, replace(problem, kernel="grad_query"), facts, SHARED_LIMIT) == "holds nothing"


def test_problems_are_told_apart_by_the_table():
    names = [problem.name for problem in PROBLEMS]
    assert len(set(names)) == len(names)
    for place, problem in enumerate(PROBLEMS):
        assert problem.like is None or problem.like in names[:place], "similar problems come earlier"
        assert not problem.workload.packed
    assert [one.name for one in tune.chosen_problems(["*-tile-*", names[0]])][:2] == names[:2]
    with pytest.raises(ValueError, match="'backward-\\*' matches no problem"):
        tune.chosen_problems(["backward-*"])


def test_typical_layers_lie_around_the_mean():
    keeps = [torch.zeros(1, 64, 64, dtype=torch.bool) for _ in range(4)]
    for keep, columns in zip(keeps, (4, 20, 40, 60)):
        keep[:, :, :columns] = True
    layouts = [SparseLayout(keep) for keep in keeps]
    assert typical_layers(layouts) == [1, 2]
    assert typical_layers(layouts[:1]) == [0] and typical_layers(layouts[1:2] * 3) == [0]


def test_processes_compile_and_say_what_fails():
    """Without a GPU, every compilation fails, and says so."""
    with CompilePool(1) as pool:
        pool.wait_until_started(60)
        wanted = [("no_kernel", (), ()), ("other_kernel", (), ())]
        pool.request(wanted)
        while None in [pool.outcome(one) for one in wanted]:
            pool.request(wanted)
            pool.wait(1.0)
        assert pool.outcome(wanted[0]).startswith("AttributeError: ")
    assert reason_of(MemoryError()) == "MemoryError"
