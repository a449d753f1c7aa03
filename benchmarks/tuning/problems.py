"""What the kernels are tuned on, as data. The more important problems come first and get more of the time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..attention_workloads import WORKLOADS, Workload

_BY_NAME = {workload.name: workload for workload in WORKLOADS}
BITS = 3


@dataclass(frozen=True)
class TuningProblem:
    """A kernel on the tensors of a workload.

    Attributes:
        kernel: one of `sparse_attn.kernels.configuration.KERNELS`.
        workload: of the attention benchmark, without padding; its head_dim is not used.
        mask: "element", "tile" or "dense" (everything kept).
        head_dim, dtype: of query, key and value.
        bits: width that the forward kernel rounds probabilities to, or None.
        share: of the time, compared with the other problems.
        like: name of an earlier problem, whose fastest candidates are where the search begins; None: it begins with a
            grid of candidates.
    """

    kernel: str
    workload: Workload
    mask: str
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    bits: int | None = None
    share: float = 1.0
    like: str | None = None

    @property
    def name(self) -> str:
        """For example "forward-3bits-squad384-element-64-float16"."""
        kernel = self.kernel if self.bits is None else f"{self.kernel}-{self.bits}bits"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{kernel}-{self.workload.name}-{self.mask}-{self.head_dim}-{dtype}"


def _problem(
    kernel: str, workload: str = "squad384", mask: str = "element", like: TuningProblem | None = None, **fields
) -> TuningProblem:
    bits = BITS if kernel == "rounded" else None
    kernel = "forward" if kernel == "rounded" else kernel
    return TuningProblem(
        kernel, _BY_NAME[workload], mask, bits=bits, like=None if like is None else like.name, **fields
    )


def _all_problems() -> list[TuningProblem]:
    """bfloat16 shares the entries of float16: a table tells types by their size."""
    kernels = ("forward", "rounded", "grad_query", "grad_key_value")
    first = {kernel: _problem(kernel, share=4 if kernel in kernels[:2] else 3) for kernel in kernels}
    problems = [first["forward"], _problem("forward", mask="tile", share=4), first["rounded"]]
    problems += [first["grad_query"], first["grad_key_value"], _problem("forward", "long4096", share=3)]
    for kernel in kernels[1:]:
        problems.append(_problem(kernel, mask="tile", like=first[kernel], share=2))
    for kernel in kernels[1:]:
        problems.append(_problem(kernel, "long4096", like=first[kernel], share=1.5))
    for head_dim in (32, 128):
        problems += [_problem(kernel, like=first[kernel], head_dim=head_dim, share=0.75) for kernel in kernels]
    problems += [_problem(kernel, mask="dense", like=first[kernel], share=0.5) for kernel in kernels]
    float32 = {kernel: _problem(kernel, dtype=torch.float32, share=0.75) for kernel in kernels}
    problems += float32.values()
    problems.append(_problem("forward", "mid1024", like=first["forward"], share=0.5))
    for head_dim in (32, 128):
        for kernel, at_64 in float32.items():
            problems.append(_problem(kernel, like=at_64, head_dim=head_dim, dtype=torch.float32, share=0.4))
    return problems


PROBLEMS = tuple(_all_problems())
