"""Runs commands one after the other, each in a time slot of its own, and keeps a record of all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .device import ROOT, code_and_date
from .pages import write_json

LOG, SUMMARY = "log.txt", "summary.json"
OK, FAILED, OUT_OF_TIME, SKIPPED = "ok", "failed", "out of time", "skipped"
STOP_SECONDS = 10.0  # for a command to end by itself after an interrupt
_LAST_LINES = 12
_START_AND_END_SECONDS = 15.0
_LEAST_SECONDS = 1.0
_BEGIN_SHARE = 0.6


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: what it is called.
        command: its words. "{seconds}" and "{minutes}" become the time for its work: its slot, less what starting and
            an orderly end take; "{begin_by}" the seconds after which it should begin nothing that takes long.
        share: of the time that is left, compared with the steps after it. What a step does not use, they get.
        least: seconds that it gets all the same, while they are left; shares leave later steps theirs.
        environment: variables that it gets besides.
        copies: files to copy when it has ended, in whichever way: (from, to).
        skipped: why it is not run, or "".
    """

    name: str
    command: tuple[str, ...]
    share: float = 1.0
    least: float = 0.0
    environment: Mapping[str, str] | None = None
    copies: tuple[tuple[Path, Path], ...] = ()
    skipped: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a step: `status` is one of OK, FAILED, OUT_OF_TIME and SKIPPED, `reason` says why it is not OK."""

    name: str
    status: str
    reason: str = ""
    command: str = ""
    slot_seconds: float = 0.0
    seconds: float = 0.0
    exit_status: int | None = None
    copied: tuple[str, ...] = ()
    last_lines: tuple[str, ...] = ()


def run_steps(steps: Sequence[Step], seconds: float, folder: Path) -> Iterator[Outcome]:
    """Runs the steps within `seconds`. What they print goes to log.txt in `folder`; yields each outcome at its end."""
    end = time.monotonic() + seconds
    for place, step in enumerate(steps):
        if step.skipped:
            yield Outcome(step.name, SKIPPED, step.skipped)
            continue
        left = end - time.monotonic()
        later = [other for other in steps[place + 1 :] if not other.skipped]
        share = left * step.share / (step.share + sum(other.share for other in later))
        unclaimed = left - sum(other.least for other in later)
        slot = max(min(share, unclaimed), min(step.least, left))
        if slot < _LEAST_SECONDS:
            yield Outcome(step.name, SKIPPED, f"{max(0.0, left):.0f} s were left")
            continue
        yield run_step(step, slot, folder / LOG)


def run_step(step: Step, slot: float, log: Path, stop_seconds: float = STOP_SECONDS) -> Outcome:
    """Runs one step; after `slot` seconds, less those for its end, it is interrupted, and then killed."""
    allowed = max(slot - stop_seconds, slot / 2)
    working = max(allowed - _START_AND_END_SECONDS, allowed / 2)
    command = [_filled(word, working) for word in step.command]
    shown = " ".join(_shown(word) for word in command)
    start = time.monotonic()
    before = {source: _written(source) for source, _ in step.copies}
    with log.open("ab") as output:
        output.write(f"===== {step.name}: {shown}\n".encode())
        output.flush()
        beginning = output.tell()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=_environment(step.environment), start_new_session=True,
                preexec_fn=_heed_interrupts,
            )  # fmt: skip
        except OSError as error:
            return Outcome(step.name, FAILED, str(error), shown, round(slot, 1))
        in_time = _wait(process, allowed, slot - allowed)
    status = OK if in_time and process.returncode == 0 else FAILED if in_time else OUT_OF_TIME
    return Outcome(
        name=step.name,
        status=status,
        reason=_reason(status, process.returncode, allowed),
        command=shown,
        slot_seconds=round(slot, 1),
        seconds=round(time.monotonic() - start, 1),
        exit_status=process.returncode,
        copied=tuple(_copied([one for one in step.copies if _written(one[0]) not in (None, before[one[0]])])),
        last_lines=tuple(_last_lines(log, beginning)),
    )


def write_summary(outcomes: Sequence[Outcome], folder: Path, **facts: Any) -> None:
    """Writes summary.json: `facts`, the code and its environment, and the outcomes."""
    content = {
        **facts,
        **code_and_date(),
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    write_json(content, folder / SUMMARY)


def print_summary(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="steps", width=120)
    for name, justify in (("step", "left"), ("status", "left"), ("seconds", "right"), ("slot", "right")):
        table.add_column(name, justify=justify)
    table.add_column("last line, or reason", overflow="fold")
    for one in outcomes:
        last = one.last_lines[-1] if one.last_lines and one.status == OK else one.reason
        table.add_row(one.name, one.status, f"{one.seconds:.0f}", f"{one.slot_seconds:.0f}", Text(last))
    Console(width=120).print(table)
    for one in outcomes:
        if one.status in (FAILED, OUT_OF_TIME):
            print(f"--- {one.name}, its last lines:", *one.last_lines, sep="\n")


def _filled(word: str, seconds: float) -> str:
    values = {
        "{seconds}": f"{seconds:.1f}",
        "{minutes}": f"{seconds / 60:.3f}",
        "{begin_by}": f"{_BEGIN_SHARE * seconds:.1f}",
    }
    return values.get(word, word)


def _shown(word: str | Path) -> str:
    """A word as records show it: not where this machine keeps Python and the project."""
    if word == sys.executable:
        return "python"
    path = Path(word)
    return str(path.relative_to(ROOT) if path.is_absolute() and path.is_relative_to(ROOT) else word)


def _environment(added: Mapping[str, str] | None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(added or {})}


def _wait(process: subprocess.Popen, seconds: float, stop_seconds: float) -> bool:
    """Waits for a process and ends what is left of its group. Says whether it ended by itself in time."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(stop_seconds)
        return False
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _heed_interrupts() -> None:
    """What is started in the background of a shell ignores interrupts, and so would its commands."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(process: subprocess.Popen, number: int) -> None:
    """To the process and all that it started, which are a group of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _written(path: Path) -> int | None:
    """When a file was written; an earlier run's is none of this one."""
    return path.stat().st_mtime_ns if path.exists() else None


def _copied(copies: Sequence[tuple[Path, Path]]) -> Iterator[str]:
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        yield f"{_shown(source)} to {_shown(target)}"


def _reason(status: str, exit_status: int, seconds: float) -> str:
    if status == OUT_OF_TIME:
        return f"stopped after {seconds:.0f} s"
    if status == OK:
        return ""
    return f"killed by signal {-exit_status}" if exit_status < 0 else f"exit status {exit_status}"


def _last_lines(log: Path, beginning: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(beginning)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-_LAST_LINES:]
