"""Many facts, and one question about four of them (in the style of RULER, arXiv 2404.06654).

The score is the share of the four codes that the answer holds.
"""

from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.tasks import facts
from benchmarks.accuracy.tasks.base import Request, Sample, Unit
from vllm_quest.pass_keys import CODE_WORDS

NUM_KEYS = 4
QUESTION = (
    "\n\nWhat are the codes of {keys}? Name each with its code, one after the other.\n"
    "Answer: the code of"
)
QUESTION_TOKENS = 128
"""Room for the question."""

ANSWER_TOKENS = NUM_KEYS * (4 * CODE_WORDS + 16)


class MultiQuery:
    name = "multi_query"
    title = "Four facts at once"
    unit: Unit = "share right"

    def refusal(self, request: Request) -> str | None:
        if request.language == "demo":
            return "the model's language has no question about several facts"
        return None

    def samples(self, request: Request) -> list[Sample]:
        haystack = facts.many_facts(request, request.context_tokens - QUESTION_TOKENS)
        asked = facts.in_turn(haystack, request.num_samples * NUM_KEYS)
        samples = []
        for first in range(request.num_samples):
            chosen = [haystack.facts[number] for number in asked[first :: request.num_samples]]
            question = QUESTION.format(keys=", ".join(fact.key for fact in chosen))
            ids = request.tokens.split(haystack.text, question)
            targets = tuple(fact.code for fact in chosen)
            samples.append(Sample(Prompt(*ids, ANSWER_TOKENS), targets))
        return samples

    def grade(self, sample: Sample, answer: Answer, text: str) -> float:
        words = " ".join(text.split())
        return sum(code in words for code in sample.targets) / len(sample.targets)
