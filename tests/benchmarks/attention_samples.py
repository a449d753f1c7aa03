"""Tiny attention workloads, and results made by hand."""

from benchmarks.attention_workloads import Workload
from sparse_attn import GlobalMask


def tiny_masks(granularity, device):
    """Two layers of two heads, 64 x 64; inputs are shorter."""
    return GlobalMask.random(2, 2, 64, sparsity=0.8, granularity=granularity).keep.to(device)


def tiny_workload(**fields):
    return Workload(
        **{"name": "tiny", "batch": 2, "heads": 2, "length": 48, "head_dim": 16, "masks": tiny_masks} | fields
    )


def packed_workload(**fields):
    return tiny_workload(**{"name": "packed", "batch": 3, "length": 40, "lengths": (40, 17, 5)} | fields)


def make_row(variant, p50_ms, mask="dense", bits=None, workload="squad384", direction="forward", **fields):
    row = {
        "workload": workload, "pass": direction, "variant": variant, "mask": mask, "bits": bits, "dtype": "float16",
        "p20_ms": p50_ms * 0.9, "p50_ms": p50_ms, "p80_ms": p50_ms * 1.1, "batch": 32, "density": 0.1, "work": 0.2,
        "memory_share": 0.5, "arithmetic_share": 0.25, "error": 4e-4, "timing": "graph", "layers": 1,
        "repetitions": 100,
    }  # fmt: skip
    return row | fields


def make_results(rows, absent=(), **fields):
    shape = {"batch": 32, "heads": 12, "length": 384, "head_dim": 64, "lengths": None, "tokens": 12288}
    results = {
        "device": "NVIDIA H200", "device_type": "cuda", "commit": "abc", "date": "2026-01-02T03:04:05+00:00",
        "versions": {"python": "3.12", "torch": "2.11"}, "dtype": "float16", "arguments": {},
        "ceilings": {"copy_bytes_per_second": 4e12, "matrix_flops_per_second": 8e14}, "seconds": 12.0,
        "workloads": {row["workload"]: shape for row in rows}, "left_out": [], "rows": list(rows),
        "absent": list(absent),
    }  # fmt: skip
    return results | fields
