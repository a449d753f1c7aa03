"""The CUDA kernels on a GPU, and emulated on the CPU."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_attn.backends import native, native_cuda
from tests.helpers import CUDA

FOLDER = Path(__file__).parent
COMPILERS = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> None:
    """The operators of the kernels for CPU tensors."""
    if not COMPILERS:
        pytest.skip("there is no C++ compiler")
    library, folder = tmp_path_factory.mktemp("emulator") / "emulator.so", Path(torch.__file__).parent
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    options += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{folder / 'include'}", f"-L{folder / 'lib'}"]
    options += shlex.split(os.environ.get("CXXFLAGS", ""))
    command = [COMPILERS[0], *options, FOLDER / "emulated_attention.cpp", "-o", library, "-ltorch_cpu", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    torch.ops.load_library(library)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.skipif(not CUDA, reason="no GPU"))])
def device(request, monkeypatch) -> str:
    """Where the CUDA kernels compute what backend="native" asks for."""
    if request.param == "gpu":
        if not native_cuda.built():
            pytest.skip("the extension has no CUDA kernels")
        return "cuda"
    request.getfixturevalue("emulator")
    monkeypatch.setattr(native, "_kernels", lambda device: native_cuda)
    monkeypatch.setattr(native_cuda, "built", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return "cpu"
