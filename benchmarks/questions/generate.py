"""Write the project's own question set: python -m benchmarks.questions.generate --output FILE

Everything in it is invented: places, people, numbers. The same seed gives the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.questions.passages import Plan, write_paragraph
from benchmarks.questions.topics import Topic, read_topics
from benchmarks.questions.values import Names

QUESTIONS_FILE = Path(__file__).parent / "questions.json"
SEED = 7
ARTICLES_PER_TOPIC = 3
PLANS = (
    (Plan(1, 4, 6), Plan(2, 3, 6), Plan(1, 7, 7)),
    (Plan(1, 5, 6), Plan(2, 3, 5, interleaved=True), Plan(3, 7, 3)),
    (Plan(2, 4, 6), Plan(1, 4, 6), Plan(1, 6, 7)),
)


def generate(seed: int = SEED) -> dict:
    """The question set as SQuAD v1.1 content: one article a title, three paragraphs each."""
    rng = random.Random(seed)
    names = Names(rng)
    articles = [_article(topic, index, names, rng) for index in range(ARTICLES_PER_TOPIC) for topic in read_topics()]
    return {"version": "1.1", "data": articles}


def to_json(content: dict) -> str:
    """JSON with one article a line, so that a change shows where it is."""
    articles = ",\n".join(json.dumps(article, ensure_ascii=False) for article in content["data"])
    return f'{{"version": {json.dumps(content["version"])}, "data": [\n{articles}\n]}}\n'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=QUESTIONS_FILE, help="file to write (default: the project's)")
    parser.add_argument("--seed", type=int, default=SEED, help="another seed gives other names, facts and questions")
    options = parser.parse_args(arguments)
    content = generate(options.seed)
    options.output.write_text(to_json(content), encoding="utf-8", newline="\n")
    paragraphs = [paragraph for article in content["data"] for paragraph in article["paragraphs"]]
    questions = sum(len(paragraph["qas"]) for paragraph in paragraphs)
    articles = len(content["data"])
    print(f"{options.output}: {questions} questions, {len(paragraphs)} paragraphs, {articles} articles")


def _article(topic: Topic, index: int, names: Names, rng: random.Random) -> dict:
    region = names.draw("region")
    paragraphs = [write_paragraph(topic, index, region, plan, names, rng) for plan in PLANS[index]]
    for number, paragraph in enumerate(paragraphs):
        paragraph["qas"] = [
            {"id": f"{topic.name}-{index}-{number}-{order}", **entry} for order, entry in enumerate(paragraph["qas"])
        ]
    title = topic.titles[index].replace("{region}", region)
    return {"title": title, "paragraphs": paragraphs}


if __name__ == "__main__":
    main()
