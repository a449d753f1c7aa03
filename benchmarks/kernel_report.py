"""Compiles the shipped kernel configurations for GPUs without one: registers, spills, shared memory, matrix unit.

    python -m benchmarks.kernel_report [--kernels forward] [--targets sm_90 gfx942]
        [--variants padded "3 bits"] [--head-dims 64] [--recorded] [--csv OUT]
    python -m benchmarks.kernel_report --update

The second command brings the committed record of all of them (`compiled_kernels.py`) up to date, after a change to the
kernels or their tables. Needs Triton alone; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_attn.kernels.backward import grad_key_value_kernel, grad_query_kernel
from sparse_attn.kernels.configuration import KERNELS, TABLES, KernelConfig, Problem, read_table
from sparse_attn.kernels.forward import forward_kernel
from sparse_attn.kernels.launch import common_constants, compile_options

from .compiled_kernels import Compiled, Record, read_record, record_path, write_record

_FUNCTIONS = {"forward": forward_kernel, "grad_query": grad_query_kernel, "grad_key_value": grad_key_value_kernel}
_POINTERS = {
    "lse": "*fp32", "delta": "*fp32", "stops": "*i32", "columns": "*i32", "step_bits": "*i32", "order": "*i32",
    "levels": "*fp32", "query_lengths": "*i32", "key_lengths": "*i32", "key_padding": "*u8", "cu_seqlens": "*i32",
    "seed": "*i64",
}  # fmt: skip
_ELEMENTS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")
_FLOATS = ("scale", "scale_log2", "log2_threshold", "step", "dropout_factor")


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_86": GPUTarget("cuda", 86, 32), "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kind of call: options of `common_constants`, whether it rounds, and whether to the mid-points of bins. What its
    lists look like follows from the configuration, unless `full` says that all rows keep the same."""

    options: dict[str, bool]
    rounded: bool = False
    mid_points: bool = True


VARIANTS = {
    "plain": Variant({}),
    "padded": Variant(dict(query_lengths=True, key_lengths=True, key_padding=True)),
    "tile": Variant(dict(full=True, query_lengths=True, key_lengths=True)),
    "packed": Variant(dict(packed=True)),
    "3 bits": Variant(dict(packed=True), rounded=True),
    "3 bits, calibrated": Variant(dict(key_lengths=True), rounded=True, mid_points=False),
    "causal, dropout": Variant(dict(causal=True, dropout=True)),
}


@dataclass(frozen=True)
class Job:
    """One kernel to compile: an entry of the tuning table of that name, for a kind of call and a target."""

    table: str
    problem: Problem
    config: KernelConfig
    dtype: torch.dtype
    variant: str
    target: str


def compile_job(job: Job, known: dict[tuple[str, str], Compiled] | None = None) -> Compiled:
    """Compiles a kernel for one configuration and reads the machine code, or takes its facts from `known`, whose keys
    are kernels and identities."""
    source, options, target = _source(job), compile_options(job.config), TARGETS[job.target]
    given = (source.signature, source.constants, source.attrs, options, target)
    identity = _digest(*(sorted(one.items(), key=str) if isinstance(one, dict) else one for one in given))
    if known and (job.problem.kernel, identity) in known:
        same = known[job.problem.kernel, identity]
        facts = same.registers, same.spilled_bytes, same.shared_bytes, same.matrix
    else:
        compiled = triton.compile(source, target=target, options=options)
        registers, spilled, matrix = (_read_amd if target.backend == "hip" else _read_nvidia)(compiled)
        facts = registers, spilled, compiled.metadata.shared, " ".join(matrix)
    dtype, config = str(job.dtype).removeprefix("torch."), job.config
    cut = config.rows, config.columns, config.held, int(config.split), config.num_warps, config.num_stages
    problem = job.problem
    return Compiled(identity, job.table, problem.kernel, job.variant, job.target, problem.head_dim, dtype, *cut, *facts)


def _digest(*things: object) -> str:
    return hashlib.sha256("\n".join(map(str, things)).encode()).hexdigest()[:16]


def sources() -> dict[str, str]:
    """An identity of each kernel with all that it calls, and of the compiler."""
    return {kernel: _digest(triton.__version__, function.cache_key) for kernel, function in _FUNCTIONS.items()}


def _source(job: Job) -> ASTSource:
    variant = VARIANTS[job.variant]
    function = _FUNCTIONS[job.problem.kernel]
    options = variant.options
    if job.config.split and not options.get("full"):
        options = {**options, "parts": 2, "full": True}
    amd = TARGETS[job.target].backend == "hip"
    constants = common_constants(job.problem.head_dim, job.config, job.dtype, amd=amd, **options)
    constants |= dict(LEVELS=8 if variant.rounded else 0, MID_POINTS=variant.mid_points, ROUNDED=variant.rounded)
    constants |= dict(HELD=job.config.held, STORE_LSE=True)
    signature, divisible = {}, {}
    for position, name in enumerate(function.arg_names):
        signature[name] = _type_of(name, job.dtype, constants)
        if signature[name].startswith("*") or (name.startswith("stride") and "lse" not in name):
            divisible[(position,)] = [["tt.divisibility", 16]]
    constants |= {name: 1 for name in function.arg_names if name.startswith("stride") and name.endswith("_dim")}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    return ASTSource(function, signature, constants, divisible)


