"""Compiles the CUDA kernels for GPUs without one: registers, spills, instructions.

    python -m benchmarks.cuda_report [--architectures 90] [--update]

With --update, for all architectures, into the committed record, after a change to csrc/cuda. Needs nvcc, and Triton for
NVIDIA's disassembler.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .compiled_kernels import CompiledByNvcc, Record, record_path, write_record
from .device import ROOT

sys.path.insert(0, str(ROOT / "csrc"))
import nvcc

# Products of matrices, rows gathered from shared memory as they are and transposed, asynchronous copies.
INSTRUCTIONS = ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS")
_MACRO = "TORCH_TARGET_VERSION=0x020b000000000000"


def compile_kernels(compiler: Path, target: Path, architectures: Sequence[str]) -> list[CompiledByNvcc]:
    """Compiles csrc/cuda to an object file. Raises RuntimeError with what nvcc says of errors, warnings too."""
    include = [str(Path(torch.__file__).parent / "include")]
    options = ["-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-O0"]  # the host's code matters elsewhere
    done = nvcc.compile_object(compiler, target, include, [_MACRO], options, architectures)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    instructions = {one: _instructions(target, one) for one in architectures}
    compiled = []
    for entry in _demangled(done.stdout + done.stderr).split("Compiling entry function")[1:]:
        kernel, architecture = _kernel(entry), re.search(r"for 'sm_(\d+)'", entry)[1]
        spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        facts = registers, max(map(int, spilled.groups())), " ".join(instructions[architecture][kernel])
        compiled.append(CompiledByNvcc(kernel, architecture, *facts))
    return sorted(compiled, key=lambda one: (int(one.architecture), one.kernel))


def _instructions(target: Path, architecture: str) -> dict[str, list[str]]:
    """Those of INSTRUCTIONS that each kernel in an object file has."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", f"-arch=sm_{architecture}", target]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = _demangled(listing).split("Function :")[1:]
    return {_kernel(code): [one for one in INSTRUCTIONS if one in code] for code in kernels}


def _demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def _kernel(text: str) -> str:
    """The template arguments of the first kernel named in `text`."""
    return re.search(r"attention_kernel<(.*?)>\(", text)[1].replace("sparse_attn::", "").replace("> >", ">>").strip()


def sources(compiler: Path) -> dict[str, str]:
    """An identity of what is compiled, and of the compiler."""
    digest = hashlib.sha256(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    for path in [Path(nvcc.__file__), *sorted(nvcc.SOURCE.parent.iterdir())]:
        digest.update(path.read_bytes())
    return {"csrc/cuda": digest.hexdigest()[:16]}


def record_of(compiler: Path) -> Path:
    """Where the kernels are recorded as this compiler made them."""
    return record_path(nvcc.release(compiler), "nvcc")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compiler = nvcc.find()
    known = nvcc.known_architectures(compiler) if compiler else []
    parser.add_argument("--architectures", nargs="+", default=known, choices=known, help="default: all")
    parser.add_argument("--update", action="store_true", help="write the committed record, of all architectures")
    arguments = parser.parse_args()
    if compiler is None:
        parser.error("there is no nvcc (looked in CUDA_HOME and on the search path)")
    with tempfile.TemporaryDirectory() as folder:
        wanted = known if arguments.update else arguments.architectures
        kernels = compile_kernels(compiler, Path(folder) / "attention.o", wanted)
    if arguments.update:
        write_record(Record(sources(compiler), kernels), record_of(compiler))
    for one in kernels:
        print(f"sm_{one.architecture:<4} {one.registers} registers, {one.spilled_bytes} bytes spilled: {one.kernel}")


if __name__ == "__main__":
    main()
