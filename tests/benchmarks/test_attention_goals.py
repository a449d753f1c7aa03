"""Goals are compared with rows as they say."""

from dataclasses import replace

import pytest

from benchmarks.attention_goals import DENSE, FLASH, FLEX, GOALS, MEMORY, TRITON, UNROUNDED, Goal, outcome, outcomes
from tests.benchmarks.attention_samples import make_results, make_row

GOAL = Goal("cuda", "squad384", "forward", "tile", None, "float16", DENSE, 2.0)
ROWS = (
    make_row("sdpa-flash", 0.06), make_row("sdpa-cudnn", 0.05), make_row("eager", 0.001, mask="element"),
    make_row("triton", 0.02, mask="tile"), make_row("torch", 0.2, mask="tile"),
    make_row("triton", 0.022, mask="tile", bits=3), make_row("flex", 0.08, mask="tile"),
    make_row("sdpa-flash", 0.01, direction="forward+backward"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("against", "bits", "ratio", "other"),
    [
        (DENSE, None, 2.5, "sdpa-cudnn"),
        (FLASH, None, 3.0, "sdpa-flash"),
        (FLEX, None, 4.0, "flex"),
        (UNROUNDED, 3, 1.1, "triton"),
        (MEMORY, None, 2.0, None),
    ],
)
def test_the_fastest_of_ours_is_compared_with_the_right_row(against, bits, ratio, other):
    found = outcome(make_results(ROWS), replace(GOAL, against=against, bits=bits))
    assert found.ratio == pytest.approx(ratio) and found.own["variant"] == "triton"
    assert (found.other and found.other["variant"]) == other


@pytest.mark.parametrize(
    ("against", "bits", "ratio", "met"),
    [
        (DENSE, None, 2.5, True),
        (DENSE, None, 2.6, False),
        (UNROUNDED, 3, 1.11, True),
        (UNROUNDED, 3, 1.05, False),
        (MEMORY, None, 2.0, True),
        (MEMORY, None, 1.4, False),
    ],
)
def test_goals_are_met_or_missed(against, bits, ratio, met):
    assert outcome(make_results(ROWS), replace(GOAL, against=against, bits=bits, ratio=ratio)).met is met


def test_two_backends_are_compared_whichever_is_faster():
    for native, ratio in ((0.016, 1.25), (0.04, 0.5)):
        rows = (*ROWS, make_row("native", native, mask="tile"))
        found = outcome(make_results(rows), replace(GOAL, against=TRITON, ratio=1.2))
        assert found.ratio == pytest.approx(ratio) and found.met is (ratio > 1.2)
        assert (found.own["variant"], found.other["variant"]) == ("native", "triton")


@pytest.mark.parametrize("changed", [{"workload": "long4096"}, {"mask": "element"}, {"bits": 4}])
def test_a_goal_without_its_rows_is_not_measured(changed):
    found = outcome(make_results(ROWS), replace(GOAL, **changed))
    assert found.met is None and found.ratio is None


def test_a_goal_without_the_peer_is_not_measured():
    own = [row for row in ROWS if row["variant"] == "triton"]
    for against in (DENSE, FLEX):
        found = outcome(make_results(own), replace(GOAL, against=against))
        assert found.met is None and found.own is not None


def test_only_goals_for_the_device_and_dtype_are_looked_at():
    assert len(outcomes(make_results(ROWS))) == sum(goal.device_type == "cuda" for goal in GOALS)
    bfloat16 = outcomes(make_results([], device_type="cpu", dtype="bfloat16"))
    assert [(one.goal.mask, one.goal.ratio, one.met) for one in bfloat16] == [
        ("element", 2.5, None),
        ("tile", 4.0, None),
    ]
    assert outcomes(make_results(ROWS, dtype="float32")) == []