def _type_of(name: str, dtype: torch.dtype, constants: dict[str, object]) -> str:
    if name in constants or (name.startswith("stride") and name.endswith("_dim")):
        return "constexpr"
    if name in _ELEMENTS:
        return {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    if name in _FLOATS:
        return "fp32"
    return "i64" if name == "dropout_threshold" else _POINTERS.get(name, "i32")


def jobs(kernels: list[str], targets: list[str], variants: list[str], head_dims: list[int] | None = None) -> list[Job]:
    """Every entry of the default table for all targets, and of the tables of GPUs for those of their architecture, in
    the variants that it is used for; bfloat16, which differs from float16 in the matrix instruction's type alone, for
    the default table's forward kernel at head_dim 64 without rounding."""
    found = {}
    for path in sorted(TABLES.glob("*.json")):
        table, default = read_table(path), path.stem == "default"
        served = [target for target in targets if default or target == table.architecture]
        for problem, config in table.entries:
            if problem.kernel not in kernels or (head_dims and problem.head_dim not in head_dims):
                continue
            kind = (problem.kernel, problem.rounded, problem.head_dim, problem.element_bytes)
            types = [torch.float16] if problem.element_bytes == 2 else [torch.float32]
            if default and kind == ("forward", False, 64, 2):
                types.append(torch.bfloat16)
            # The backward kernels have one entry for calls with and without rounding.
            rounded = {problem.rounded} if problem.kernel == "forward" else {False, True}
            used = [name for name in variants if VARIANTS[name].rounded in rounded]
            for rest in product(types, used, served):
                # Entries for other lengths and spreads may have the same configuration.
                found[(path.stem, kind, config, *rest)] = Job(path.stem, problem, config, *rest)
    return list(found.values())


def compile_all(wanted: list[Job], processes: int, known: dict[tuple[str, str], Compiled]) -> list[Compiled]:
    """All jobs in several processes, but for what `known` has."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(partial(compile_job, known=known), wanted, chunksize=4))


def _read_nvidia(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, tuple[str, ...]]:
    """Registers and spilled bytes a thread from the machine code's own record, and the assembly's instructions for the
    matrix unit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    # Each is one instruction of the machine code: HMMA, HGMMA and UTC*MMA, which take much longer to list.
    matrix = sorted(set(re.findall(r"\b(mma\.sync|wgmma|tcgen05)\.(?:aligned\.m|mma)", compiled.asm["ptx"])))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), tuple(matrix)


def _read_amd(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, tuple[str, ...]]:
    """The same from the assembly, of a wavefront's vector registers."""
    text = compiled.asm["amdgcn"]
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    matrix = sorted(set(re.findall(r"\b(v_s?mfma)_", text)))
    return int(usage["vgpr_count"]), int(usage["private_segment_fixed_size"]), tuple(matrix)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--head-dims", nargs="+", type=int, help="of those in the tables (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--recorded", action="store_true", help="take what is unchanged from the committed record")
    parser.add_argument("--update", action="store_true", help="compile what the record lacks, and write it")
    parser.add_argument("--csv", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    wanted = jobs(arguments.kernels, arguments.targets, arguments.variants, arguments.head_dims)
    if arguments.update and wanted != jobs(list(KERNELS), list(TARGETS), list(VARIANTS)):
        parser.error("--update records all kernels, targets, variants and head_dims: leave these options out")
    record = record_path(triton.__version__)
    known = read_record(record).known(sources()) if arguments.recorded or arguments.update else {}
    results = compile_all(wanted, arguments.processes, known)
    columns = "{:>12} {:>14} {:>8} {:>9} {:>18} {:>7} {:>14} {:>9} {:>8} {:>8}  {}"
    measured = ("cut", "registers", "spilled", "shared", "matrix")
    print(columns.format("table", "kernel", "head_dim", "dtype", "variant", "target", *measured))
    for one in results:
        cut = f"{one.rows}x{one.columns}" + (f"/{one.held}" if one.held else "")
        named = (one.table, one.kernel, one.head_dim, one.dtype, one.variant, one.target, cut)
        print(columns.format(*named, one.registers, one.spilled_bytes, one.shared_bytes, one.matrix or "-"))
    for path in (arguments.csv, record if arguments.update else None):
        if path:
            write_record(Record(sources(), results), path)


if __name__ == "__main__":
    main()
