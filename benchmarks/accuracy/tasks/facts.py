"""Texts with many facts, as `vllm_quest.pass_keys` makes them, in a model's own tokens."""

from benchmarks.accuracy.tasks.base import Request
from benchmarks.accuracy.tasks.haystacks import fill
from vllm_quest.pass_keys import Haystack, make_haystack

TOKENS_PER_FACT = 128
"""Of the text, counted in the demo model's words."""


def many_facts(request: Request, room_tokens: int) -> Haystack:
    """A text of filler with a fact every 128 words, as long as the room allows."""

    def make(num_words: int) -> Haystack:
        return make_haystack(num_words, num_words // TOKENS_PER_FACT, seed=request.seed)

    if request.language == "demo":
        return make(room_tokens)
    sizes: dict[str, int] = {}

    def text(num_steps: int) -> str:
        haystack = make(num_steps * TOKENS_PER_FACT)
        sizes[haystack.text] = num_steps
        return haystack.text

    return make(sizes[fill(text, request.tokens, room_tokens)] * TOKENS_PER_FACT)


def in_turn(haystack: Haystack, num_facts: int) -> list[int]:
    """Numbers of so many facts, evenly chosen; a fact comes again once all have come."""
    num_known = len(haystack.facts)
    step = max(1, num_known // num_facts)
    return [(index * step) % num_known for index in range(num_facts)]


def depth(haystack: Haystack, fact: int) -> float:
    """Where a fact lies in its text, 0 to 1."""
    return haystack.text.index(haystack.facts[fact].sentence) / len(haystack.text)
