"""Compiles launches of the kernels in processes of their own, ahead of their first run.

A launch is recorded without being run: what Triton specialises a kernel for are the types of its arguments, and of
integers also the values. A process that compiles the same launch fills Triton's cache on disk, so that the process that
measures reads a finished program.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import AsyncResult

from torch import Tensor

from sparse_attn.kernels import launch

from ..device import start_worker

_KERNELS = ("forward_kernel", "grad_query_kernel", "grad_key_value_kernel")
_REASON_LENGTH = 200
_LONGEST_SECONDS = 90.0  # then a compilation counts as failed, or its process as dead

# A launch: the kernel's name; its arguments, with the dtype in place of a tensor; its compile-time arguments.
Launch = tuple[str, tuple, tuple]


def recorded(run: Callable[[], None]) -> list[Launch]:
    """The different launches that `run` makes; none of them is carried out."""
    found: dict[Launch, None] = {}
    with _replaced_kernels(found):
        run()
    return list(found)


class _Recorder:
    def __init__(self, name: str, found: dict[Launch, None]):
        self._name, self._found = name, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*arguments, **constants) -> None:
            types = tuple(item.dtype if isinstance(item, Tensor) else item for item in arguments)
            self._found[self._name, types, tuple(constants.items())] = None

        return record


@contextmanager
def _replaced_kernels(found: dict[Launch, None]) -> Iterator[None]:
    originals = {name: getattr(launch, name) for name in _KERNELS}
    try:
        for name in _KERNELS:
            setattr(launch, name, _Recorder(name, found))
        yield
    finally:
        for name, kernel in originals.items():
            setattr(launch, name, kernel)


def compile_launch(launched: Launch) -> str:
    """Compiles a launch for the current GPU into Triton's cache. Returns "", or why that failed."""
    name, arguments, constants = launched
    try:
        getattr(launch, name).warmup(*arguments, grid=(1,), **dict(constants))
    except Exception as error:  # of any stage of the compiler
        return reason_of(error)
    return ""


def reason_of(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_REASON_LENGTH].rstrip(": ")


class CompilePool:
    """Compiles in several processes, which use the GPU only to know what it is."""

    def __init__(self, processes: int):
        self.processes = processes
        self._pool = multiprocessing.get_context("spawn").Pool(processes, initializer=start_worker)
        self._running: dict[Launch, tuple[AsyncResult, float]] = {}
        self._outcomes: dict[Launch, str] = {}

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_) -> None:
        self._pool.terminate()
        self._pool.join()

    def wait_until_started(self, seconds: float) -> None:
        """Waits until a process has started. Raises RuntimeError where none does."""
        try:
            self._pool.apply_async(_nothing).get(seconds)
        except multiprocessing.TimeoutError:
            raise RuntimeError(f"no process that compiles kernels has started within {seconds:g} s") from None

    def request(self, launches: Sequence[Launch]) -> None:
        """Says which launches will be wanted, most urgent first. What was asked for before may be dropped."""
        self._collect()
        for launched in launches:
            if len(self._running) >= 2 * self.processes:  # more would delay what becomes urgent later
                return
            if launched not in self._outcomes and launched not in self._running:
                self._running[launched] = (self._pool.apply_async(compile_launch, (launched,)), time.monotonic())

    def outcome(self, launched: Launch) -> str | None:
        """ "" for a launch that is compiled, why it cannot be for another, None for one that is not ready."""
        return self._outcomes.get(launched)

    def wait(self, seconds: float) -> None:
        """Waits for outcomes, at most this long."""
        end = time.monotonic() + seconds
        while not self._collect() and time.monotonic() < end:
            time.sleep(0.01)

    def _collect(self) -> bool:
        """Takes in what is done; says whether anything was."""
        now, done = time.monotonic(), {}
        for launched, (result, begun) in self._running.items():
            if result.ready():
                done[launched] = result.get() if result.successful() else "the compiling process failed"
            elif now - begun > _LONGEST_SECONDS:
                done[launched] = f"not compiled within {_LONGEST_SECONDS:g} s"
        for launched in done:
            del self._running[launched]
        self._outcomes.update(done)
        return bool(done)


def _nothing() -> None:
    pass
