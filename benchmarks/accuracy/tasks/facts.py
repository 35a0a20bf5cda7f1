"""Texts with many facts, as `vllm_quest.pass_keys` makes them, in a model's own tokens."""

from benchmarks.accuracy.tasks.base import Request
from benchmarks.accuracy.tasks.haystacks import fill
from vllm_quest.pass_keys import Haystack, hide_in_text, make_haystack

TOKENS_PER_FACT = 128
"""Of the text, counted in the demo model's words."""


def haystack(request: Request, num_tokens: int, num_facts: int, seed: int) -> Haystack:
    """Facts in the filler that was asked for; its prose and words are tokens of the demo model."""
    if request.filler != "text":
        return make_haystack(num_tokens, num_facts, seed=seed, filler=request.filler)
    assert request.text_file is not None
    tokens = request.tokens
    opening_tokens = tokens.count("")
    return hide_in_text(
        request.text_file.read_text(),
        num_tokens,
        num_facts,
        seed=seed,
        count_tokens=lambda text: tokens.count(text) - opening_tokens,
    )


def many_facts(request: Request, room_tokens: int) -> Haystack:
    """A text of filler with a fact every 128 words, as long as the room allows."""

    def make(num_words: int) -> Haystack:
        return haystack(request, num_words, num_words // TOKENS_PER_FACT, request.seed)

    if request.language == "demo" or request.filler == "text":
        return make(room_tokens)
    sizes: dict[str, int] = {}

    def text(num_steps: int) -> str:
        made = make(num_steps * TOKENS_PER_FACT)
        sizes[made.text] = num_steps
        return made.text

    return make(sizes[fill(text, request.tokens, room_tokens)] * TOKENS_PER_FACT)


def in_turn(text: Haystack, num_facts: int) -> list[int]:
    """Numbers of so many facts, evenly chosen; a fact comes again once all have come."""
    num_known = len(text.facts)
    step = max(1, num_known // num_facts)
    return [(index * step) % num_known for index in range(num_facts)]


def depth(text: Haystack, fact: int) -> float:
    """Where a fact lies in its text, 0 to 1."""
    return text.text.index(text.facts[fact].sentence) / len(text.text)
