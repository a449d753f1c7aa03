"""What can compute attention. A backend is a module with

NAME               what `backend=` calls it
unsupported        (call, training) -> reasons why it cannot compute this call; empty if it can
layout_arguments   (layout, head_dim, dtype, table, training) -> the tensors, and integers, that its kernels want of a
                   layout and a quantiser (or None); asked for once for each combination, before what is compiled or
                   captured: a call itself makes no tensor that outlives it
BACKWARD_USES_LSE  whether training needs the forward's log-sum-exp

and has registered its forward (and backward) with `sparse_attn.ops`.
"""

from types import ModuleType

from torch import device as Device
from torch import dtype as Dtype

from ..layout import SparseLayout
from . import native, reference, torch, triton

BACKENDS: dict[str, ModuleType] = {backend.NAME: backend for backend in (triton, native, torch, reference)}

# What backend="auto" tries, fastest first. On a CPU, Triton's interpreter runs only when asked for by name.
_ON_GPU, _ELSEWHERE = ("triton", "native", "torch", "reference"), ("native", "torch", "reference")


def usual(device: Device) -> tuple[str, ...]:
    """What backend="auto" tries on a device where nothing was measured."""
    return _ON_GPU if device.type == "cuda" else _ELSEWHERE


def automatic(layout: SparseLayout, head_dim: int, dtype: Dtype, rounded: bool, training: bool) -> tuple[str, ...]:
    """What backend="auto" tries for such calls, fastest first: on a GPU the native kernel is before the Triton kernel
    where its tuning table says that it was faster."""
    kind = (head_dim, dtype, rounded, training)
    if kind not in layout.automatic:
        names = usual(layout.device)
        if native.known_to_be_faster(layout, *kind):
            names = (native.NAME, *(name for name in names if name != native.NAME))
        layout.automatic[kind] = names
    return layout.automatic[kind]
