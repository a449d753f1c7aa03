"""Windows cover every context, know where the answer is, and come in batches longest first."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies

from sparse_attn.squad import Window, WindowTensors, collate, length_sorted_batches, make_windows
from tests.squad.samples import ask, contexts, letter_tokenizer

TOKENIZER = letter_tokenizer()


def text_of(window, context):
    return context[window.offsets[window.start_position][0] : window.offsets[window.end_position][1]]


def window_of(tokens):
    return Window(0, list(range(5, 5 + tokens)), [0] + [1] * (tokens - 1), [None] + [(0, 1)] * (tokens - 1), 1, 2)


def test_windows_by_hand():
    # [CLS] w h ? [SEP] are 5 tokens, the last [SEP] 1: 6 of 10 context tokens fit, windows advance by 4.
    windows = make_windows([ask("ab cd ef gh ij", "gh", question="wh?")], TOKENIZER, max_length=12, stride=2)
    context = [(0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8), (9, 10), (10, 11), (12, 13), (13, 14)]
    assert [window.offsets for window in windows] == [
        [None] * 5 + context[:6] + [None],
        [None] * 5 + context[4:] + [None],
    ]
    assert [(window.start_position, window.end_position) for window in windows] == [(0, 0), (7, 8)]
    assert [window.token_type_ids for window in windows] == [[0] * 5 + [1] * 7] * 2
    assert TOKENIZER.convert_ids_to_tokens(windows[1].input_ids) == (
        ["[CLS]", "w", "##h", "?", "[SEP]", "e", "##f", "g", "##h", "i", "##j", "[SEP]"]
    )


def test_384_tokens_of_which_128_are_shared_are_the_default():
    first, second, *_ = make_windows([ask(" ".join("a" * 600), "a")], TOKENIZER)
    assert len(first.input_ids) == 384
    ours, theirs = ([span for span in window.offsets if span] for window in (first, second))
    assert ours[-128:] == theirs[:128]


@settings(deadline=None)
@given(contexts, strategies.data(), strategies.integers(10, 60))
def test_every_character_is_inside_a_window(context, data, max_length):
    start = data.draw(strategies.sampled_from([i for i, character in enumerate(context) if character != " "]))
    windows = make_windows([ask(context, context[start], start)], TOKENIZER, max_length, stride=1)
    holders = [window for window in windows if window.end_position]
    assert holders
    for window in holders:
        assert window.offsets[window.start_position] == window.offsets[window.end_position] == (start, start + 1)
    assert all(len(window.input_ids) <= max_length for window in windows)


@settings(deadline=None)
@given(contexts, strategies.data())
def test_an_answer_no_longer_than_the_stride_is_inside_a_window(context, data):
    words = context.split()
    answer = data.draw(strategies.sampled_from(words))
    windows = make_windows([ask(context, answer)], TOKENIZER, max_length=30, stride=9)
    holders = [window for window in windows if window.end_position]
    assert holders
    assert {text_of(window, context) for window in holders} == {answer}


def test_an_answer_cut_by_a_window_is_not_in_it():
    context = "ab cd ef gh ij"
    windows = make_windows([ask(context, "cd ef gh", question="wh?")], TOKENIZER, max_length=12, stride=2)
    assert [(window.start_position, window.end_position) for window in windows] == [(0, 0), (0, 0)]


def test_spaces_at_the_ends_of_an_answer_do_not_hide_it():
    (window,) = make_windows([ask("ab cd  ", " cd  ")], TOKENIZER)
    assert text_of(window, "ab cd  ") == "cd"


def test_an_answer_that_has_no_token_is_nowhere():
    (window,) = make_windows([ask("ab  cd", "  ")], TOKENIZER)
    assert (window.start_position, window.end_position) == (0, 0)


def test_questions_keep_their_order_over_several_calls():
    questions = [ask(f"number {index} end", str(index), start=7, id=str(index)) for index in range(600)]
    windows = make_windows(questions, TOKENIZER)
    assert [window.question_index for window in windows] == list(range(600))
    assert [text_of(window, questions[window.question_index].context) for window in windows] == (
        [question.answers[0] for question in questions]
    )


def test_a_question_that_leaves_no_room_is_named():
    fine = ask("ab cd", "cd", id="fine")
    long = ask("ab cd " * 20, "cd", question="w" * 90, id="long")
    with pytest.raises(ValueError, match=r"question 'long' \('www.* has 90 tokens.*leaves 0 of max_length 50.*of 80"):
        make_windows([fine, long], TOKENIZER, max_length=50, stride=10)
    with pytest.raises(ValueError, match=r"question 'long'.*leaves 7 of max_length 100.*more than the stride \(10\)"):
        make_windows([fine, long], TOKENIZER, max_length=100, stride=10)
    with pytest.raises(ValueError, match="leaves 10 of max_length 103"):
        make_windows([fine, long], TOKENIZER, max_length=103, stride=10)
    assert len(make_windows([fine, long], TOKENIZER, max_length=104, stride=10)) > 2


def test_a_short_context_needs_no_room_for_a_stride():
    question = ask("ab cd", "cd", question="w" * 20)
    (window,) = make_windows([question], TOKENIZER, max_length=27, stride=10)
    assert text_of(window, "ab cd") == "cd"
    with pytest.raises(ValueError, match="leaves 3 of max_length 26"):
        make_windows([question], TOKENIZER, max_length=26, stride=10)


def test_wrong_arguments_are_refused():
    question = ask("ab cd", "cd")
    with pytest.raises(TypeError, match="tokenizer is a str.*fast tokenizer"):
        make_windows([question], "bert-base-uncased")
    for lengths, message in (((0, 1), "max_length is 0"), ((20, -1), "stride is -1")):
        with pytest.raises(ValueError, match=message):
            make_windows([question], TOKENIZER, *lengths)


@settings(deadline=None)
@given(strategies.lists(strategies.integers(2, 40)), strategies.integers(1, 9))
def test_sorted_batches_are_a_permutation_from_long_to_short(lengths, batch_size):
    batches = length_sorted_batches([window_of(tokens) for tokens in lengths], batch_size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert order == sorted(order, key=lambda index: (-lengths[index], index))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in batches[-1:])


@settings(deadline=None)
@given(strategies.lists(strategies.integers(2, 40), min_size=1), strategies.integers(0, 99))
def test_batches_by_tokens_hold_no_more_and_as_much_as_they_can(lengths, room):
    budget = max(lengths) + room
    batches = length_sorted_batches([window_of(tokens) for tokens in lengths], tokens_per_batch=budget)
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for batch in batches:
        assert len(batch) * lengths[batch[0]] <= budget
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > budget


def test_batches_of_nothing_are_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        length_sorted_batches([window_of(3)], 0)
    with pytest.raises(ValueError, match="tokens_per_batch is 2; expected at least the longest window's 3"):
        length_sorted_batches([window_of(3)], tokens_per_batch=2)
    for both in ((None, None), (2, 9)):
        with pytest.raises(ValueError, match="expected one of them, and one only"):
            length_sorted_batches([window_of(3)], both[0], tokens_per_batch=both[1])


def test_packed_windows_follow_one_another():
    tensors = WindowTensors([window_of(3), window_of(5), window_of(2)])
    batch = tensors.packed([2, 0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 5, 6, 7, 5, 6, 7, 8, 9]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 1, 1, 0, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 10] and batch["cu_seqlens"].dtype == torch.int32


def test_any_windows_can_be_padded_in_any_order():
    windows = [window_of(3), window_of(5), window_of(2)]
    expected = collate([windows[2], windows[0]], 99, pad_to=6)
    found = WindowTensors(windows).padded([2, 0], 99, pad_to=6)
    assert found.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])


def test_an_answer_without_a_place_teaches_nothing_unless_another_has_one():
    lost = replace(ask("ab cd ef", "cd"), answer_starts=(-1,))
    (window,) = make_windows([lost], TOKENIZER)
    assert (window.start_position, window.end_position) == (0, 0)
    second = replace(lost, answers=("zz", "ef"), answer_starts=(-1, 6))
    (window,) = make_windows([second], TOKENIZER)
    assert text_of(window, second.context) == "ef"


@pytest.mark.parametrize("pad_to", [None, 7])
def test_collate_pads_on_the_right(pad_to):
    batch = collate([window_of(3), window_of(5)], pad_token_id=99, pad_to=pad_to)
    length = pad_to or 5
    expected_ids = [[5, 6, 7] + [99] * (length - 3), [5, 6, 7, 8, 9] + [99] * (length - 5)]
    assert batch["input_ids"].tolist() == expected_ids
    assert batch["attention_mask"].tolist() == [[int(id != 99) for id in row] for row in expected_ids]
    assert batch["token_type_ids"].tolist() == [
        [0, 1, 1] + [0] * (length - 3),
        [0, 1, 1, 1, 1] + [0] * (length - 5),
    ]
    assert batch["start_positions"].tolist() == [1, 1]
    assert batch["end_positions"].tolist() == [2, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_refuses_what_it_cannot_pad():
    with pytest.raises(ValueError, match="no windows"):
        collate([], 0)
    with pytest.raises(ValueError, match=r"5 tokens, more than pad_to \(4\)"):
        collate([window_of(5)], 0, pad_to=4)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        collate([window_of(5)], None)
