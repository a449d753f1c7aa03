"""read_squad refuses every wrong record by name; split_articles keeps articles whole."""

import copy
import json

import pytest

from sparse_attn.squad import Question, misplaced_answers, read_squad, split_articles

CONTEXT = "The mill at Orford was built in 1820 by Ada Low."
CONTENT = {
    "version": "1.1",
    "data": [
        {
            "title": "Mills",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "m1",
                            "question": "When was the mill built?",
                            "answers": [
                                {"text": "1820", "answer_start": 32},
                                {"text": "in 1820", "answer_start": 29},
                            ],
                        },
                        {
                            "id": "m2",
                            "question": "Who built it?",
                            "answers": [{"text": "Ada Low", "answer_start": 40}],
                        },
                    ],
                }
            ],
        },
        {
            "title": "Dogs",
            "paragraphs": [
                {
                    "context": "Rex barks.",
                    "qas": [
                        {
                            "id": "d1",
                            "question": "Who barks?",
                            "answers": [{"text": "Rex", "answer_start": 0}],
                        }
                    ],
                }
            ],
        },
    ],
}


def write(tmp_path, content):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def changed(change):
    content = copy.deepcopy(CONTENT)
    article = content["data"][0]
    paragraph = article["paragraphs"][0]
    change(content=content, article=article, paragraph=paragraph, entry=paragraph["qas"][1])
    return content


def test_reads_every_field_in_file_order(tmp_path):
    questions = read_squad(write(tmp_path, CONTENT))
    assert [question.id for question in questions] == ["m1", "m2", "d1"]
    assert questions[0] == Question("m1", "Mills", CONTEXT, "When was the mill built?", ("1820", "in 1820"), (32, 29))


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(CONTENT).replace("was", "\\ud800", 1))
    with pytest.raises(ValueError, match="holds half of a surrogate pair"):
        read_squad(path)


def test_limit_takes_the_first_questions(tmp_path):
    path = write(tmp_path, CONTENT)
    assert [question.id for question in read_squad(path, limit=2)] == ["m1", "m2"]
    assert len(read_squad(path, limit=99)) == 3
    with pytest.raises(ValueError, match="limit is 0"):
        read_squad(path, limit=0)


def test_an_article_without_title_is_named_by_its_index(tmp_path):
    content = changed(lambda article, **_: article.pop("title"))
    assert [question.title for question in read_squad(write(tmp_path, content))] == [
        "article 0",
        "article 0",
        "Dogs",
    ]


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(CONTENT), encoding="utf-8-sig")
    assert len(read_squad(path)) == 3


IN_PARAGRAPH = r"article 0 \('Mills'\), paragraph 0"
IN_QUESTION = IN_PARAGRAPH + r", question 1 \(id 'm2'\)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, **_: content.pop("data"), r"top level: missing field 'data'.*present: 'version'"),
        (
            lambda content, **_: content.update(data={}),
            r"top level: field 'data' is of type object; expected array",
        ),
        (
            lambda content, **_: content["data"].insert(0, "x"),
            r"article 0: of type string; expected an object",
        ),
        (lambda article, **_: article.update(title=3), r"article 0: field 'title' is of type integer"),
        (
            lambda article, **_: article.pop("paragraphs"),
            r"article 0 \('Mills'\): missing field 'paragraphs'",
        ),
        (
            lambda article, **_: article["paragraphs"].append(None),
            r"paragraph 1: of type null; expected an object",
        ),
        (lambda paragraph, **_: paragraph.pop("context"), IN_PARAGRAPH + ": missing field 'context'"),
        (lambda paragraph, **_: paragraph.update(context=" "), IN_PARAGRAPH + ": field 'context' is blank"),
        (lambda paragraph, **_: paragraph.pop("qas"), IN_PARAGRAPH + ": missing field 'qas'"),
        (lambda entry, **_: entry.pop("id"), IN_PARAGRAPH + ", question 1: missing field 'id'"),
        (lambda entry, **_: entry.update(id=7), "question 1: field 'id' is of type integer; expected string"),
        (
            lambda entry, **_: entry.update(id="m1"),
            IN_PARAGRAPH + r".*'m1'.*id is that of article 0.*question 0",
        ),
        (lambda entry, **_: entry.pop("question"), IN_QUESTION + ": missing field 'question'"),
        (lambda entry, **_: entry.pop("answers"), IN_QUESTION + ": missing field 'answers'"),
        (lambda entry, **_: entry.update(answers=[]), IN_QUESTION + ": 'answers' is empty.*SQuAD 2.0.*drop"),
        (
            lambda entry, **_: entry.update(is_impossible=True),
            IN_QUESTION + ": marked 'is_impossible'.*2.0.*drop",
        ),
        (
            lambda entry, **_: entry["answers"][0].pop("text"),
            IN_QUESTION + ", answer 0: missing field 'text'",
        ),
        (lambda entry, **_: entry["answers"][0].update(text=""), "answer 0: field 'text' is blank"),
        (
            lambda entry, **_: entry["answers"][0].pop("answer_start"),
            "answer 0: missing field 'answer_start'",
        ),
        (
            lambda entry, **_: entry["answers"][0].update(answer_start="40"),
            "'answer_start' is of type string",
        ),
        (
            lambda entry, **_: entry["answers"][0].update(answer_start=True),
            "'answer_start' is of type boolean",
        ),
        (lambda content, **_: content.update(data=[]), "no questions"),
    ],
)
def test_wrong_records_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=r"questions\.json: .*" + message):
        read_squad(write(tmp_path, changed(change)))


