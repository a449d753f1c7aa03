"""Extractive question answering in the SQuAD v1.1 format: reading, windows, answers, and scores.

    questions = read_squad("dev-v1.1.json")
    windows = make_windows(questions, tokenizer)                    # at most 384 tokens each, 128 of overlap
    start_logits, end_logits = predict(model, windows, tokenizer.pad_token_id)
    predictions = best_answers(questions, windows, start_logits, end_logits)
    exact_match, f1 = exact_match_and_f1(predictions, questions)

The format, the task and both scores are those of Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine
Comprehension of Text" (2016); the sliding windows and the choice of a span are those of Devlin et al.,
"BERT: Pre-training of Deep Bidirectional Transformers" (2019).
"""

from sparse_attn.squad.answers import best_answers
from sparse_attn.squad.evaluation import predict
from sparse_attn.squad.metrics import exact_match_and_f1
from sparse_attn.squad.reading import Question, misplaced_answers, read_squad, split_articles
from sparse_attn.squad.windows import Window, WindowTensors, collate, length_sorted_batches, make_windows

__all__ = [
    "Question",
    "Window",
    "WindowTensors",
    "best_answers",
    "collate",
    "exact_match_and_f1",
    "length_sorted_batches",
    "make_windows",
    "misplaced_answers",
    "predict",
    "read_squad",
    "split_articles",
]
