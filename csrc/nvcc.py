"""How csrc/cuda is compiled: into one object file with code for many GPUs, which brings the CUDA runtime along, so that
the extension loads wherever it is installed. Used by setup.py and the tests."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "cuda" / "attention.cu"
PORTABLE = "80"  # code that the driver of any newer GPU can translate
# What the source is compiled as, and for which GPUs the assembler takes it: it is the same for those of a line.
CODES = {PORTABLE: (PORTABLE, "86", "89"), "90": ("90", "100")}
ARCHITECTURES = tuple(one for codes in CODES.values() for one in codes)


def find() -> Path | None:
    """CUDA's compiler, from CUDA_HOME or the search path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    return Path(found) if found else None


def release(nvcc: Path) -> int:
    """The CUDA version that a compiler belongs to, without what follows the point."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return int(re.search(r"release (\d+)\.", told)[1])


def known_architectures(nvcc: Path) -> list[str]:
    """Those of ARCHITECTURES that a compiler knows."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = re.findall(r"sm_(\d+)\b", listed)
    return [one for one in ARCHITECTURES if one in known]


def compile_object(
    nvcc: Path,
    target: Path,
    include_dirs: Sequence[str],
    macros: Sequence[str],
    options: Sequence[str] = (),
    architectures: Sequence[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Compiles for some architectures, by default all that this nvcc knows; where PORTABLE is among them, with its code
    for newer ones."""
    known = known_architectures(nvcc) if architectures is None else architectures
    codes = [
        f"-gencode=arch=compute_{source},code=sm_{one}"
        for source, targets in CODES.items()
        for one in targets
        if one in known
    ]
    if PORTABLE in known:
        codes.append(f"-gencode=arch=compute_{PORTABLE},code=compute_{PORTABLE}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [
            nvcc, "-std=c++20", "-O3", "-c", SOURCE, "-o", target, "--threads", "0", *codes, *options,
            "-Xcompiler", "-fPIC,-fvisibility=hidden",
            *(f"-I{folder}" for folder in include_dirs), *(f"-D{macro}" for macro in macros),
        ],
        capture_output=True, text=True,
    )  # fmt: skip


def link_arguments(nvcc: Path) -> list[str]:
    """What the linker needs beside the object file."""
    plan = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    told = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)  # nvcc itself may be a script or a link
    root = Path(told[1]) if told else nvcc.resolve().parents[1]
    folders = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
    found = [folder.resolve() for folder in folders if (folder / "libcudart_static.a").exists()]
    return [*(f"-L{folder}" for folder in found), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def built_object(
    folder: Path, include_dirs: Sequence[str], macros: Sequence[str], cuda_version: str
) -> tuple[Path, list[str]] | None:
    """The object file, compiled anew if its sources have changed, and the linker's arguments; None, with one line on
    stderr, where it cannot be compiled for drivers that serve CUDA `cuda_version`, torch's."""
    nvcc, target = find(), folder / "cuda_attention.o"
    if nvcc is None:
        return _without("there is no nvcc (looked in CUDA_HOME and on the search path)")
    major = cuda_version.partition(".")[0]
    if release(nvcc) > int(major):  # an older one's code runs on newer drivers
        return _without(f"{nvcc} is CUDA {release(nvcc)}'s, whose code older drivers refuse; torch has CUDA {major}")
    newest = max(path.stat().st_mtime for path in (Path(__file__), *SOURCE.parent.iterdir()))
    if not target.exists() or target.stat().st_mtime < newest:
        done = compile_object(nvcc, target, include_dirs, macros)
        if done.returncode != 0:
            return _without(f"{nvcc} failed:\n{done.stderr}")
    return target, link_arguments(nvcc)


def _without(reason: str) -> None:
    print(f"sparse_attn: building without the CUDA kernels, GPUs use the Triton kernels: {reason}", file=sys.stderr)
