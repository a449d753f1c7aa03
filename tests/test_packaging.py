"""What pip builds from the source, and how it lives beside another package called `kernels`."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from sparse_attn import extension
from sparse_attn.version import __version__

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

# One worker runs these tests, so that each wheel is built once.
pytestmark = pytest.mark.xdist_group("packaging")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)


def python(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process with `path` before all installed packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def source(tmp_path) -> Path:
    return copy_source(tmp_path / "source")


def copy_source(target: Path) -> Path:
    """A checkout without anything built, since a build writes beside the sources."""
    target.mkdir()
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for folder in ("csrc", "kernels", "sparse_attn", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, target / folder, ignore=unbuilt)
    for pattern in ("*.md", "*.toml", "*.txt", "setup.py", "MANIFEST.in", "LICENSE"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, target)
    return target


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `pip wheel` into `source`/dist."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--verbose", "--wheel-dir", source / "dist"]
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, source],
        cwd=source.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def unpack_only_wheel(source: Path) -> tuple[str, Path]:
    (wheel,) = (source / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(source.parent / "installed")
    return wheel.name, source.parent / "installed"


def pure_wheel(source: Path) -> Path:
    """The folder of an unpacked wheel that holds no extension and says so in its name."""
    name, folder = unpack_only_wheel(source)
    assert name == f"sparse_attn-{__version__}-py3-none-any.whl"
    assert not list(folder.rglob("_C*"))
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> tuple[str, Path]:
    """A wheel's name and the folder it is unpacked in."""
    source = copy_source(tmp_path_factory.mktemp("packaging") / "source")
    built = build_wheel(source, CFLAGS="-O0")  # what is in it matters here, not how fast it is
    assert built.returncode == 0, built.stdout + built.stderr
    return unpack_only_wheel(source)


@needs_compiler
def test_wheel_contents(wheel):
    name, folder = wheel
    assert re.fullmatch(rf"sparse_attn-{re.escape(__version__)}-cp310-abi3-\w+\.whl", name)
    assert {path.name for path in folder.iterdir()} == {"sparse_attn", f"sparse_attn-{__version__}.dist-info"}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "sparse_attn").rglob("*.py")}
    tables = sorted((ROOT / "kernels" / "tuning").glob("*.json"))
    expected |= {f"sparse_attn/{path.relative_to(ROOT)}" for path in [*KERNELS, *tables]}
    assert KERNELS and tables and expected <= files
    assert "sparse_attn/_C.abi3.so" in files
    assert not {file for file in files if "test" in file or "benchmark" in file}
    metadata = folder / f"sparse_attn-{__version__}.dist-info"
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text()
    requirements = re.findall(r"^Requires-Dist: ([^;\n]+)$", (metadata / "METADATA").read_text(), re.MULTILINE)
    assert sorted(requirements) == ["numpy", "safetensors", "torch>=2.11", "tqdm", "transformers>=5"]


IMPORT_WHEEL = """
import importlib.util, torch
import sparse_attn, sparse_attn.kernels
from sparse_attn import bitpacking, extension
assert extension.available(), extension.reason()
mask = torch.rand(1000) < 0.5
assert torch.equal(bitpacking.unpack_bits(bitpacking.pack_bits(mask), 1000), mask)
print(sparse_attn.__file__, *sparse_attn.kernels.__path__, sep="\\n")
print(importlib.util.find_spec("sparse_attn.kernels.{kernel}").origin)
"""


