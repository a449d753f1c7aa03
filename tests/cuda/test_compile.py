"""The CUDA kernels compile without a GPU, fit multiprocessors, and link into an extension that loads without one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import cuda_report
from benchmarks.compiled_kernels import CompiledByNvcc, read_record
from benchmarks.cuda_report import INSTRUCTIONS, compile_kernels, nvcc, record_of, sources

ROOT = Path(__file__).parents[2]
COMPILER = nvcc.find()
ARCHITECTURES = nvcc.known_architectures(COMPILER) if COMPILER else []
REGISTERS_OF_A_MULTIPROCESSOR = 65536
# Threads of a block, which has a multiprocessor to itself, and kernels with that in their name: for float16 and
# bfloat16, head_dim 32 and 64, three ways of rounding.
KERNELS = {"Forward": (384, 12), "QueryGradientWarp": (256, 4), "KeyGradientWarp": (256, 4)}
COUNT = sum(kinds for _, kinds in KERNELS.values())

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no nvcc"),
    pytest.mark.xdist_group("cuda"),
]


@pytest.fixture(scope="module")
def recorded() -> list[CompiledByNvcc]:
    """What the record says of these sources and this compiler; nothing if it is of others."""
    record = read_record(record_of(COMPILER), CompiledByNvcc)
    return record.compiled if record.sources == sources(COMPILER) else []


@pytest.fixture(scope="module")
def compiled(recorded, tmp_path_factory) -> tuple[Path, list[CompiledByNvcc]]:
    """The object file and its kernels: for all architectures, or, where those are recorded, for one."""
    target = tmp_path_factory.mktemp("nvcc") / "attention.o"
    return target, compile_kernels(COMPILER, target, ["90"] if recorded else ARCHITECTURES)


@pytest.fixture
def kernels(recorded, compiled) -> list[CompiledByNvcc]:
    return recorded or compiled[1]


def test_the_record_says_what_the_compiler_says(recorded, compiled):
    if not recorded:
        pytest.skip("what is recorded was compiled from other sources, or by another compiler")
    assert compiled[1] == [one for one in recorded if one.architecture == "90"]


def test_kernels_fit_and_spill_nothing(kernels):
    assert {one.architecture for one in kernels} == set(ARCHITECTURES) and len(kernels) == COUNT * len(ARCHITECTURES)
    assert not any(one.spilled_bytes for one in kernels)
    for name, (threads, kinds) in KERNELS.items():
        own = [one.registers for one in kernels if f"{name}<" in one.kernel]
        assert len(own) == kinds * len(ARCHITECTURES)
        rounded_up = -(-max(own) // 8) * 8
        assert rounded_up * threads <= REGISTERS_OF_A_MULTIPROCESSOR


def test_kernels_use_the_instructions_they_are_made_for(kernels):
    assert all(one.instructions.split() == list(INSTRUCTIONS) for one in kernels)


def test_the_report_needs_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cuda_report", "--update"])
    with pytest.raises(SystemExit):
        cuda_report.main()
    assert "error: there is no nvcc (looked in CUDA_HOME and on the search path)" in capsys.readouterr().err


def test_a_compiler_newer_than_torchs_cuda_is_passed_over(tmp_path, capsys):
    older = nvcc.release(COMPILER) - 1
    assert nvcc.built_object(tmp_path, [], [], f"{older}.8") is None
    assert f"whose code older drivers refuse; torch has CUDA {older}\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_object_links_into_a_library_that_loads_without_a_gpu(compiled, tmp_path):
    library, folder = tmp_path / "attention.so", Path(torch.__file__).parent / "lib"
    command = ["c++", "-shared", compiled[0], "-o", library, f"-L{folder}", "-ltorch_cpu", "-ltorch"]
    subprocess.run([*command, *nvcc.link_arguments(COMPILER)], check=True, capture_output=True)
    code = f"""
import torch
from sparse_attn.backends import native_cuda
torch.ops.load_library({str(library)!r})
for name in ("native_attention_cuda", "native_attention_gradients_cuda"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_attn::{{name}}", "CUDA")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
