"""Boolean masks as bits: bit i % 8 of byte i // 8 is element i of the flattened mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import extension
from .arguments import expect_whole

torch.library.define("sparse_attn::pack_bits", "(Tensor mask) -> Tensor")
torch.library.define("sparse_attn::unpack_bits", "(Tensor packed, int count) -> Tensor")


@torch.library.register_fake("sparse_attn::pack_bits")
def _(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty([(mask.numel() + 7) // 8], dtype=torch.uint8)


@torch.library.register_fake("sparse_attn::unpack_bits")
def _(packed: torch.Tensor, count: int) -> torch.Tensor:
    return packed.new_empty([count], dtype=torch.bool)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Packs a mask into bits.

    Args:
        mask: bool, any shape and strides, on the CPU.

    Returns:
        uint8 [ceil(mask.numel() / 8)]; unused bits of the last byte are 0.

    Raises:
        TypeError: the mask is not a bool tensor.
        ValueError: the mask is not on the CPU.
    """
    _check("mask", mask, torch.bool)
    if _native():
        return torch.ops.sparse_attn.pack_bits(mask)
    flat = mask.detach().contiguous().view(-1)
    return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))


def unpack_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Reverses `pack_bits`.

    Args:
        packed: uint8 [ceil(count / 8)], on the CPU.
        count: the number of bits to read.

    Returns:
        bool [count].

    Raises:
        TypeError: `packed` is not a uint8 tensor, or `count` is not an integer.
        ValueError: `packed` is not on the CPU, is not one-dimensional or has another length.
    """
    expect_whole(0, count=count)
    _check_packed(packed, count)
    if _native():
        return torch.ops.sparse_attn.unpack_bits(packed, count)
    bits = np.unpackbits(packed.detach().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits).view(torch.bool)


class PackedMask:
    """A boolean mask on the CPU that takes one bit per position.

    Attributes:
        bits: uint8, as `pack_bits` makes them; what lies behind the mask's end has no meaning.
        shape: of the mask.

    Raises ValueError for bits of another length.
    """

    def __init__(self, bits: torch.Tensor, shape: Sequence[int]):
        self.bits, self.shape = bits, torch.Size(shape)
        _check_packed(bits, self.shape.numel())

    @classmethod
    def pack(cls, mask: torch.Tensor) -> PackedMask:
        """From a bool tensor on the CPU with any strides, which is not copied as a whole."""
        if mask.is_contiguous() or mask[0].numel() % 8:
            return cls(pack_bits(mask), mask.shape)
        return cls(torch.cat([pack_bits(part) for part in mask]), mask.shape)

    def unpack(self) -> torch.Tensor:
        """The mask as a new bool tensor."""
        return unpack_bits(self.bits, self.shape.numel()).view(self.shape)

    def __getitem__(self, index: int) -> PackedMask:
        """The mask at an index of the first dimension; it shares memory with this one if it begins with a byte."""
        count = self.shape[1:].numel()
        first, skipped = divmod(index * count, 8)
        end = ((index + 1) * count + 7) // 8
        if skipped:
            found = unpack_bits(self.bits[first:end], skipped + count)[skipped:]
            return PackedMask(pack_bits(found), self.shape[1:])
        return PackedMask(self.bits[first:end], self.shape[1:])


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a {dtype} tensor, not {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be a {dtype} tensor, not {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {tensor.device}; use {name}.cpu()")


def _check_packed(packed: torch.Tensor, count: int) -> None:
    _check("packed", packed, torch.uint8)
    if packed.shape != ((count + 7) // 8,):
        raise ValueError(f"{count} bits take uint8 [{(count + 7) // 8}], but packed is {list(packed.shape)}")


def _native() -> bool:
    if extension.available():
        return True
    extension.warn_of_absence()
    return False
