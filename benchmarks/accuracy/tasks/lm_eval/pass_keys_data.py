"""Documents and grades for lm-eval's `quest_passkey` and `quest_many_facts`.

lm-eval calls the functions that the task files name, with the values of `--metadata`. A document's
cue begins the answer: with a chat template in the assistant's turn, without one after the question.
"""

import re
from typing import Any

import datasets

from vllm_quest.pass_keys import CODE_WORDS, STATEMENT, Fact, Haystack, make_haystack

WORDS_PER_FACT = 128


def passkey(words: int = 2048, samples: int = 20, **_: Any) -> dict[str, datasets.Dataset]:
    """One fact in each text of so many words."""
    haystacks = [make_haystack(words, 1, seed=seed) for seed in range(samples)]
    return _documents([(haystack, fact) for haystack in haystacks for fact in haystack.facts])


def many_facts(words: int = 2048, samples: int = 20, **_: Any) -> dict[str, datasets.Dataset]:
    """A fact for every 128 words of one text, some of which are asked for."""
    num_facts = max(samples, words // WORDS_PER_FACT)
    haystack = make_haystack(words, num_facts, seed=0)
    asked = haystack.facts[:: num_facts // samples][:samples]
    return _documents([(haystack, fact) for fact in asked])


def grade(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right if the answer's first five numbers are the code's."""
    numbers = re.findall(r"\d+", results[0])[:CODE_WORDS]
    return {"right": float(numbers == document["code"].split())}


def _documents(asked: list[tuple[Haystack, Fact]]) -> dict[str, datasets.Dataset]:
    rows = [
        {
            "question": haystack.prompt(fact),
            "cue": STATEMENT.format(key=fact.key),
            "code": fact.code,
        }
        for haystack, fact in asked
    ]
    return {"test": datasets.Dataset.from_list(rows)}
