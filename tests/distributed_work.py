"""What test_distributed.py runs in several processes: `torchrun ... tests/distributed_work.py OUT`.

Each process writes what it got to OUT/<rank>.safetensors. Imported, it has the same inputs for one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import BertConfig, BertForQuestionAnswering

from sparse_attn import AttentionAverages, GlobalMask, collect_averages, collect_probabilities
from sparse_attn.finetuning import finetune_question_answering
from sparse_attn.squad import Question, Window, make_windows
from sparse_attn.squad.evaluation import predict
from tests.squad.samples import ask, letter_tokenizer

TOKENIZER = letter_tokenizer()
TRAINING = {"epochs": 4, "learning_rate": 5e-3, "batch_size": 4, "progress": False}


def model() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForQuestionAnswering(config).eval()


def mask() -> GlobalMask:
    return GlobalMask.random(2, 2, 32, sparsity=0.5)


def questions() -> list[Question]:
    """Contexts of 4 to 33 words of one letter; the answer is the word after an "x"."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(23):
        letters = [chr(97 + number) for number in torch.randint(23, (4 + index % 30,), generator=generator)]
        at = int(torch.randint(len(letters) - 1, (1,), generator=generator))
        letters[at] = "x"
        found.append(ask(" ".join(letters), letters[at + 1], start=2 * at + 2, question="x?", id=f"q{index}"))
    return found


def windows() -> list[Window]:
    return make_windows(questions(), TOKENIZER, max_length=24, stride=4)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of different sizes; the longest sequence of all is in the second."""
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        lengths = torch.randint(3, 20, (2 + index,), generator=generator)
        if index == 1:
            lengths[0] = 31
        total = int(lengths.max())
        ids = torch.randint(5, 30, (len(lengths), total), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(total) < lengths[:, None]).long()})
    return made


def _failing_on_rank_one():
    yield batches(1)[0]
    if dist.get_rank() == 1:
        raise OSError("the disk is gone")


def _message(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _averages(name: str, averages: AttentionAverages) -> dict[str, torch.Tensor]:
    seen = torch.tensor([averages.sequences, averages.tokens])
    return {f"{name}.sums": averages.sums, f"{name}.counts": averages.counts, f"{name}.seen": seen}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, quiet = dist.get_rank(), {"progress": False}
    tensors = _averages("shared", collect_averages(model(), iter(batches(5)), **quiet))
    tensors |= _averages("single", collect_averages(model(), batches(1), **quiet))  # nothing for process 1
    own = batches(5)[:3] if rank == 0 else batches(5)[3:]
    tensors |= _averages("own", collect_averages(model(), own, shard=False, max_length=40, **quiet))
    histogram = collect_probabilities(model(), iter(batches(5)), mask(), **quiet)
    tensors |= {"histogram.counts": histogram.counts, "histogram.sums": histogram.sums}
    starts, ends = predict(model(), windows(), TOKENIZER.pad_token_id, batch_size=3, **quiet)
    tensors |= {"starts": torch.cat(starts), "ends": torch.cat(ends)}
    failures = {
        "disk": _message(lambda: collect_averages(model(), _failing_on_rank_one(), shard=False, **quiet)),
        "batch": _message(lambda: collect_probabilities(model(), _failing_on_rank_one(), mask(), shard=False, **quiet)),
        "empty": _message(lambda: collect_averages(model(), [], **quiet)),
        "long": _message(lambda: predict(model(), windows(), TOKENIZER.pad_token_id, pad_to=20, **quiet)),
    }
    trained = model()
    losses = finetune_question_answering(trained, windows(), TOKENIZER.pad_token_id, **TRAINING)
    tensors["losses"] = torch.tensor(losses)
    tensors["weights"] = torch.cat([parameter.detach().flatten() for parameter in trained.parameters()])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"{rank}.safetensors", failures)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
