"""Floating-point operations of a pass."""

import torch
from transformers import AlbertConfig, AlbertForQuestionAnswering, BertConfig, BertForQuestionAnswering

from benchmarks.squad.arithmetic import attention_flops, linear_flops_per_token
from sparse_attn import GlobalMask

SIZES = dict(vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
PROJECTIONS, FEED_FORWARD, HEAD = 4 * 16 * 16, 2 * 16 * 48, 16 * 2


def test_every_linear_layer_counts_as_often_as_it_is_used():
    bert = BertForQuestionAnswering(BertConfig(**SIZES)).eval()
    assert linear_flops_per_token(bert) == 2 * (3 * (PROJECTIONS + FEED_FORWARD) + HEAD)
    shared = AlbertForQuestionAnswering(AlbertConfig(**SIZES, embedding_size=8)).eval()
    assert linear_flops_per_token(shared) == 2 * (8 * 16 + 3 * (PROJECTIONS + FEED_FORWARD) + HEAD)


def test_attention_counts_the_positions_that_are_kept_within_each_length():
    config, lengths = BertConfig(**SIZES), torch.tensor([5, 9, 1])
    assert attention_flops(config, lengths, None) == 4 * 8 * 3 * 2 * (25 + 81 + 1)
    torch.manual_seed(0)
    mask = GlobalMask.random(3, 2, 9, sparsity=0.7)
    kept = sum(int(mask.keep[:, :, :length, :length].sum()) for length in lengths.tolist())
    assert attention_flops(config, lengths, mask) == 4 * 8 * kept
