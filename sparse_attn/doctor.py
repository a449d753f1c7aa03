"""What this installation can do, what is missing, and what would change that: `python -m sparse_attn.doctor`."""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from . import extension
from .attention import backends_on
from .backends import native_cpu, native_cuda, triton
from .integrations.onednn import multiplied_as, onednn_dtypes, onednn_is_faster
from .kernels.configuration import TABLES, table_name, table_of
from .version import __version__

_OPTIONAL = {"accelerate": "training", "torchmetrics": "EM and F1"}  # packages, and what needs them


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        ok: whether it is there and works.
        text: what was found.
        remedy: the command, or what else, that would make it work; empty where nothing is to be done.
    """

    name: str
    ok: bool
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Looks at packages, the extension, processors and backends."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {_version('transformers')}"
    package = Finding("sparse_attn", True, f"{__version__} ({versions})")
    return [package, _extension(), *_cuda_kernel(), _triton(), *_processors(), *map(_optional, _OPTIONAL)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _optional(package: str) -> Finding:
    if found := _version(package):
        return Finding(package, True, found)
    return Finding(package, False, f"not installed; {_OPTIONAL[package]} needs it", extension.how_to_install("bench"))


def _extension() -> Finding:
    reason = extension.reason()
    if reason is not None:
        return Finding("C++ extension", False, reason, extension.HOW_TO_GET_IT)
    best, *others = native_cpu.instruction_sets()
    also = f" (also: {', '.join(others)})" if others else ""
    threads = torch.get_num_threads()
    counted = "1 thread" if threads == 1 else f"{threads} threads"
    return Finding("C++ extension", True, f"kernels for {best} are used{also}, {counted}")


def _cuda_kernel() -> list[Finding]:
    """Only what a torch with CUDA can use."""
    if torch.version.cuda is None or not extension.available():
        return []
    if native_cuda.built():
        return [Finding("CUDA kernels", True, "built into the extension")]
    compiler = f"CUDA {torch.version.cuda.partition('.')[0]}'s compiler, nvcc"
    remedy = f"install {compiler}, then {extension.HOW_TO_GET_IT}; with -v, pip shows what nvcc says"
    text = "not built: there was no nvcc, it was newer than torch's CUDA, or could not compile them"
    return [Finding("CUDA kernels", False, text, remedy)]


def _triton() -> Finding:
    if triton.TRITON_INSTALLED:
        return Finding("Triton", True, str(_version("triton")))
    remedy = "pip install triton" if torch.cuda.is_available() else ""
    return Finding("Triton", not torch.cuda.is_available(), "not installed; only GPUs need it", remedy)


def _processors() -> list[Finding]:
    findings = []
    if not torch.cuda.is_available():
        text = "none: this build of torch has no CUDA" if torch.version.cuda is None else "none: torch sees no GPU"
        findings.append(Finding("GPU", True, text))
    for index in range(torch.cuda.device_count()):
        findings.append(_tuning(torch.device("cuda", index)))
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*findings, *(_backend(device) for device in devices), _linear_layers()]


def _tuning(device: torch.device) -> Finding:
    gpu, table = torch.cuda.get_device_name(device), table_of(device)
    if table is not None:
        tuned_for = "it" if table.device == gpu else f"{table.device}, which has the same architecture"
        return Finding("GPU", True, f"{gpu}, kernels tuned for {tuned_for}")
    remedy = f"python -m benchmarks.tune, in the project's repository, writes {TABLES.name}/{table_name(gpu)}"
    return Finding("GPU", False, f"{gpu}, for which the kernels are not tuned: default configurations are used", remedy)


def _backend(device: str) -> Finding:
    reasons = backends_on(device)
    chosen = next(name for name in reasons if not reasons[name])
    passed_over = [
        f"{name} cannot ({'; '.join(reasons[name])})" for name in list(reasons)[: list(reasons).index(chosen)]
    ]
    return Finding(f"backend on {device}", True, ", ".join([f"{chosen} computes attention", *passed_over]))


def _linear_layers() -> Finding:
    computed = onednn_dtypes()
    if not computed:
        return Finding("linear layers on cpu", False, "torch's own: this build has no oneDNN")
    text = "torch's own, faster than oneDNN without AVX-512"
    if onednn_is_faster(torch.float32):
        text = f"oneDNN computes {_names(computed)}"
    converted = [dtype for dtype in (torch.bfloat16, torch.float16) if multiplied_as(dtype) != dtype]
    if converted:
        text += f"; {_names(converted)} by oneDNN as float32, which is faster on this processor"
    return Finding("linear layers on cpu", True, text)


def _names(dtypes: list[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m sparse_attn.doctor", description=__doc__).parse_args(arguments)
    for finding in examine():
        print(f"{'ok     ' if finding.ok else 'missing'}  {finding.name}: {finding.text}")
        if finding.remedy:
            print(f"         to change that: {finding.remedy}")


if __name__ == "__main__":
    main()
