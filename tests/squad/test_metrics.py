"""Exact match and F1 against cases worked out by hand."""

import sys

import pytest

from sparse_attn.squad import Question, exact_match_and_f1


def question(id, *answers):
    return Question(id, "title", "context", "what?", answers, (0,) * len(answers))


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("1820", ["1820"], 100, 100),
        ("The Old Mill", ["old mill"], 100, 100),  # articles and case
        ("a mill, an inn and the pub", ["mill inn and pub"], 100, 100),
        ("Theodore", ["odore"], 0, 0),  # an article is a whole word
        ("Low's mill!", ["lows mill"], 100, 100),  # punctuation goes without a space
        ("  old \t mill ", ["old mill"], 100, 100),
        ("the year 1820", ["1820"], 0, 200 / 3),  # precision 1/2, recall 1
        ("old stone mill", ["old mill at Orford"], 0, 400 / 7),  # 2 of 3 and 2 of 4 words
        ("mill mill", ["mill"], 0, 200 / 3),  # a word counts as often as it occurs in both
        ("in 1820", ["spring of 1820", "1820"], 0, 200 / 3),  # the best gold answer: 1/2 and 1
        ("1820", ["spring of 1820", "1820"], 100, 100),
        ("river", ["mill"], 0, 0),
        ("", ["mill"], 0, 0),
    ],
)
def test_one_question(prediction, answers, exact_match, f1):
    scores = exact_match_and_f1({"q": prediction}, [question("q", *answers)])
    assert scores == pytest.approx((exact_match, f1), abs=1e-4)


def test_the_mean_over_questions():
    questions = [question("one", "1820"), question("two", "Ada Low"), question("three", "mill")]
    predictions = {"three": "river", "two": "Ada", "one": "1820"}
    assert exact_match_and_f1(predictions, questions) == pytest.approx((100 / 3, (100 + 200 / 3) / 3), abs=1e-4)


def test_scores_do_not_carry_over_between_calls():
    assert exact_match_and_f1({"q": "river"}, [question("q", "mill")]) == (0, 0)
    assert exact_match_and_f1({"q": "mill"}, [question("q", "mill")]) == (100, 100)


def test_predictions_and_questions_must_match():
    questions = [question("one", "1820"), question("two", "mill")]
    with pytest.raises(ValueError, match="question 'two' has no prediction"):
        exact_match_and_f1({"one": "1820"}, questions)
    with pytest.raises(ValueError, match=r"prediction 'three' belongs to none of the questions \(1 such\)"):
        exact_match_and_f1({"one": "1820", "two": "mill", "three": ""}, questions)
    with pytest.raises(ValueError, match="2 questions have 1 different ids"):
        exact_match_and_f1({"one": "1820"}, [questions[0]] * 2)
    with pytest.raises(ValueError, match="question 'one' has no gold answer"):
        exact_match_and_f1({"one": "1820"}, [question("one")])
    with pytest.raises(ValueError, match="no questions"):
        exact_match_and_f1({}, [])


def test_a_missing_torchmetrics_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.text", None)
    with pytest.raises(ImportError, match=r'pip install --no-build-isolation "\.\[bench\]"'):
        exact_match_and_f1({"q": "mill"}, [question("q", "mill")])
