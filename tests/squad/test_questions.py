"""The project's own question set is what its generator writes, and holds what it promises."""

import json
import random
import re

import pytest

from benchmarks.questions import generate, passages, topics, values
from sparse_attn.squad import best_answers, exact_match_and_f1, make_windows, read_squad, split_articles
from tests.squad.samples import letter_tokenizer


@pytest.fixture(scope="module")
def questions():
    return read_squad(generate.QUESTIONS_FILE)


def test_the_file_is_what_the_generator_writes(tmp_path, capsys):
    generate.main(["--output", str(tmp_path / "questions.json")])
    assert (tmp_path / "questions.json").read_bytes() == generate.QUESTIONS_FILE.read_bytes()
    assert re.search(r"questions.json: \d{3} questions, 144 paragraphs, 48 articles", capsys.readouterr().out)


def test_counts_and_size(questions):
    assert generate.QUESTIONS_FILE.stat().st_size < 300_000
    assert len(questions) >= 600
    assert len({question.title for question in questions}) >= 40
    assert len({question.context for question in questions}) >= 140
    assert len({(question.context, question.question) for question in questions}) == len(questions)
    train, held_out = split_articles(questions)
    assert len(train) > 400 and len(held_out) > 200
    assert not {question.context for question in train} & {question.context for question in held_out}


def test_answers_are_whole_words_of_one_sentence(questions):
    for question in questions:
        for answer, start in zip(question.answers, question.answer_starts):
            end = start + len(answer)
            assert question.context[start:end] == answer
            assert not question.context[start - 1 : start].isalnum() and not question.context[end : end + 1].isalnum()
            assert ". " not in answer


def test_passages_vary_in_length_and_some_need_two_windows(questions):
    words = sorted(len(context.split()) for context in {question.context for question in questions})
    assert words[0] < 60 and words[-1] > 250
    windows = make_windows(questions, letter_tokenizer(), max_length=384, stride=128)
    assert len(windows) > len(questions)


def test_facts_have_doubles_so_that_the_type_of_an_answer_does_not_give_it_away(questions):
    """Of the questions whose answer is a year, few are on passages with one year only."""
    year = re.compile(r"\b1[3-9]\d\d\b")
    asked = [question for question in questions if year.fullmatch(question.answers[0])]
    alone = [question for question in asked if len(set(year.findall(question.context))) == 1]
    assert len(asked) > 60
    assert len(alone) < 0.2 * len(asked)


def test_questions_are_not_worded_as_the_passage_is(questions):
    """Of the words of four letters or more in a question, less than half are in the sentence that answers it."""
    shares = []
    for question in questions:
        asked = set(re.findall(r"[a-z]{4,}", question.question))
        start = question.context.rfind(". ", 0, question.answer_starts[0]) + 1
        stated = set(re.findall(r"[a-z]{4,}", question.context[start:].split(". ")[0]))
        shares.append(len(asked & stated) / max(len(asked), 1))
    assert sum(shares) / len(shares) < 0.5


def test_gold_positions_score_full_marks(questions):
    windows = make_windows(questions, letter_tokenizer(), max_length=384, stride=200)
    start, end = ([[0.0] * len(window.input_ids) for window in windows] for _ in range(2))
    for index, window in enumerate(windows):
        if window.end_position:
            start[index][window.start_position] = end[index][window.end_position] = 1.0
    predictions = best_answers(questions, windows, start, end, max_answer_length=60)
    assert exact_match_and_f1(predictions, questions) == (100, 100)


def test_a_seed_decides_everything():
    assert generate.generate(1) == generate.generate(1)
    assert generate.generate(1) != generate.generate(2)


def test_the_values_of_a_passage_differ():
    topic = next(topic for topic in topics.read_topics() if topic.name == "rivers")
    rng, used = random.Random(0), set()
    names = values.Names(rng)
    drawn = [values.draw_values(topic.values, names, rng, used) for _ in range(3)]
    numbers = [value for one in drawn for value in one.values() if value[0].isdigit()]
    assert len(numbers) == len(set(numbers)) == 15
    for one in drawn:
        assert int(one["flood"]) < int(one["dam"])
        assert int(one["navigable"]) < int(one["length"])
        assert one["goods"] != one["later_goods"]


def test_an_exhausted_range_is_named():
    line = values.ValueLine(("mills", "ferries"), "count", "3 4")
    rng = random.Random(0)
    values.draw_values((line,), values.Names(rng), rng, used := set())
    with pytest.raises(ValueError, match="no unused values left for mills, ferries"):
        values.draw_values((line,), values.Names(rng), rng, used)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("titles: A\nsubject: a | b\nlet x = planet\n\n- {x}", "unknown kind 'planet'"),
        ("titles: A\nsubject: a | b\nlet x = town\n\n- a", r"slots \['x'\] are declared and not used"),
        ("titles: A\nsubject: a | b\n\n- {y}", r"slots \['y'\]"),
        ("titles: A\nsubject: a | b\n\n- a\n? {y}: who?", "expected '::' in it"),
        ("titles: A\nsubject: a | b\n\na", "expected '- ' before a sentence"),
        ("titles: A\nsubject: a | b\n\n? a :: b?", "a block without a sentence"),
    ],
)
def test_a_wrong_topic_is_named(tmp_path, monkeypatch, text, message):
    (tmp_path / "wrong.txt").write_text(text)
    monkeypatch.setattr(topics, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"wrong\.txt: .*" + message):
        topics.read_topics()


def test_an_answer_that_a_wording_lacks_is_refused():
    block = topics.Block(("{subject} is old.",), (topics.Ask(("{age}",), ("how old?",)),))
    age = values.ValueLine(("age",), "number", "10 99")
    topic = topics.Topic("x", ("X",), "the mill", "it", (age,), (block,))
    rng = random.Random(0)
    with pytest.raises(ValueError, match=r"answer '\d\d' is 0 times in 'The mill is old.'"):
        passages.write_paragraph(topic, 0, "here", passages.Plan(1, 1, 1), values.Names(rng), rng)


def test_content_is_plain_json():
    content = generate.generate()
    assert json.loads(generate.to_json(content)) == content
