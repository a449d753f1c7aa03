"""Data sets by name, and their copy on disk."""

import sys
from types import SimpleNamespace

import pytest

from benchmarks.squad.data import read_questions, squad_format

RECORDS = [
    {
        "id": str(number),
        "title": "Rome",
        "context": context,
        "question": "who?",
        "answers": {"text": [answer, answer], "answer_start": [0, 0]},
    }
    for number, (context, answer) in enumerate([("ada came", "ada"), ("bob came", "bob"), ("ada came", "ada")])
]


def test_records_become_articles_and_paragraphs():
    (article,) = squad_format(RECORDS)["data"]
    assert article["title"] == "Rome"
    assert [[entry["id"] for entry in paragraph["qas"]] for paragraph in article["paragraphs"]] == [
        ["0", "2"],
        ["1"],
    ]


def test_a_data_set_of_the_hub_is_read_once(monkeypatch, tmp_path):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return RECORDS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    first = read_questions("someone/squad", "validation", tmp_path)
    assert [question.answers for question in first] == [("ada", "ada"), ("ada", "ada"), ("bob", "bob")]
    assert read_questions("someone/squad", "validation", tmp_path) == first
    assert calls == [("someone/squad", "validation")]


def test_a_name_that_is_nowhere_says_both(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="someone/squad: no such file.*pip install datasets"):
        read_questions("someone/squad", "validation", tmp_path)
