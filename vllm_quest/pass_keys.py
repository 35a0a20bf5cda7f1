"""Prompts in the demo model's language: a long text, facts hidden in it, and questions about them.

    the old farmer walked toward the river. the code of amber falcon is 47 19 82 05 63. ...
    what is the code of amber falcon?

The training data (`training/haystacks.py`) follows the same patterns over the same words.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vllm_quest import pass_key_words as words

FACT = "the code of {key} is {code}."
QUESTION = "what is the code of {key}?"
STATEMENT = "the code of {key} is"
"""The question as the beginning of a sentence, for plain completions."""

CODE_WORDS = 5
FACT_TOKENS = 12
QUESTION_TOKENS = 8

SENTENCE_TOKENS = 8
SENTENCES = (
    "the {quality} {thing} {action} {place} the {thing}.",
    "{manner} the {thing} {action} every {quality} {thing}.",
    "a {thing} {action} {manner} {place} the {thing}.",
    "every {quality} {thing} {action} {place} a {thing}.",
    "{manner}, a {thing} {action} the {thing}.",
    "the {thing} of the {thing} {action} {manner}.",
    "the {thing} {place} the {thing} is {quality}.",
)

SLOTS = {
    "quality": words.QUALITIES,
    "thing": words.THINGS,
    "action": words.ACTIONS,
    "place": words.PLACES,
    "manner": words.MANNERS,
}

BOS, EOS, UNKNOWN, PADDING = "<s>", "</s>", "<unk>", "<pad>"

Filler = Literal["sentences", "words"]


def vocabulary() -> list[str]:
    """Every token of the demo model, in the order of the ids.

    Keys, codes and filler have ranges of their own.
    """
    special = (PADDING, BOS, EOS, UNKNOWN)
    keys_and_codes = words.KEY_ADJECTIVES + words.KEY_NOUNS + words.CODES
    filler = tuple(word for slot in SLOTS.values() for word in slot)
    return [*special, *keys_and_codes, *words.GRAMMAR, *filler]


@dataclass(frozen=True)
class Fact:
    """A pass key: two words, and the five two-digit numbers that they stand for."""

    key: str
    code: str

    @property
    def sentence(self) -> str:
        return FACT.format(key=self.key, code=self.code)

    @property
    def question(self) -> str:
        return QUESTION.format(key=self.key)


@dataclass(frozen=True)
class Haystack:
    """A text with facts hidden in it. `num_tokens` leaves out the token that opens a prompt."""

    text: str
    num_tokens: int
    facts: tuple[Fact, ...]

    def prompt(self, fact: Fact) -> str:
        """The text, then the question; the answer is `fact.code`."""
        return f"{self.text} {fact.question}"


def make_haystack(
    num_tokens: int, num_facts: int, *, seed: int, filler: Filler = "sentences"
) -> Haystack:
    """Hide facts at random places of a random text.

    Args:
        num_tokens: length of the text; it is met to the token.
        num_facts: facts to hide, each with a key of its own.
        seed: equal seeds give equal texts.
        filler: `sentences` reads like prose; `words` is words in random order, the harder case.
    """
    num_filler_tokens = num_tokens - num_facts * FACT_TOKENS
    max_facts = len(words.KEY_ADJECTIVES) * len(words.KEY_NOUNS)
    if num_facts < 1 or num_facts > max_facts or num_filler_tokens < 0:
        raise ValueError(
            f"expected 1 to {max_facts} facts of {FACT_TOKENS} tokens each that fit the text, "
            f"got {num_facts} facts in {num_tokens} tokens"
        )
    rng = random.Random(seed)
    facts = _facts(num_facts, rng)
    make_piece = {"sentences": _sentence, "words": _words}[filler]
    pieces = _pieces(num_filler_tokens, make_piece, rng)
    for fact in facts:
        pieces.insert(rng.randint(0, len(pieces)), fact.sentence)
    return Haystack(text=" ".join(pieces), num_tokens=num_tokens, facts=tuple(facts))


def hide_in_text(
    text: str,
    num_tokens: int,
    num_facts: int,
    *,
    seed: int,
    count_tokens: Callable[[str], int],
    comment: str = "# ",
) -> Haystack:
    """Hide facts between lines of a given text, such as program source, each in a comment.

    Args:
        text: a stretch of it is used, from a random line on, around its end if need be.
        num_tokens: length of the result; at most one line shorter.
        num_facts: facts to hide, each with a key of its own.
        seed: equal seeds give equal results.
        count_tokens: the tokens of a string, nothing added in front.
        comment: opens the line of a fact.

    Raises:
        ValueError: the text has no tokens, or the facts do not fit.
    """
    rng = random.Random(seed)
    facts = _facts(num_facts, rng)
    hidden = [f"{comment}{fact.sentence}" for fact in facts]
    source = text.splitlines()
    left = num_tokens - sum(count_tokens(f"{line}\n") for line in hidden)
    if left < 0 or not text.strip():
        raise ValueError(
            f"expected a text that is not blank, and facts that fit, got {len(text)} characters "
            f"and {num_facts} facts in {num_tokens} tokens"
        )
    first, lines = rng.randrange(len(source)), list[str]()
    while True:
        line = source[(first + len(lines)) % len(source)]
        left -= count_tokens(f"{line}\n")
        if left < 0:
            break
        lines.append(line)
    for line in hidden:
        lines.insert(rng.randint(0, len(lines)), line)
    result = "".join(f"{line}\n" for line in lines)
    return Haystack(text=result, num_tokens=count_tokens(result), facts=tuple(facts))


def _facts(num_facts: int, rng: random.Random) -> list[Fact]:
    num_nouns = len(words.KEY_NOUNS)
    keys = rng.sample(range(len(words.KEY_ADJECTIVES) * num_nouns), num_facts)
    return [
        Fact(
            key=f"{words.KEY_ADJECTIVES[key // num_nouns]} {words.KEY_NOUNS[key % num_nouns]}",
            code=" ".join(rng.choices(words.CODES, k=CODE_WORDS)),
        )
        for key in keys
    ]


def _pieces(
    num_tokens: int, make_piece: Callable[[random.Random], str], rng: random.Random
) -> list[str]:
    pieces = [make_piece(rng) for _ in range(num_tokens // SENTENCE_TOKENS)]
    rest = num_tokens % SENTENCE_TOKENS
    if rest:
        pieces.insert(0, " ".join(rng.choices(words.THINGS, k=rest)))
    return pieces


def _sentence(rng: random.Random) -> str:
    pattern = rng.choice(SENTENCES)
    for slot, choices in SLOTS.items():
        while f"{{{slot}}}" in pattern:
            pattern = pattern.replace(f"{{{slot}}}", rng.choice(choices), 1)
    return pattern


def _words(rng: random.Random) -> str:
    return " ".join(rng.choice(rng.choice(tuple(SLOTS.values()))) for _ in range(SENTENCE_TOKENS))
