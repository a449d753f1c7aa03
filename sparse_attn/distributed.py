"""Work shared by the processes of torch.distributed (torchrun, accelerate launch); one process alone is the plain case.

Nothing here starts a process group: what `torch.distributed.init_process_group`, an `accelerate.Accelerator` or
transformers' Trainer has started is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share_of(items: Iterable[Item]) -> Iterator[Item]:
    """What this process takes of `items`: those at rank, rank + world, rank + 2 world, ..."""
    rank, world = rank_and_world()
    return islice(items, rank, None, world)


def sums_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each tensor over all processes, the same in every process and on the tensor's device.

    Shapes and dtypes must be the same in all processes. Without a process group the tensors come back as they are.
    """
    return [_reduced(tensor, "SUM") for tensor in tensors]


def agree(number: int, error: Exception | None = None) -> int:
    """The largest `number` of all processes, after a check that none of them failed.

    Every process calls it once its own part is done, with the error that ended it, if one did. So nobody waits for
    a process that is gone: the error is raised where it happened, and RuntimeError in the others.
    """
    largest, failures = _reduced(torch.tensor([number, error is not None]), "MAX").tolist()
    if error is not None:
        raise error
    if failures:
        raise RuntimeError("another process failed; its own message says why")
    return largest


def _reduced(tensor: Tensor, operation: str) -> Tensor:
    if rank_and_world()[1] == 1:
        return tensor
    # NCCL knows memory of GPUs only.
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else "cpu"
    shared = tensor.detach().to(device, copy=True).contiguous()
    dist.all_reduce(shared, getattr(dist.ReduceOp, operation))
    return shared.to(tensor.device)
