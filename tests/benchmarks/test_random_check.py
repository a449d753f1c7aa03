"""Random calls against float64: drawn alike, within their error budgets, and mistakes are found."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import random_check
from benchmarks.random_cases import TARGETS, draw, tensors
from benchmarks.random_compare import Checked, check
from sparse_attn import extension
from sparse_attn.backends import native_cuda
from sparse_attn.kernels import launch
from tests.helpers import CUDA

CPU = torch.device("cpu")
INTERPRETER = TARGETS["triton", "cpu"]
interpreted = pytest.mark.skipif(CUDA, reason="Triton's interpreter is not chosen where there is a GPU")


def small_case(number: int, **kind):
    case = draw(number, 3, INTERPRETER)
    return replace(case, kind=replace(case.kind, **kind)) if kind else case


@interpreted
@pytest.mark.parametrize("number", [1, 13, 26, 50, 61])
def test_random_calls_are_within_their_budgets(number):
    case = draw(number, 3, INTERPRETER)
    assert draw(number, 3, INTERPRETER) == case
    checked = check(case, CPU)
    assert checked.failures == () and 0 < checked.share <= 1
    assert f"case {number}: " in case.describe()


def test_cases_cover_what_calls_can_be():
    cases = [draw(number, 0, TARGETS["triton", "cuda"]) for number in range(500)]
    kinds = [case.kind for case in cases]
    assert {kind.dtype for kind in kinds} == {torch.float16, torch.bfloat16, torch.float32}
    for field in ("packed", "causal", "offset", "lengths", "padding"):
        assert {getattr(kind, field) for kind in kinds} == {False, True}
    assert {None, 1, 8} < {kind.bits for kind in kinds} and {0.0, 0.5} < {kind.dropout for kind in kinds}
    assert {case.mask for case in cases} == {"random", "tile", "stripes", "band", "full", "empty"}
    assert max(case.query_len for case in cases) > 1000 and min(case.query_len for case in cases) == 1
    assert len(set(kinds)) < 50  # kernels are compiled for each
    assert all(case.query_offset + case.query_len <= case.mask_len >= case.key_len for case in cases)


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
@pytest.mark.parametrize("number", [13, 14, 26, 35, 40, 53, 84])
def test_random_calls_of_the_extension_are_within_their_budgets(number):
    checked = check(draw(number, 0, TARGETS["native", "cpu"]), CPU)
    assert checked.failures == () and 0 < checked.share <= 1


def test_cases_for_the_native_kernel_on_gpus_are_what_it_takes():
    """Everything that is drawn is computed by the kernels, which the emulated tests show; some of it is trained, and
    some is more heads of sequences than a GPU has multiprocessors."""
    trained = crowded = 0
    for number in range(200):
        case = draw(number, 0, TARGETS["native", "cuda"])
        generator = torch.Generator().manual_seed(0)
        query, key, value, _ = tensors(case, CPU, generator)
        packed = dict(packed=case.kind.packed, max_length=max(case.sequences, default=0))
        call = SimpleNamespace(query=query, key=key, value=value, dropout=case.kind.dropout, scale=case.scale, **packed)
        call.query_offset, call.causal, call.table = case.query_offset, case.kind.causal, case.kind.bits
        call.key_padding = object() if case.kind.padding else None
        trained += case.trains
        crowded += case.batch * case.kind.heads > 264
        assert not [reason for reason in native_cuda.refusals(call, case.trains) if "CUDA kernels" not in reason]
    assert 20 < trained < 120 and crowded > 20


def test_a_forward_pass_alone_is_checked_too():
    case = draw(3, 0, TARGETS["native", "cuda"])
    case = replace(case, target=replace(case.target, backend="torch"), kind=replace(case.kind, dtype=torch.float32))
    assert check(case, CPU).failures == ()


@interpreted
def test_mistakes_are_found(monkeypatch):
    """An element that is not written, a wrong sum, and results that change are all noticed."""
    plain = dict(dtype=torch.float32, packed=False, dropout=0.0, lengths=False, padding=False, bits=None)
    case = replace(small_case(1, **plain), mask="full", query_len=20, key_len=20, mask_len=20, query_offset=0, batch=1)
    assert check(case, CPU).failures == ()
    forward, calls = launch.forward, []

    def broken(how):
        def wrong(call, output, *rest):
            forward(call, output, *rest)
            calls.append(how)
            how(output)

        return wrong

    for how, complaint in (
        (lambda output: output[0, 0, 3].fill_(float("nan")), "output: not finite everywhere"),
        (lambda output: output[0, 0, 3].mul_(1.001), "output: error"),
        (lambda output: output.add_(len(calls) % 2 * 1e-6), "output: other bits in a second run"),
    ):
        monkeypatch.setattr(launch, "forward", broken(how))
        failures = "; ".join(check(case, CPU).failures)
        assert complaint in failures
    monkeypatch.setattr(launch, "forward", forward)
    backward = launch.backward_key_value

    def wrong_backward(call, lse, delta, grad_output, gradients, *rest):
        backward(call, lse, delta, grad_output, gradients, *rest)
        gradients[1][0, 0, 5].mul_(1.01)

    monkeypatch.setattr(launch, "backward_key_value", wrong_backward)
    assert check(case, CPU).failures[0].startswith("gradient of the value: error")


@interpreted
def test_the_command_reports_failures(monkeypatch, capsys):
    assert random_check.main(["--device", "cpu", "--cases", "2", "--seed", "3"]) == 0
    assert "2 of 2 random cases run, 0 failed" in capsys.readouterr().out

    def raising(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(random_check, "check", raising)
    assert random_check.main(["--device", "cpu", "--cases", "2", "--seed", "3"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: out of luck" in printed and "--seed 3 --only 1" in printed and "2 failed" in printed
    assert random_check.main(["--device", "cpu", "--cases", "2", "--minutes", "1e-9"]) == 1
    assert "0 of 2 random cases run" in capsys.readouterr().out


@interpreted
def test_an_interrupt_ends_with_what_was_done(monkeypatch, capsys):
    calls = iter(range(9))

    def interrupted(case, device):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return Checked(case.number, ("it is wrong",) if case.number == 1 else (), 0.25)

    monkeypatch.setattr(random_check, "check", interrupted)
    assert random_check.main(["--device", "cpu", "--cases", "5"]) == 1
    printed = capsys.readouterr()
    assert "interrupted" in printed.err and "it is wrong" in printed.out
    assert "2 of 5 random cases run, 1 failed, at most 25% of an error budget used" in printed.out


@interpreted
def test_no_case_is_begun_shortly_before_the_end(monkeypatch, capsys):
    """What the process needed before, for imports, counts."""
    monkeypatch.setattr(random_check, "check", lambda case, device: Checked(case.number, ()))
    for ago, done in ((30, 2), (56, 0)):
        status = random_check.main(["--device", "cpu", "--cases", "2", "--minutes", "1"], begun=time.time() - ago)
        assert status == int(done < 2) and f"{done} of 2 random cases run" in capsys.readouterr().out


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
def test_processes_hand_in_one_kind_after_the_other():
    numbers, target = list(range(10, 26)), TARGETS["native", "cpu"]
    now = time.time()
    found = random_check.check_in_processes(numbers, 2, 0, target, CPU, end=now + 100, stop=now + 120)
    done = [one.number for one in found]
    assert sorted(done) == numbers
    for kind in (numbers[:2], numbers[2:14], numbers[14:]):
        first = done.index(kind[0])
        assert done[first : first + len(kind)] == kind


def test_what_does_not_answer_in_time_is_not_waited_for(capsys):
    start = time.time()
    found = random_check.check_in_processes([0, 12], 2, 0, INTERPRETER, CPU, end=start + 60, stop=start)
    assert list(found) == [] and time.time() - start < 30
    assert "has not answered" in capsys.readouterr().err
