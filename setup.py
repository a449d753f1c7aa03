"""Builds sparse_attn._C where there are a C++ compiler and torch, with a kernel for GPUs where there is also nvcc;
pyproject.toml declares everything else."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch that the extension loads into
PYTHON_TAG = "cp310"


def missing_for_extension() -> str | None:
    """Says what the extension cannot be built without, or returns None where everything is there."""
    if os.name == "nt":
        return "the kernels need GCC or Clang"
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((one for one in candidates if shutil.which(one.split()[0])), None)
    if compiler is None:
        return f"no C++ compiler was found (looked for {', '.join(candidates)})"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"the build cannot import torch ({error}); install torch, then use --no-build-isolation"
    os.environ["CXX"] = compiler
    os.environ.setdefault("CC", compiler)
    return None


def extension_arguments() -> dict:
    """The setup() arguments that build csrc/ into one abi3 module on torch's stable ABI."""
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    others = (path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh", ".cu", ".py"))
    # These arguments follow those of CFLAGS: who asks there for code that is made quickly shall get it.
    optimised = [] if {"-O0", "-O1", "-Og"} & set(os.environ.get("CFLAGS", "").split()) else ["-O3"]
    extension = CppExtension(
        "sparse_attn._C",
        sources,
        depends=sorted(str(path.relative_to(ROOT)) for path in others),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=["-std=c++20", *optimised, "-g0", "-fvisibility=hidden", "-Wall", "-ffp-contract=fast"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": build_command()},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


def build_command() -> type:
    """build_ext that adds the object file of the kernel for GPUs, if this torch can use it."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    sys.path.insert(0, str(ROOT / "csrc"))
    import nvcc

    class Build(BuildExtension):
        def build_extensions(self):
            (extension,) = self.extensions
            macros = ["=".join(macro) for macro in extension.define_macros]
            if torch.version.cuda is not None:
                folder = Path(self.build_temp)
                built = nvcc.built_object(folder, extension.include_dirs, macros, torch.version.cuda)
                if built is not None:
                    extension.extra_objects.append(str(built[0]))
                    extension.extra_link_args += built[1]
            super().build_extensions()

    return Build


missing = missing_for_extension()
if missing:
    print(
        f"sparse_attn: installing without the C++ extension: {missing}. "
        "Everything works; what the extension does falls back to slower Python.",
        file=sys.stderr,
    )

setup(
    packages=[*find_packages(include=["sparse_attn", "sparse_attn.*"]), "sparse_attn.kernels"],
    package_dir={"sparse_attn.kernels": "kernels"},
    package_data={"sparse_attn.kernels": ["tuning/*.json"]},
    **({} if missing else extension_arguments()),
)
