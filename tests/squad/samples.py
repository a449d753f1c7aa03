"""A tokenizer that needs no files, and questions on made-up contexts."""

import string

from hypothesis import strategies
from transformers import BertTokenizer

from sparse_attn.squad import Question


def letter_tokenizer() -> BertTokenizer:
    """A BERT tokenizer whose words are single letters: every letter, digit or full stop is a token."""
    characters = string.ascii_lowercase + string.digits
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        "?",
        *characters,
        *("##" + c for c in characters),
    ]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def ask(context: str, answer: str, start: int | None = None, question: str = "what?", id: str = "q") -> Question:
    start = context.index(answer) if start is None else start
    assert context[start : start + len(answer)] == answer
    return Question(id, "title", context, question, (answer,), (start,))


contexts = strategies.lists(
    strategies.text(string.ascii_letters + string.digits + ".", min_size=1, max_size=9),
    min_size=1,
    max_size=25,
).map(lambda words: "  ".join(words) + " end")
