"""Everything that needs a GPU, in one command and a fixed time: `python -m benchmarks.gpu_suite --help`.

The extension's build, tests, tuning, the attention benchmark and SQuAD, in this order: each in a slot of the time, as
long at least as what it needs in any case, while time is left. Asked for by name: random calls compared with float64,
the native kernel under compute-sanitizer, hardware counters, and long documents. A step that fails does not stop those
after it.

All results lie in one folder: log.txt, summary.json, the tuning table, attention.json, rows of SQuAD in squad/ and so
on.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch

from sparse_attn.kernels.configuration import TABLES, table_name

from .counters import no_profiler
from .device import no_gpu, spare_processors
from .gpu_steps import OK, SKIPPED, Outcome, Step, print_summary, run_steps, write_summary
from .options import OneLineParser, chosen, fail, folder_to_write, names, positive
from .squad.checkpoints import PACKAGED_MODEL, load_tokenizer
from .squad.data import choose_questions
from .squad.options import parse_options as squad_options

USUAL = ("build", "tests", "tune", "tune-native", "attention", "squad", "squad-shape")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
NAMES = (*USUAL, "random-triton", "random-native", *SANITIZERS, "counters", "long")
_SHAPE = "bert-base-shape"
# These need no GPU.
_IGNORED_TESTS = (
    "tests/benchmarks", "tests/kernels/test_compile.py", "tests/cuda/test_compile.py", "tests/test_packaging.py"
)  # fmt: skip


def parse_options(arguments: list[str] | None = None) -> Namespace:
    """The options; a bad one ends the program with one line on stderr and exit status 2."""
    parser = OneLineParser(
        prog="python -m benchmarks.gpu_suite",
        description="Tests, tunes and measures on this machine's GPU, within a fixed time.",
    )
    parser.add_argument(
        "--steps", type=names, help=f"by commas, of {', '.join(NAMES)}, or all (default: {','.join(USUAL)})"
    )
    parser.add_argument("--minutes", type=positive, default=9.5, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--output", type=folder_to_write, metavar="DIR", default="results/gpu", help="(default: %(default)s)"
    )
    parser.add_argument("--data", help="SQuAD v1.1 file to measure whole passes on (default: own questions)")
    parser.add_argument("--model", help="folder of a question-answering model for SQuAD (default: the packaged MiniLM)")
    return parser.parse_args(arguments)


def make_steps(options: Namespace, device: str) -> list[Step]:
    """The steps asked for. `device` is the GPU's name."""
    output = options.output.absolute()
    table = table_name(device)
    # Where the package finds it: what is measured next runs with it.
    tuned = ((output / table, TABLES / table),)
    steps = [
        Step("build", (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"), share=16, least=60),
        Step("tests", _tests_command(), share=24, least=75, environment={"OMP_NUM_THREADS": "1"}),
        Step("tune", _tune_command(output / table), share=26, least=100, copies=tuned),
        Step("tune-native", _python("tune_native", "--output", output / table), share=9, least=40, copies=tuned),
        Step("attention", _attention_command(output / "attention.json"), share=30, least=90),
        _squad_step("squad", options, options.model, output, 10),
        # A GPU has hardly begun with 32 questions when the next kernel is due.
        _squad_step("squad-shape", options, _SHAPE, output, 10, "--batch-size", "256"),
        Step("random-triton", _random_command("triton", 500), share=20, least=110),
        Step("random-native", _random_command("native", 500), share=8, least=60),
        *(_sanitizer_step(tool) for tool in SANITIZERS),
        _counters_step(output / "counters.json"),
        Step("long", _long_command(output / "long.json"), share=12, least=120),
    ]
    asked = list(NAMES) if options.steps == ["all"] else options.steps
    wanted = chosen("--steps", list(USUAL) if asked is None else asked, list(NAMES))
    return [step for step in steps if step.name in wanted]


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps. Returns the exit status: 2 for input of no use, 1 where a step failed."""
    start = time.monotonic()
    options = parse_options(arguments)
    try:
        device = _gpu_name()
        steps = make_steps(options, device)
        _check_inputs(options)
    except (ValueError, OSError) as error:
        return fail("gpu_suite", error, status=2)
    return _run(steps, options, device, start)


def _run(steps: list[Step], options: Namespace, device: str, start: float) -> int:
    options.output.mkdir(parents=True, exist_ok=True)
    _begin_table(options.output / table_name(device))
    outcomes: list[Outcome] = []
    left = 60 * options.minutes - (time.monotonic() - start)
    for outcome in run_steps(steps, left, options.output):
        outcomes.append(outcome)
        seconds = round(time.monotonic() - start, 1)
        write_summary(outcomes, options.output, device=device, minutes=options.minutes, seconds=seconds)
        print(f"{seconds:.0f} s: {outcome.name}: {outcome.status} {outcome.reason}", file=sys.stderr, flush=True)
        for copied in outcome.copied:
            print(f"    copied {copied}", file=sys.stderr, flush=True)
    print_summary(outcomes)
    print(f"{options.output}: {', '.join(sorted(path.name for path in options.output.iterdir()))}")
    return int(any(outcome.status not in (OK, SKIPPED) for outcome in outcomes))


def _begin_table(table: Path) -> None:
    """Tuning goes on from the table that the package has for this GPU: what there is no time for stays."""
    known = TABLES / table.name
    if known.exists() and not table.exists():
        shutil.copyfile(known, table)


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments))


def _tests_command() -> tuple[str, ...]:
    parallel = ("-n", str(spare_processors()), "--dist", "loadgroup") if importlib.util.find_spec("xdist") else ()
    ignored = (f"--ignore={path}" for path in _IGNORED_TESTS)
    chosen_tests = ("-k", "not emulated", *ignored, "tests")  # emulated kernels need no GPU, and minutes
    return (sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=10", *parallel, *chosen_tests)


def _sanitizer_step(tool: str) -> Step:
    """Random calls of the native kernel, watched by a tool of compute-sanitizer."""
    command = (
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--kernel-name", "kns=attention_kernel",
        "--report-api-errors", "no",  # asking a driver for what it lacks is no error
        "--launch-timeout", "0",  # importing torch takes long
        *_random_command("native", 100), "--processes", "1",
    )  # fmt: skip
    # With a cache of memory, accesses past the end of a tensor would be inside of what the tool knows as allocated.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, command, share=9, least=75, environment=uncached, skipped=_no_sanitizer())


def _counters_step(results: Path) -> Step:
    return Step("counters", _python("counters", "--json", results), share=9, least=120, skipped=no_profiler())


def _no_sanitizer() -> str:
    """Why compute-sanitizer cannot run, or ""."""
    return "" if shutil.which("compute-sanitizer") else "there is no compute-sanitizer on the search path"


def _attention_command(results: Path) -> tuple[str, ...]:
    return _python("attention", "--device", "cuda", "--budget", "{begin_by}", "--json", results)


def _tune_command(table: Path) -> tuple[str, ...]:
    return _python("tune", "--minutes", "{minutes}", "--output", table)


def _long_command(results: Path) -> tuple[str, ...]:
    return _python("long", "--device", "cuda", "--seconds", "2", "--json", results)


def _random_command(backend: str, cases: int) -> tuple[str, ...]:
    words = ("--backend", backend, "--device", "cuda", "--cases", cases, "--minutes", "{minutes}")
    return _python("random_check", *words)


def _squad_step(
    name: str, options: Namespace, model: str | None, output: Path, share: float, *arguments: str
) -> Step:  # fmt: skip
    """Its folder in `output` holds the rows of a run that is stopped, too; nothing large lies there."""
    folder = output / name
    arguments += ("--device", "cuda", "--dtype", "bfloat16", "--output", str(folder))
    return Step(
        name,
        _python("squad", *arguments, *_squad_inputs(model, options.data)),
        share=share,
        least=90,
        copies=((folder / "results.json", output / f"{name}.json"),),
        skipped=_no_model(model),
    )


def _squad_inputs(model: str | None, data: str | None) -> list[str]:
    given = {"--model": model, "--data": data}
    return [word for option, value in given.items() if value is not None for word in (option, value)]


def _check_inputs(options: Namespace) -> None:
    """Reads what the last steps will want, before the first ones take minutes. Raises ValueError or OSError."""
    choose_questions(squad_options(_squad_inputs(options.model, options.data)))
    if options.model not in (None, _SHAPE):
        load_tokenizer(options.model)


def _no_model(model: str | None) -> str:
    """Why there is no SQuAD, or ""; masks and tokens for the shape come from the packaged model."""
    if model in (None, _SHAPE) and importlib.util.find_spec(PACKAGED_MODEL) is None:
        return "the packaged MiniLM is not installed and there is no --model"
    return ""


def _gpu_name() -> str:
    """Raises ValueError where there is no GPU."""
    if not torch.cuda.is_available():
        raise ValueError(f"{no_gpu()}; run this on a machine with one")
    return torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
