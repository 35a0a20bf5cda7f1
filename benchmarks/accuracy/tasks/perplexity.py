"""How well the model foretells the end of a text, its tokens fed one at a time.

English models read windows of a text file. The demo model was trained on answers alone, so what
counts there are the codes of facts that are asked for after the text, one after the other.
"""

import random

from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.tasks import facts
from benchmarks.accuracy.tasks.base import Request, Sample, Unit
from vllm_quest.pass_keys import CODE_WORDS, EOS

MAX_UNKNOWN_SHARE = 0.01
TURNS = 4
"""Questions per sample of the demo model."""


class Perplexity:
    name = "perplexity"
    title = "Perplexity"
    unit: Unit = "perplexity"

    def refusal(self, request: Request) -> str | None:
        if request.text_file is None:
            if request.language == "demo":
                return None
            return "no text to read: give one with --text FILE"
        text = request.text_file.read_text()
        unknown = request.tokens.unknown_share(text)
        if unknown > MAX_UNKNOWN_SHARE:
            return f"the model does not know {unknown:.0%} of the words of {request.text_file.name}"
        num_tokens = request.tokens.count(text)
        if num_tokens < request.context_tokens:
            return (
                f"{request.text_file.name} has {num_tokens} tokens, "
                f"fewer than the context of {request.context_tokens}"
            )
        return None

    def samples(self, request: Request) -> list[Sample]:
        return _codes(request) if request.text_file is None else _windows(request)

    def grade(self, sample: Sample, answer: Answer, text: str) -> float:
        return -sum(answer.question_logprobs[i] for i in sample.scored) / len(sample.scored)


def _windows(request: Request) -> list[Sample]:
    assert request.text_file is not None
    ids = request.tokens.ids(request.text_file.read_text())
    # The first token opens a prompt, for most tokenizers: every window begins with it.
    first, rest = ids[:1], ids[1:]
    length = request.context_tokens - 1
    num_scored = length if request.scored_tokens == -1 else min(request.scored_tokens, length)
    rng = random.Random(request.seed)
    samples = []
    for number in range(request.num_samples):
        # The first window of the first seed begins where the text does.
        is_first = request.first_sample + number == 0
        start = 0 if is_first else rng.randint(0, len(rest) - length)
        window = rest[start : start + length]
        cut = length - num_scored
        prompt = Prompt(first + window[:cut], window[cut:], 0)
        samples.append(Sample(prompt, scored=tuple(range(num_scored))))
    return samples


def _codes(request: Request) -> list[Sample]:
    haystack = facts.many_facts(request, request.context_tokens)
    numbers = facts.in_turn(haystack, request.num_samples * TURNS)
    samples = []
    for first in range(request.num_samples):
        material = request.tokens.ids(haystack.text)
        question: tuple[int, ...] = ()
        scored: list[int] = []
        for number in numbers[first :: request.num_samples]:
            fact = haystack.facts[number]
            question += request.tokens.split(haystack.text, f" {fact.question}")[1]
            scored += range(len(question), len(question) + CODE_WORDS)
            question += request.tokens.split(fact.question, f" {fact.code} {EOS}")[1]
        samples.append(Sample(Prompt(material, question, 0), scored=tuple(scored)))
    return samples
