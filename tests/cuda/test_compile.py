"""The CUDA kernels compile without a GPU, fit multiprocessors, and link into an extension that loads without one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import nvcc  # noqa: E402

COMPILER = nvcc.find()
ARCHITECTURES = nvcc.known_architectures(COMPILER) if COMPILER else []
REGISTERS_OF_A_MULTIPROCESSOR = 65536
# Threads of a block, which has a multiprocessor to itself, and kernels with that in their name: for float16 and
# bfloat16, head_dim 32 and 64, three ways of rounding.
KERNELS = {"Forward": (384, 12), "QueryGradientWarp": (256, 4), "KeyGradientWarp": (256, 4)}
COUNT = sum(kinds for _, kinds in KERNELS.values())
MACRO = "TORCH_TARGET_VERSION=0x020b000000000000"

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no nvcc"),
    pytest.mark.xdist_group("cuda"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, str]:
    """The object file, and what ptxas says of its kernels."""
    target = tmp_path_factory.mktemp("nvcc") / "attention.o"
    include = [str(Path(torch.__file__).parent / "include")]
    options = ["-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-O0"]  # the host's code matters elsewhere
    done = nvcc.compile_object(COMPILER, target, include, [MACRO], options=options)
    assert done.returncode == 0, done.stderr
    return target, done.stdout + done.stderr


def test_kernels_fit_and_spill_nothing(compiled):
    report = compiled[1]
    names = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", report)
    assert {target for _, target in names} == set(ARCHITECTURES) and len(names) == COUNT * len(ARCHITECTURES)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(registers) == len(spills) == len(names)
    assert set(spills) == {("0", "0", "0")}
    for kernel, (threads, kinds) in KERNELS.items():
        own = [count for (name, _), count in zip(names, registers, strict=True) if f"{len(kernel)}{kernel}I" in name]
        assert len(own) == kinds * len(ARCHITECTURES)
        rounded_up = -(-max(own) // 8) * 8
        assert rounded_up * threads <= REGISTERS_OF_A_MULTIPROCESSOR


def test_kernels_use_the_instructions_they_are_made_for(compiled):
    """Products of matrices, rows gathered from shared memory as they are and transposed, asynchronous copies."""
    cuobjdump = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    for architecture in {"80", "90", "100"} & set(ARCHITECTURES):  # sm_86 and sm_89 have the instructions of sm_80
        command = [cuobjdump, "-sass", f"-arch=sm_{architecture}", compiled[0]]
        listing = subprocess.run(command, capture_output=True, text=True).stdout
        kernels = listing.split("Function :")[1:]
        assert len(kernels) == COUNT
        for kernel in kernels:
            for instruction in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS"):
                assert instruction in kernel


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
