"""best_answers finds the best allowed span over all windows of a question."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from sparse_attn.squad import best_answers, make_windows
from tests.squad.samples import ask, contexts, letter_tokenizer

TOKENIZER = letter_tokenizer()
CONTEXT = "ab cd ef gh"  # tokens 0..7, behind [CLS] w h ? [SEP]
QUESTION = ask(CONTEXT, "cd", question="wh?")
FIRST = 5


def answer(peaks_of_start, peaks_of_end, **options):
    """The answer when token t of the context has the start (end) logit peaks[t], and all others have 0."""
    windows = make_windows([QUESTION], TOKENIZER)
    start, end = np.zeros(len(windows[0].input_ids)), np.zeros(len(windows[0].input_ids))
    for values, peaks in ((start, peaks_of_start), (end, peaks_of_end)):
        for token, value in peaks.items():
            values[FIRST + token] = value
    return best_answers([QUESTION], windows, [start], [end], **options)["q"]


@settings(deadline=None)
@given(contexts, strategies.data())
def test_a_peak_is_found_through_any_window(context, data):
    question = ask(context, data.draw(strategies.sampled_from(context.split())))
    windows = make_windows([question], TOKENIZER, max_length=30, stride=9)
    holder = data.draw(strategies.sampled_from([i for i, window in enumerate(windows) if window.end_position]))
    noise = np.random.default_rng(0)
    start, end = ([noise.uniform(-1, 1, len(window.input_ids)) for window in windows] for _ in range(2))
    start[holder][windows[holder].start_position] = 20
    end[holder][windows[holder].end_position] = 20
    assert best_answers([question], windows, start, end) == {"q": question.answers[0]}
    order = data.draw(strategies.permutations(range(len(windows))))
    shuffled = [[rows[i] for i in order] for rows in (windows, start, end)]
    assert best_answers([question], *shuffled) == {"q": question.answers[0]}


@settings(deadline=None)
@given(strategies.integers(0, 2**32 - 1), strategies.integers(1, 8), strategies.integers(1, 9))
def test_agrees_with_an_exhaustive_search(seed, best, max_answer_length):
    (window,) = windows = make_windows([QUESTION], TOKENIZER)
    start, end = np.random.default_rng(seed).standard_normal((2, len(window.input_ids)))
    tokens = range(FIRST, FIRST + 8)
    starts = sorted(tokens, key=lambda token: -start[token])[:best]
    ends = sorted(tokens, key=lambda token: -end[token])[:best]
    spans = [(start[s] + end[e], s, e) for s in starts for e in ends if 0 <= e - s < max_answer_length]
    expected = ""
    if spans:
        _, first, last = max(spans)
        expected = CONTEXT[window.offsets[first][0] : window.offsets[last][1]]
    found = best_answers([QUESTION], windows, [start], [end], max_answer_length=max_answer_length, best=best)
    assert found == {"q": expected}


def test_text_is_cut_from_the_original_context():
    question = ask("Ab  Cd, EF", "b  Cd")
    windows = make_windows([question], TOKENIZER)
    rows = [np.eye(len(windows[0].input_ids))[position] for position in (windows[0].start_position,)]
    ends = [np.eye(len(windows[0].input_ids))[windows[0].end_position]]
    assert best_answers([question], windows, rows, ends) == {"q": "b  Cd"}


def test_an_end_before_its_start_does_not_count():
    # 9 + 9 for "start gh, end ab" is not a span; 9 + 5 for "gh" is the best one.
    assert answer({6: 9}, {0: 9, 7: 5}) == "gh"


def test_length_limit_counts_tokens():
    assert answer({0: 9}, {7: 9, 3: 5}, max_answer_length=8) == "ab cd ef gh"
    assert answer({0: 9}, {7: 9, 3: 5}, max_answer_length=7) == "ab cd"


def test_tokens_outside_the_context_are_never_answers():
    for token in (-FIRST, -4, 8):  # [CLS], the question's first token, the last [SEP]
        assert answer({token: 50, 2: 3}, {token: 50, 3: 3}) == "cd"


def test_no_span_among_the_best_gives_an_empty_answer():
    assert answer({7: 9}, {0: 9}, best=1) == ""
    assert answer({7: 9}, {0: 9, 7: 1}, best=2) == "h"


def test_the_best_window_wins_and_questions_stay_apart():
    questions = [ask("ab cd ef gh ij", "gh", question="wh?", id="one"), ask("zz yy", "yy", id="two")]
    windows = make_windows(questions, TOKENIZER, max_length=12, stride=2)
    assert [window.question_index for window in windows] == [0, 0, 1]
    start, end = ([np.zeros(len(window.input_ids)) for window in windows] for _ in range(2))
    start[0][5] = end[0][6] = 3  # "ab" in the first window
    start[1][9] = end[1][10] = 4  # "ij" in the second
    start[2][windows[2].start_position] = end[2][windows[2].end_position] = 1
    assert best_answers(questions, windows, start, end) == {"one": "ij", "two": "yy"}
    start[0][5] = 6
    assert best_answers(questions, windows, start, end) == {"one": "ab", "two": "yy"}
    start[0][5] = 5  # a tie: 5 + 3 and 4 + 4
    assert best_answers(questions, windows, start, end) == {"one": "ab", "two": "yy"}


def test_tensors_and_padded_rows_are_taken():
    windows = make_windows([QUESTION], TOKENIZER)
    tokens = len(windows[0].input_ids)
    start, end = torch.zeros(2, tokens + 4, dtype=torch.bfloat16, requires_grad=True).unbind()
    start, end = start.detach().clone(), end.detach().clone()
    start[tokens + 1] = end[tokens + 2] = 90
    start[FIRST + 2] = end[FIRST + 3] = 5
    assert best_answers([QUESTION], windows, [start], [end]) == {"q": "cd"}


def test_logits_outside_the_context_may_be_infinite():
    windows = make_windows([QUESTION], TOKENIZER)
    start, end = (np.full(len(windows[0].input_ids), -np.inf) for _ in range(2))
    start[FIRST : FIRST + 8] = end[FIRST : FIRST + 8] = 0
    start[FIRST + 2] = end[FIRST + 3] = 1
    assert best_answers([QUESTION], windows, [start], [end]) == {"q": "cd"}


def test_20_starts_and_ends_and_30_tokens_are_the_defaults():
    question = ask(" ".join("a" * 40), "a")
    (window,) = windows = make_windows([question], TOKENIZER)
    first = next(token for token, span in enumerate(window.offsets) if span)

    def words(starts, ends):
        start, end = np.zeros((2, len(window.input_ids)))
        for logits, values in ((start, starts), (end, ends)):
            for token, value in values.items():
                logits[first + token] = value
        return len(best_answers([question], windows, [start], [end])["q"].split())

    assert words({0: 9}, {29: 5, 30: 6}) == 30
    before = {token: 30 - token for token in range(19)}  # 19 likelier ends, all before the likeliest start
    assert words({20: 100}, before | {25: 1}) == 6


def test_wrong_logits_are_named():
    windows = make_windows([QUESTION], TOKENIZER)
    good = np.zeros(len(windows[0].input_ids))
    with pytest.raises(ValueError, match="1 windows, 2 rows of start logits and 1 rows of end logits"):
        best_answers([QUESTION], windows, [good, good], [good])
    with pytest.raises(ValueError, match=r"end logits of window 0 have shape \[3\]; expected \[tokens\] with .* 14"):
        best_answers([QUESTION], windows, [good], [good[:3]])
    bad = good.copy()
    bad[FIRST + 1] = np.nan
    with pytest.raises(ValueError, match="start logits of window 0 have NaN"):
        best_answers([QUESTION], windows, [bad], [good])
    with pytest.raises(ValueError, match="max_answer_length is 0"):
        best_answers([QUESTION], windows, [good], [good], max_answer_length=0)


def test_a_question_without_window_is_named():
    windows = make_windows([QUESTION], TOKENIZER)
    good = [np.zeros(len(windows[0].input_ids))]
    with pytest.raises(ValueError, match="question 'other' has no window"):
        best_answers([QUESTION, ask("x y", "y", id="other")], windows, good, good)
    with pytest.raises(ValueError, match="window 0 belongs to question 0, but there are 0"):
        best_answers([], windows, good, good)