@needs_compiler
def test_an_installed_wheel_works_outside_the_repository(wheel, tmp_path):
    """In an environment that holds nothing else; what the package depends on comes from this one."""
    name, folder = wheel
    clean = tmp_path / "clean"
    venv.create(clean, symlinks=True)
    own = clean / "bin" / "python"
    install = [sys.executable, "-m", "pip", f"--python={own}", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, folder.parent / "source" / "dist" / name], check=True, capture_output=True)
    (site,) = clean.glob("lib/python*/site-packages")
    # A path in a .pth file does not bring the .pth files there, and so no editable installation.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = IMPORT_WHEEL.replace("{kernel}", KERNELS[0].stem)
    done = subprocess.run([own, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = site / "sparse_attn"
    kernels = package / "kernels"
    assert done.stdout.split() == [str(package / "__init__.py"), str(kernels), str(kernels / KERNELS[0].name)]


USE_TWICE = """
import torch, sparse_attn
from sparse_attn import bitpacking, extension
assert not extension.available()
for size in (1000, 1001):
    mask = torch.rand(size) < 0.5
    assert torch.equal(bitpacking.unpack_bits(bitpacking.pack_bits(mask), size), mask)
mask = sparse_attn.GlobalMask.random(1, 2, 24, sparsity=0.5)
for _ in range(2):
    sparse_attn.sparse_attention(*torch.randn(3, 1, 2, 24, 32), mask.layout(0))
"""


def test_installs_and_works_without_a_compiler(source, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    built = build_wheel(source, CXX="", PATH=str(empty))
    assert built.returncode == 0, built.stdout + built.stderr
    assert "no C++ compiler was found (looked for c++, g++, clang++)" in built.stdout + built.stderr
    folder = pure_wheel(source)
    done = python(USE_TWICE, tmp_path, folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning") == 1
    assert "was not built when sparse_attn was installed" in done.stderr


def test_installs_where_the_build_has_no_torch(source, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('not on this machine')")
    built = build_wheel(source, PYTHONPATH=str(broken))
    assert built.returncode == 0, built.stdout + built.stderr
    assert "the build cannot import torch (not on this machine)" in built.stdout + built.stderr
    pure_wheel(source)


def test_a_compiler_asked_for_by_name_is_not_replaced(source):
    built = build_wheel(source, CXX="/nonexistent/c++")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "no C++ compiler was found (looked for /nonexistent/c++)" in built.stdout + built.stderr
    pure_wheel(source)


@needs_compiler
def test_an_error_in_the_sources_is_no_missing_compiler(source):
    shutil.rmtree(source / "csrc" / "cpu")
    (source / "csrc" / "broken.cpp").write_text("#error this kernel is broken\n")
    built = build_wheel(source)
    assert built.returncode != 0
    assert "this kernel is broken" in built.stdout + built.stderr
    assert "without the C++ extension" not in built.stdout + built.stderr


FAKE_KERNELS = '''
__version__ = "{version}"

class _Kind(type):
    def __getattr__(cls, name):
        return cls()

class Anything(metaclass=_Kind):
    """Accepts whatever it is made or called with; as a decorator it changes nothing."""
    def __init__(self, *args, **kwargs):
        pass
    def __call__(self, decorated=None, *args, **kwargs):
        return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
'''

IMPORT_BOTH = """
import json
import kernels
import sparse_attn.kernels
from transformers import BertModel
from transformers.utils import is_kernels_available
assert is_kernels_available()
ours = sparse_attn.kernels
print(json.dumps([kernels.__file__, kernels.__version__, ours.__file__, *ours.__path__, BertModel.__name__]))
"""


def test_another_package_called_kernels(tmp_path):
    site = tmp_path / "site"
    metadata = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    (site / "kernels").mkdir(parents=True)
    metadata.mkdir()
    (site / "kernels" / "__init__.py").write_text(FAKE_KERNELS.replace("{version}", KERNELS_MIN_VERSION))
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    done = python(IMPORT_BOTH, ROOT, ROOT, site)
    assert done.returncode == 0, done.stderr
    theirs, version, ours, path, bert = json.loads(done.stdout)
    assert (theirs, version) == (str(site / "kernels" / "__init__.py"), KERNELS_MIN_VERSION)
    assert (ours, path) == (str(ROOT / "sparse_attn" / "kernels.py"), str(ROOT / "kernels"))
    assert bert == "BertModel"


def test_hooks_and_constraints_name_the_same_versions():
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = re.findall(r'"([\w-]+)==([\w.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert {tool for tool, _ in hooks} == {"ruff", "clang-format", "typos"}
    assert all(pinned[tool] == version for tool, version in hooks)


def test_remedies_install_from_the_projects_folder():
    """No package index has sparse_attn."""
    assert extension.how_to_install("bench") == (
        """in the project's folder `pip install --no-build-isolation ".[bench]"`"""
    )
    assert "--force-reinstall ." in extension.HOW_TO_GET_IT and "sparse-attn" not in extension.HOW_TO_GET_IT
