"""What can compute attention. A backend is a module with

NAME               what `backend=` calls it
unsupported        (call, training) -> reasons why it cannot compute this call; empty if it can
layout_arguments   (layout, head_dim, dtype, rounded, training) -> the tensors, and integers, that its kernels want of a
                   layout; asked for once for each combination
BACKWARD_USES_LSE  whether training needs the forward's log-sum-exp

and has registered its forward (and backward) with `sparse_attn.ops`.
"""

from types import ModuleType

from . import native, reference, torch, triton

BACKENDS: dict[str, ModuleType] = {backend.NAME: backend for backend in (triton, native, torch, reference)}

# What backend="auto" tries, fastest first. On a CPU, Triton's interpreter runs only when asked for by name.
AUTOMATIC: dict[str, tuple[ModuleType, ...]] = {"cuda": (triton, torch, reference), "cpu": (native, torch, reference)}
