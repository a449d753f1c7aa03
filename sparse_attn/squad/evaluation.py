"""Start and end logits of a question-answering model over windows, on one process or shared by several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sparse_attn.distributed import agree, rank_and_world, share_of, sums_over_processes
from sparse_attn.integrations.models import evaluating
from sparse_attn.progress import with_progress
from sparse_attn.squad.windows import MODEL_INPUTS, Window, check_input_names, collate, length_sorted_batches


def predict(
    model: nn.Module,
    windows: Sequence[Window],
    pad_token_id: int,
    *,
    batches: Sequence[Sequence[int]] | None = None,
    batch_size: int = 16,
    pad_to: int | None = None,
    input_names: Sequence[str] = MODEL_INPUTS,
    progress: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """The logits that `best_answers` takes, in the order of `windows`.

    Under torch.distributed, process r runs batches r, r + world, r + 2 world, ...; one reduction at the end gives all
    processes all logits, so answers and scores are those of one process. Every process needs the same windows.

    Args:
        model: a question-answering model of transformers, dense or patched; run in evaluation mode without gradients
            on the device it is on, and left in the mode it was in.
        windows: from `make_windows`, at least one.
        pad_token_id: the tokenizer's padding token.
        batches: indices of windows, each window in exactly one batch; by default sorted by length.
        batch_size: windows in a batch where `batches` is None.
        pad_to: length that every batch is padded to; its longest window's if None.
        input_names: which of "input_ids", "attention_mask" and "token_type_ids" the model takes.
        progress: show a bar on stderr, on the first process.

    Returns:
        Start logits and end logits, float32 on the CPU: per window a tensor [tokens].

    Raises:
        ValueError: there is no window, `batches` does not hold each window once, an unknown name of an input, or what
            `collate` refuses.
        RuntimeError: another process failed.
    """
    if not windows:
        raise ValueError("no windows to predict; expected at least one, from make_windows")
    check_input_names(input_names)
    if batches is None:
        batches = length_sorted_batches(windows, batch_size)
    batches = [list(batch) for batch in batches]
    if sorted(index for batch in batches for index in batch) != list(range(len(windows))):
        raise ValueError(f"batches must hold each of the {len(windows)} windows once, by its index")
    lengths = [len(window.input_ids) for window in windows]
    logits = torch.zeros(
        2, sum(lengths), dtype=torch.float32, device="cpu"
    )  # start and end; zero where another process fills in
    starts, ends = (rows.split(lengths) for rows in logits)
    shown = with_progress(share_of(batches), "predicting", enabled=progress and rank_and_world()[0] == 0)
    failure = None
    try:
        with evaluating(model):
            _fill(model, windows, shown, pad_token_id, pad_to, input_names, starts, ends)
    except Exception as error:
        failure = error
    agree(0, failure)
    (logits,) = sums_over_processes([logits])
    return tuple(list(rows.split(lengths)) for rows in logits)


@torch.inference_mode()
def _fill(
    model: nn.Module,
    windows: Sequence[Window],
    batches: Iterator[Sequence[int]],
    pad_token_id: int,
    pad_to: int | None,
    input_names: Sequence[str],
    starts: Sequence[Tensor],
    ends: Sequence[Tensor],
) -> None:
    device = next(model.parameters()).device
    for indices in batches:
        batch = collate([windows[index] for index in indices], pad_token_id, pad_to)
        outputs = model(**{name: batch[name].to(device) for name in input_names})
        for filled, logits in ((starts, outputs.start_logits), (ends, outputs.end_logits)):
            for index, row in zip(indices, logits.float().cpu()):
                filled[index].copy_(row[: len(filled[index])])
