"""Random calls that the CUDA kernels of both passes take, drawn by Hypothesis."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparse_attn import SparseLayout
from tests.helpers import random_inputs, random_layout

HALVES = [torch.float16, torch.bfloat16]
MANY_ROUNDS = [(40, 4, 20), (100, 3, 12), (350, 2, 4)]  # length, heads, rounds


def many_rounds(device: str, length: int, heads: int, rounds: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and lengths, of so many sequences that each block has about so many heads of one, whatever
    the number of multiprocessors: slots of shared memory are used again and again."""
    blocks = 2 if device == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    sequences = -(-rounds * blocks // heads)
    tensors = random_inputs((sequences, heads, length, 64), torch.float16, device)
    return tensors, torch.randint(0, length + 1, (sequences,)).to(device)


def draw_call(draw, device: str) -> tuple[SparseLayout, list[Tensor], dict[str, Tensor]]:
    """A layout, query, key and value, and arguments: lengths, and a padding mask with holes, or none."""
    batch, heads, mask_len = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 160))
    query_len, key_len = draw(st.integers(1, mask_len)), draw(st.integers(1, mask_len))
    layout = random_layout(
        heads, mask_len, draw(st.sampled_from([0.0, 0.5, 0.9, 0.999])), device,
        draw(st.sampled_from(["element", "tile"])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    head_dim, dtype = draw(st.sampled_from([32, 64])), draw(st.sampled_from(HALVES))
    query = random_inputs((batch, heads, query_len, head_dim), dtype, device)[0]
    key, value = random_inputs((batch, heads, key_len, head_dim), dtype, device)[:2]
    arguments = {}
    for name, length in (("query_lengths", query_len), ("key_lengths", key_len)):
        if draw(st.booleans()):
            arguments[name] = torch.tensor([draw(st.integers(0, length)) for _ in range(batch)], device=device)
    if draw(st.booleans()):
        arguments["key_padding_mask"] = torch.rand(batch, key_len, device=device) < 0.7
    return layout, [query, key, value], arguments
