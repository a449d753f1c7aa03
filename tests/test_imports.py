"""What an import may cost, and which way the package's imports run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import sparse_attn
from sparse_attn.tracing import constant_when_traced

ROOT = Path(__file__).resolve().parent.parent

# A module imports from layers above its own in this list, or from its own layer without a cycle.
LAYERS = [
    ["version"],
    ["arguments", "files", "extension", "progress", "dropout", "distributed", "cutting", "tracing"],
    ["bitpacking"],
    ["averages", "published", "quantization", "calibration", "ranking", "step_lists"],
    ["layout"],
    ["masks"],
    ["ops", "validation"],
    ["kernels"],
    ["backends"],
    ["attention"],
    ["integrations"],
    ["squad", "training", "finetuning", "distillation"],
    ["doctor", "benchmarks"],
]
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}
MAY_IMPORT_TRANSFORMERS = {"integrations", "squad", "training", "finetuning", "distillation", "benchmarks"}

COLD_START = """
import sys
sys.modules["triton"] = None
import torch
import sparse_attn
assert not {"transformers", "torch._dynamo"} & set(sys.modules), "either takes longer than torch itself"
assert not torch.cuda.is_available()
mask = sparse_attn.GlobalMask.from_function(lambda layer, head, query, key: query >= key, 1, 2, 24)
query, key, value = torch.randn(3, 1, 2, 24, 32)
for backend in ("reference", "auto"):
    output = sparse_attn.sparse_attention(query, key, value, mask.layout(0), backend=backend)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(output, expected, atol=1e-5)
"""


def test_works_without_triton_and_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", COLD_START]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_imported_late_are_those_that_editors_see():
    tree = ast.parse(Path(sparse_attn.__file__).read_text())
    (unrun,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {node.module: tuple(alias.name for alias in node.names) for node in unrun.body}
    assert seen == sparse_attn._IMPORTED_LATE
    assert all(getattr(sparse_attn, name).__name__ == name for names in seen.values() for name in names)
    assert set(sparse_attn.__all__) <= set(dir(sparse_attn))
    assert not hasattr(sparse_attn, "patch_gpt")


def test_constants_are_marked_as_torch_marks_them():
    def ours(): ...

    def theirs(): ...

    assert vars(constant_when_traced(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name; the kernels' folder counts under its installed name."""
    found = {}
    names = {"sparse_attn": "sparse_attn", "kernels": "sparse_attn.kernels", "benchmarks": "benchmarks"}
    for folder, name in names.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = path
    return found


def imports(module: str) -> Iterator[str]:
    """The names that a module imports, anywhere in it, as absolute dotted names."""
    path = modules()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield full if full in modules() else source


def part(module: str) -> str:
    """The entry of LAYERS that a module belongs to; "" for the package itself, which gathers names."""
    names = module.split(".")
    return "benchmarks" if names[0] == "benchmarks" else ".".join(names[1:2])


@cache
def own_imports() -> list[tuple[str, str]]:
    return [
        (module, name)
        for module in modules()
        for name in imports(module)
        if name.split(".")[0] in ("sparse_attn", "benchmarks")
    ]


def test_every_module_has_a_layer():
    unknown = {part(module) for module in modules()} - set(LAYER_OF) - {""}
    assert not unknown, f"say in LAYERS where these stand: {sorted(unknown)}"


def test_every_import_is_of_a_module_that_exists():
    missing = [f"{module} imports {name}" for module, name in own_imports() if name not in modules()]
    assert not missing


def test_imports_run_one_way():
    wrong = [
        f"{module} imports {name}"
        for module, name in own_imports()
        if part(module)
        and (LAYER_OF[part(name)] > LAYER_OF[part(module)] if part(name) else part(module) not in LAYERS[-1])
    ]
    assert not wrong


def test_no_import_cycle():
    graph: dict[str, set[str]] = {}
    for module, name in own_imports():
        # A subpackage counts as one: its __init__ gathers its modules, which may import each other.
        if part(module) and part(name) and part(module) != part(name):
            graph.setdefault(part(module), set()).add(part(name))
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> None:
        assert node not in trail, f"import cycle: {' -> '.join([*trail, node])}"
        if node not in done:
            for following in sorted(graph.get(node, ())):
                visit(following, [*trail, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])


@cache
def backends() -> set[str]:
    """The modules that can be asked what they do not support; shared helpers beside them are no backends."""
    return {
        module
        for module, path in modules().items()
        if module.startswith("sparse_attn.backends.")
        and any(getattr(node, "name", "") == "unsupported" for node in ast.parse(path.read_text()).body)
    }


def test_backends_never_import_each_other():
    assert {"sparse_attn.backends.reference", "sparse_attn.backends.torch"} <= backends()
    wrong = [
        f"{module} imports {name}"
        for module, name in own_imports()
        if module in backends() and (name in backends() - {module} or name == "sparse_attn.backends")
    ]
    assert not wrong


def test_no_module_measures_itself_by_the_reference():
    """The registry lists it and sparse_attention's module runs it; comparing with it is for tests."""
    importers = {module for module, name in own_imports() if name == "sparse_attn.backends.reference"}
    assert importers <= {"sparse_attn.backends", "sparse_attn.attention"}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("transformers", MAY_IMPORT_TRANSFORMERS), ("triton", {"kernels", "backends", "benchmarks"})],
)
def test_who_imports_a_heavy_library(library, allowed):
    importers = {module for module in modules() for name in imports(module) if name.split(".")[0] == library}
    assert importers, f"nothing imports {library}"
    assert not {module for module in importers if part(module) not in allowed}
