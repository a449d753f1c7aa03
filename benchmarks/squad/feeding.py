"""How batches of windows reach a model: padded to one length, or without padding."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_attn.squad.windows import Window, WindowTensors

from ..verdicts import Absent
from .peers import FLEX_BLOCK

Feed = Callable[[list[int]], dict]


@dataclass
class Inputs:
    """What all variants are fed with.

    Attributes:
        windows: their tensors.
        batches: indices of windows, in the order in which they are run.
        pad_token_id: of the tokenizer.
        names: which of a batch's tensors the model takes.
    """

    windows: WindowTensors
    batches: list[list[int]]
    pad_token_id: int
    names: list[str]

    @classmethod
    def read(cls, path: str | Path) -> Inputs:
        """Reads a file of `write_inputs`."""
        content = json.loads(Path(path).read_text())
        windows = [Window(0, input_ids, token_types, [], 0, 0) for input_ids, token_types in content.pop("windows")]
        return cls(WindowTensors(windows), **content)

    def restored(self, logits: list[Tensor]) -> Tensor:
        """float32 [..., tokens of all windows] in the windows' order, from each batch's [..., rows, length] (padded on
        the right) or [..., 1, tokens] (without padding)."""
        lengths = self.windows.lengths
        found: list[Tensor | None] = [None] * len(lengths)
        for indices, batch in zip(self.batches, logits, strict=True):
            own = lengths[indices].tolist()
            packed = batch.shape[-2:] == (1, sum(own))
            rows = batch.squeeze(-2).split(own, -1) if packed else batch.unbind(-2)
            for index, length, row in zip(indices, own, rows, strict=True):
                found[index] = row[..., :length]
        return torch.cat(found, -1)


def windows_of(batches: list[list[int]]) -> list[int]:
    """Indices of the windows in `batches`, in order."""
    return sorted(index for batch in batches for index in batch)


def write_inputs(
    path: Path, windows: list[Window], batches: list[list[int]], pad_token_id: int, input_names: list[str]
) -> None:
    """Writes what all variants are fed with: the windows of `batches`, which are indices of `windows`."""
    own = windows_of(batches)
    place = {index: number for number, index in enumerate(own)}
    content = {
        "windows": [[windows[index].input_ids, windows[index].token_type_ids] for index in own],
        "batches": [[place[index] for index in batch] for batch in batches],
        "pad_token_id": pad_token_id,
        "names": input_names,
    }
    path.write_text(json.dumps(content))


def padded_feed(inputs: Inputs, device: torch.device, pad_to: int | None) -> Feed:
    """Batches padded on the right to `pad_to`, or to their longest window."""

    def feed(indices: list[int]) -> dict:
        batch = inputs.windows.padded(indices, inputs.pad_token_id, pad_to)
        return {name: moved(batch[name], device) for name in inputs.names}

    return feed


def blocks_feed(inputs: Inputs, device: torch.device, longest: int) -> Feed:
    """Batches padded to FlexAttention's blocks, so that few lengths occur, but to no more than `longest`; with
    key_lengths instead of a padding mask."""
    names = [name for name in inputs.names if name != "attention_mask"]

    def feed(indices: list[int]) -> dict:
        lengths = inputs.windows.lengths[indices]
        blocks = -(-int(lengths.max()) // FLEX_BLOCK)
        batch = inputs.windows.padded(indices, inputs.pad_token_id, min(blocks * FLEX_BLOCK, longest))
        return {**{name: moved(batch[name], device) for name in names}, "key_lengths": moved(lengths, device)}

    return feed


def first_position(model: PreTrainedModel) -> int:
    """The position of a sequence's first token: RoBERTa and its kin count from behind the padding's."""
    embeddings = getattr(model.base_model, "embeddings", None)
    return embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0


def packed_feed(inputs: Inputs, device: torch.device, model: PreTrainedModel) -> Feed:
    """Batches in one row without padding, with the arguments that transformers' flash attention takes."""
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise Absent(f"{type(model).__name__} takes no position_ids, which packed sequences need")
    first = first_position(model)
    names = ["position_ids", *(name for name in inputs.names if name != "attention_mask")]

    def feed(indices: list[int]) -> dict:
        batch = inputs.windows.packed(indices)
        batch["position_ids"] += first
        lengths = inputs.windows.lengths[indices].tolist()
        bounds, longest = moved(batch["cu_seqlens"], device), max(lengths)
        return {
            **{name: moved(batch[name], device) for name in names},
            "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
            "sequence_lengths": lengths,
        }  # fmt: skip

    return feed


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
