"""A tiny BERT and a dozen questions: what the benchmark does, in seconds."""

import json

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertModel, BertTokenizer

from benchmarks.squad import rows
from benchmarks.squad.worker import measure

_WORDS = "? . the city of was built in year by who what is named 1901 1902 1903 1904"
_NAMES = "paris rome oslo lima ada bob cleo dora"
_CITIES = (("paris", "ada"), ("rome", "bob"), ("oslo", "cleo"), ("lima", "dora"))


@pytest.fixture(scope="session")
def tokenizer():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS.split(), *_NAMES.split()]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


@pytest.fixture(scope="session")
def config(tokenizer):
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer, config):
    """A saved model with a random, but complete, question-answering head."""
    folder = tmp_path_factory.mktemp("answering") / "tiny-answering"
    torch.manual_seed(0)
    BertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def headless_folder(tmp_path_factory, tokenizer, config):
    """A saved model without a question-answering head."""
    folder = tmp_path_factory.mktemp("headless") / "tiny-headless"
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """Three questions on each of four one-paragraph articles."""
    articles = []
    for index, (city, builder) in enumerate(_CITIES):
        context = f"the city of {city} was built in the year 190{index + 1} by {builder} ."
        asked = (
            ("who built the city ?", builder),
            ("what year was the city built in ?", f"190{index + 1}"),
            ("what is the city named ?", city),
        )
        questions = [
            {
                "id": f"{city}-{number}",
                "question": question,
                "answers": [{"text": answer, "answer_start": context.index(answer)}],
            }
            for number, (question, answer) in enumerate(asked)
        ]
        articles.append({"title": city, "paragraphs": [{"context": context, "qas": questions}]})
    path = tmp_path_factory.mktemp("data") / "cities.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return path


@pytest.fixture(scope="session")
def command_line(model_folder, data_file):
    """Arguments that work, but for where to write."""
    return [
        *("--model", str(model_folder), "--data", str(data_file)),
        *("--max-length", "48", "--stride", "8", "--repeats", "2", "--batch-size", "5"),
    ]


@pytest.fixture
def arguments(command_line, tmp_path):
    """A command line that works; tests append to it."""
    return [*command_line, "--output", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]


@pytest.fixture
def in_process(monkeypatch):
    """Rows of the SQuAD table are measured in this process, which is fast; the labels of those that were."""
    labels = []

    def run_worker(job, folder):
        labels.append(job.label)
        return measure(job)

    monkeypatch.setattr(rows, "run_worker", run_worker)
    monkeypatch.setattr(rows, "measure_matrix_rate", lambda *_: 1e13)
    return labels
