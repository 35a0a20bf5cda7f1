"""Many facts, one for every 128 words of filler, and a question about one of them.

All samples of a seed ask about one text, so that it is read once. An answer is right if it begins
with the whole code: its first five numbers are the code's.
"""

import re

from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.tasks import facts
from benchmarks.accuracy.tasks.base import Request, Sample, Unit
from vllm_quest.pass_keys import CODE_WORDS, Fact

ENGLISH_QUESTION = "\n\nWhat is the code of {key}? The code of {key} is"
ENGLISH_QUESTION_TOKENS = 64
"""Room for the question."""

ENGLISH_ANSWER_TOKENS = 48
"""A code takes 15 tokens where every digit is one; some models name the key once more before it."""


class KeyValue:
    name = "key_value"
    title = "Key-value retrieval among many facts"
    unit: Unit = "share right"

    def refusal(self, request: Request) -> str | None:
        return None

    def samples(self, request: Request) -> list[Sample]:
        is_demo = request.language == "demo"
        room = request.context_tokens - (0 if is_demo else ENGLISH_QUESTION_TOKENS)
        haystack = facts.many_facts(request, room)
        max_answer_tokens = CODE_WORDS + 1 if is_demo else ENGLISH_ANSWER_TOKENS
        samples = []
        for number in facts.in_turn(haystack, request.num_samples):
            fact = haystack.facts[number]
            question = f" {fact.question}" if is_demo else _english_question(fact)
            ids = request.tokens.split(haystack.text, question)
            samples.append(
                Sample(
                    Prompt(*ids, max_answer_tokens),
                    (fact.code,),
                    facts.depth(haystack, number),
                    code=tuple(fact.code.split()),
                )
            )
        return samples

    def grade(self, sample: Sample, answer: Answer, text: str) -> float:
        (code,) = sample.targets
        return float(re.findall(r"\d+", text)[:CODE_WORDS] == code.split())


def _english_question(fact: Fact) -> str:
    return ENGLISH_QUESTION.format(key=fact.key)
