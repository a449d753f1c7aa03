"""Compiles every shipped kernel configuration for GPUs without one: registers, spills, shared memory, matrix unit.

    python -m benchmarks.kernel_report [--kernels forward] [--architectures 80 90 100]
        [--variants padded "3 bits"] [--json OUT]

Needs Triton alone; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_attn.kernels.backward import grad_key_value_kernel, grad_query_kernel
from sparse_attn.kernels.configuration import SHIPPED_CONFIGS, KernelConfig
from sparse_attn.kernels.forward import forward_kernel
from sparse_attn.kernels.launch import common_constants

ARCHITECTURES = (80, 90, 100)
# Shared memory that one block can have, in bytes, by compute capability.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}

_KERNELS = {"forward": forward_kernel, "grad_query": grad_query_kernel, "grad_key_value": grad_key_value_kernel}
_POINTERS = {
    "lse": "*fp32", "delta": "*fp32", "stops": "*i32", "columns": "*i32", "row_bits": "*i32", "levels": "*fp32",
    "query_lengths": "*i32", "key_lengths": "*i32", "key_padding": "*u8", "cu_seqlens": "*i32", "seed": "*i64",
}  # fmt: skip
_ELEMENTS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")
_FLOATS = ("scale", "scale_log2", "log2_threshold", "step", "dropout_factor")
# Options of a call, and the levels of its rounding (0: none).
_VARIANTS = {
    "plain": ({}, 0),
    "padded": (dict(query_lengths=True, key_lengths=True, key_padding=True), 0),
    "tile": (dict(full=True, query_lengths=True, key_lengths=True), 0),
    "packed": (dict(packed=True), 0),
    "3 bits": (dict(packed=True), 8),
    "causal, dropout": (dict(causal=True, dropout=True), 0),
}


@dataclass(frozen=True)
class Compiled:
    """What came out for one configuration: registers and spilled bytes a thread, shared memory in bytes a block."""

    kernel: str
    variant: str
    architecture: int
    head_dim: int
    dtype: str
    config: KernelConfig
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]


def compile_kernel(
    kernel: str, head_dim: int, dtype: torch.dtype, config: KernelConfig, variant: str, architecture: int
) -> Compiled:
    """Compiles a kernel for one configuration and reads the machine code."""
    function = _KERNELS[kernel]
    options, levels = _VARIANTS[variant]
    constants = common_constants(head_dim, config, dtype, **options)
    constants |= dict(LEVELS=levels, MID_POINTS=True, ROUNDED=levels > 0, STORE_LSE=True)
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    element = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    signature, divisible = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _ELEMENTS:
            signature[name] = element
        elif name in _POINTERS:
            signature[name] = _POINTERS[name]
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif name == "dropout_threshold":
            signature[name] = "i64"
        elif name.startswith("stride") and name.endswith("_dim"):
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or (name.startswith("stride") and "lse" not in name):
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, divisible)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Compiled(
        kernel, variant, architecture, head_dim, str(dtype).removeprefix("torch."), config, registers, spilled,
        compiled.metadata.shared, _matrix_instructions(compiled.asm["ptx"]),
    )  # fmt: skip


def shipped(kernels: list[str], architectures: list[int], variants: list[str]) -> list[tuple]:
    """Arguments of `compile_kernel` for every shipped configuration; bfloat16, which differs from float16 in the
    matrix instruction's type alone, for the forward kernel at head_dim 64."""
    jobs = []
    for kernel in kernels:
        for (head_dim, size), config in SHIPPED_CONFIGS[kernel].items():
            types = [torch.float16] if size == 2 else [torch.float32]
            if (kernel, head_dim, size) == ("forward", 64, 2):
                types.append(torch.bfloat16)
            jobs += [
                (kernel, head_dim, dtype, config, *rest) for dtype, *rest in product(types, variants, architectures)
            ]
    return jobs


def compile_all(jobs: list[tuple], processes: int) -> list[Compiled]:
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_kernel, *zip(*jobs, strict=True), chunksize=4))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes a thread, from the machine code's own record."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _matrix_instructions(ptx: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=list(_KERNELS), choices=_KERNELS)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES), choices=SHARED_LIMIT)
    parser.add_argument("--variants", nargs="+", default=list(_VARIANTS), choices=_VARIANTS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = compile_all(shipped(arguments.kernels, arguments.architectures, arguments.variants), arguments.processes)
    columns = "{:>14} {:>8} {:>9} {:>16} {:>4} {:>9} {:>8} {:>8}  {}"
    print(columns.format("kernel", "head_dim", "dtype", "variant", "sm", "registers", "spilled", "shared", "matrix"))
    for one in results:
        shown = (one.kernel, one.head_dim, one.dtype, one.variant, one.architecture, one.registers, one.spilled_bytes)
        print(columns.format(*shown, one.shared_bytes, " ".join(one.matrix_instructions) or "-"))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in results], indent=1))


if __name__ == "__main__":
    main()
