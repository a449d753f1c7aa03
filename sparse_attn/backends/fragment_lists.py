"""Column lists in the form that the CUDA kernels of `csrc` want: steps of 32 keys, a key a lane."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..layout import SparseLayout, for_training_too
from .tickets import new_tickets

GROUP_ROWS = 16
STEP_KEYS = 32  # keys that a warp takes at a time
TILE_KEYS = 8  # keys whose rows are read from shared memory together, 16 bytes of each
MAX_LENGTH = 512
MAX_GROUPS = MAX_LENGTH // GROUP_ROWS
MAX_ORDERED_HEADS = 64
NO_GROUP = 255
_BANK_CLASSES = 8  # rows of 16 bytes that shared memory delivers together
_PASSES = 3
_COPIES_AT_ONCE = 8


@dataclass(frozen=True)
class FragmentLists:
    """Lists of 16 queries each, cut into steps of 32 keys.

    A key's row lies in shared memory in pieces of 16 bytes: piece p at place p ^ s of the row, where s, its swizzle, is
    the place of the first piece.

    Attributes:
        words: int32 [steps, 32]. The upper 16 bits say where the first piece of the lane's key lies, in bytes. The
            lower 16 bits, 4 for each tile of 8 keys, say what is kept: bits 4 * t + (0, 1, 2, 3) whether rows
            (r, r, r + 8, r + 8), r = lane / 4, keep the keys of the lanes 8 * t + 2 * (lane % 4) + (0, 1, 0, 1). Lanes
            past the end of a list point at a key of their tile, and no row keeps it.
        first_steps: int32 [heads, groups], where lists start.
        counts: int32 [heads, groups, key_blocks + 1], keys of a list below 0, 32, 64, ...
        order: uint8 [heads, MAX_GROUPS], the groups of a head, the longest list first, then NO_GROUP.
        places: int16 [heads, padded keys], where the first piece of a key lies, in bytes, in the order in which a warp
            copies keys, 512 bytes at a time: [blocks, 512 / row_bytes, 8] for key 512 / row_bytes * i + j of a block at
            [j, i].
        tickets: int32 [tickets.COUNT], for the calls with these lists.
        heaviest: the first MAX_ORDERED_HEADS heads by the length of their lists, the longest first.
        full: all rows of a group keep all keys of its list.
        keys: how many the lists cover.
    """

    words: Tensor
    first_steps: Tensor
    counts: Tensor
    order: Tensor
    places: Tensor
    tickets: Tensor
    heaviest: tuple[int, ...]
    full: bool
    keys: int

    def tensors(self) -> list[Tensor]:
        return [self.words, self.first_steps, self.counts, self.order, self.places, self.tickets]


@for_training_too
def fragment_lists(layout: SparseLayout, row_bytes: int, transposed: bool = False) -> FragmentLists:
    """Compiles the first 512 queries and keys of a layout, for rows of 64 or 128 bytes.

    The order of keys within a step is free, and so is each key's swizzle: together they are chosen so that the rows
    that are read together lie in different banks. Of the transposed mask, queries and keys have each other's places.
    """
    if max(layout.query_len, layout.key_len) > MAX_LENGTH:
        layout = SparseLayout(layout.keep()[:, :MAX_LENGTH, :MAX_LENGTH])
    lists = layout.lists(GROUP_ROWS, transposed)
    key_len = layout.query_len if transposed else layout.key_len
    stops = lists.stops[:, 0].cpu().numpy()
    keys, bits, steps = _steps(stops, lists.columns.cpu().numpy(), lists.row_bits[:, 0].cpu().numpy())
    counts = (stops - stops[:, :1]).reshape(layout.heads, -1, stops.shape[1])
    head_of_step = np.repeat(np.arange(len(stops)) // counts.shape[1], steps)
    classes = _bank_classes(keys, head_of_step, layout.heads, key_len, row_bytes)
    keys, bits = _dealt(keys, bits, classes[head_of_step[:, None], keys])
    places = np.arange(key_len) * row_bytes + classes % (row_bytes // 16) * 16
    rows = places[head_of_step[:, None], keys]
    return FragmentLists(
        _on(layout.device, (rows << 16 | _fragment_bits(bits)).astype(np.uint32).view(np.int32)),
        _on(layout.device, (steps.cumsum() - steps).reshape(layout.heads, -1).astype(np.int32)),
        _on(layout.device, counts),
        _on(layout.device, _order(counts[:, :, -1])),
        _on(layout.device, _in_copying_order(places, 512 // row_bytes)),
        new_tickets(layout.device),
        tuple((-steps.reshape(layout.heads, -1)[:MAX_ORDERED_HEADS].sum(1)).argsort(kind="stable").tolist()),
        lists.full,
        key_len,
    )


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _steps(stops: np.ndarray, columns: np.ndarray, row_bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and bits of all steps, [steps, 32], and each list's number of steps. Places past the end of a list repeat
    its last key, without bits."""
    lengths = stops[:, -1] - stops[:, 0]
    steps = -(-lengths // STEP_KEYS)
    list_of_place = np.repeat(np.arange(len(stops)), steps * STEP_KEYS)
    place = np.arange(len(list_of_place)) - np.repeat((steps.cumsum() - steps) * STEP_KEYS, steps * STEP_KEYS)
    exists = place < lengths[list_of_place]
    entry = stops[list_of_place, 0] + np.minimum(place, lengths[list_of_place] - 1)
    keys = columns[entry].astype(np.int64)
    bits = np.where(exists, row_bits[entry] & 0xFFFF, 0).astype(np.int64)
    return keys.reshape(-1, STEP_KEYS), bits.reshape(-1, STEP_KEYS), steps


def _bank_classes(
    keys: np.ndarray, head_of_step: np.ndarray, heads: int, key_len: int, row_bytes: int
) -> np.ndarray:  # fmt: skip
    """Which eighth of the banks a key's first piece lies in, int64 [heads, keys]: such that each step has about as many
    keys in each.

    A row of 128 bytes leaves all to its swizzle; of two neighbouring rows of 64 bytes one has the lower half.
    Keys choose one after the other, several times, the class with which their steps have met least.
    """
    swizzles = row_bytes // 16
    first = np.arange(key_len) % (_BANK_CLASSES // swizzles) * swizzles
    classes = np.tile(first + np.arange(key_len) // (_BANK_CLASSES // swizzles) % swizzles, (heads, 1))
    used = np.zeros((heads, np.bincount(head_of_step, minlength=heads).max(initial=0), key_len), dtype=np.float32)
    step_of_head = np.arange(len(keys)) - np.searchsorted(head_of_step, head_of_step)
    used[head_of_step[:, None], step_of_head[:, None], keys] = 1
    onehot = np.eye(_BANK_CLASSES, dtype=np.float32)
    met = used @ onehot[classes]  # [heads, steps, classes]: keys of a step in each class
    for _ in range(_PASSES):
        for key in range(key_len):
            choice = slice(first[key], first[key] + swizzles)
            own = used[:, :, key]
            met -= own[:, :, None] * onehot[classes[:, key]][:, None]
            cost = np.einsum("hs,hsc->hc", own, met[:, :, choice])
            classes[:, key] = first[key] + cost.argmin(1)
            met += own[:, :, None] * onehot[classes[:, key]][:, None]
    return classes


def _dealt(keys: np.ndarray, bits: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deals the keys of each step, class by class, to its tiles in turn, so that the keys of a class meet in a tile
    only if there are more of them than tiles. Repeated keys come last and then become a key of their tile."""
    tiles = STEP_KEYS // TILE_KEYS
    repeated = np.zeros_like(keys, dtype=bool)
    repeated[:, 1:] = keys[:, 1:] == keys[:, :-1]
    dealt = np.where(repeated, _BANK_CLASSES, classes).argsort(axis=1, kind="stable")
    keys, bits = np.take_along_axis(keys, dealt, 1), np.take_along_axis(bits, dealt, 1)
    filled = STEP_KEYS - repeated.sum(1, keepdims=True)
    place = np.arange(STEP_KEYS)
    source = np.where(place < filled, place, np.where(place % tiles < filled, place % tiles, 0))
    lane = np.empty(STEP_KEYS, dtype=np.int64)
    lane[place % tiles * TILE_KEYS + place // tiles] = place
    return np.take_along_axis(keys, source, 1)[:, lane], bits[:, lane]


def _fragment_bits(bits: np.ndarray) -> np.ndarray:
    """From the 16 rows of each lane's key to the rows and keys that the lane's accumulators are for."""
    lane = np.arange(STEP_KEYS)
    words = np.zeros_like(bits)
    for tile in range(STEP_KEYS // TILE_KEYS):
        for element in range(4):
            key = TILE_KEYS * tile + 2 * (lane % 4) + element % 2
            row = lane // 4 + 8 * (element // 2)
            words |= (bits[:, key] >> row & 1) << (4 * tile + element)
    return words


def _in_copying_order(places: np.ndarray, rows_at_once: int) -> np.ndarray:
    heads, keys = places.shape
    padded = np.pad(places, ((0, 0), (0, -keys % (_COPIES_AT_ONCE * rows_at_once)))).astype(np.uint16).view(np.int16)
    return padded.reshape(heads, -1, _COPIES_AT_ONCE, rows_at_once).swapaxes(2, 3).reshape(heads, -1)


def _order(lengths: np.ndarray) -> np.ndarray:
    order = np.full((len(lengths), MAX_GROUPS), NO_GROUP, dtype=np.uint8)
    order[:, : lengths.shape[1]] = (-lengths).argsort(axis=1, kind="stable")
    return order