@pytest.mark.parametrize("wrong", [{"answer_start": 41}, {"answer_start": -8}, {"text": "Bob"}, {"answer_start": 900}])
def test_an_answer_that_is_not_where_its_record_says_is_counted(tmp_path, wrong):
    questions = read_squad(write(tmp_path, changed(lambda entry, **_: entry["answers"][0].update(wrong))))
    assert questions[1].answers == (wrong.get("text", "Ada Low"),) and questions[1].answer_starts == (-1,)
    assert misplaced_answers(questions) == 1
    assert misplaced_answers(read_squad(write(tmp_path, CONTENT))) == 0


def test_a_version_2_file_with_answers_only_is_read(tmp_path):
    content = changed(lambda entry, **_: entry.update(is_impossible=False))
    assert len(read_squad(write(tmp_path, content))) == 3


def test_files_that_are_no_json_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json: no such file"):
        read_squad(tmp_path / "absent.json")
    with pytest.raises(IsADirectoryError, match="a folder; expected a SQuAD"):
        read_squad(tmp_path)
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(CONTENT)[:-20])
    with pytest.raises(ValueError, match=r"cut\.json: malformed JSON .*line 1"):
        read_squad(path)
    path.write_bytes(b'{"data": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"cut\.json: not UTF-8"):
        read_squad(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"cut\.json: .*nested too deeply"):
        read_squad(path)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="top level: of type array; expected an object"):
        read_squad(path)


def questions_on(titles):
    return [Question(str(index), title, "a", "b?", ("a",), (0,)) for index, title in enumerate(titles)]


def test_no_article_is_on_both_sides():
    questions = questions_on([f"title {index % 9}" for index in range(40)])
    train, held_out = split_articles(questions)
    train_titles, held_out_titles = ({question.title for question in part} for part in (train, held_out))
    assert not train_titles & held_out_titles
    assert (len(train_titles), len(held_out_titles)) == (6, 3)
    assert sorted(train + held_out, key=lambda question: int(question.id)) == questions
    assert split_articles(questions) == (train, held_out)
    assert split_articles(questions, seed=1) != (train, held_out)


def test_the_order_of_questions_does_not_decide_a_split():
    questions = questions_on("abcdefgh")
    (train, _), (other, _) = split_articles(questions), split_articles(questions[::-1])
    assert other == train[::-1]


def test_a_share_is_rounded_to_articles():
    assert [len(part) for part in split_articles(questions_on("abcdefgh"), train_share=0.7)] == [6, 2]


def test_both_sides_get_an_article_at_any_share():
    questions = questions_on("ab")
    for share in (0.01, 0.99):
        train, held_out = split_articles(questions, train_share=share)
        assert len(train) == len(held_out) == 1


def test_a_split_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match=r"1 article\(s\).*at least 2 titles"):
        split_articles(questions_on("aaa"))
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="train_share is"):
            split_articles(questions_on("ab"), train_share=share)
