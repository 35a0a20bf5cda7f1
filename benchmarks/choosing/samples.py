"""What is decoded: the ends of a text's windows, and questions about codes hidden in them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_quest.pass_key_words import KEY_ADJECTIVES, KEY_NOUNS

FACT = "\nThe code of {key} is {code}.\n"
QUESTION = "\n\nWhat is the code of {key}? The code of {key} is"
CODE_DIGITS = 5


@dataclass(frozen=True)
class Window:
    """A stretch of the text: what is read, and what is fed after it."""

    read: tuple[int, ...]
    fed: tuple[int, ...]
    targets: tuple[int, ...]
    """The token that follows each fed one."""


@dataclass(frozen=True)
class Question:
    """Fed after the text that holds its fact."""

    fed: tuple[int, ...]
    """The question's tokens and those of the answer but the last."""

    answer: tuple[int, ...]
    """The code's tokens, from the first that has a digit. The last `len(answer)` logits foretell
    them; all are right if greedy decoding gives the code."""


@dataclass(frozen=True)
class FactWindow:
    """The window's text with facts in it, as long as the window, and questions."""

    read: tuple[int, ...]
    questions: tuple[Question, ...]


class Samples:
    """Windows of a text file, spread evenly over it."""

    def __init__(
        self, model: str, text: Path, *, context_tokens: int, steps: int, num_windows: int
    ) -> None:
        """
        Raises:
            ValueError: the text is shorter than one window.
        """
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        # The text is cut into windows below: it may be longer than what the model takes.
        ids = self._tokenizer(text.read_text(), verbose=False).input_ids
        self._opening = tuple(self._tokenizer("").input_ids)
        self._ids = ids[len(self._opening) :]
        self._steps = steps
        self._num_windows = num_windows
        self._length = context_tokens - len(self._opening)
        if len(self._ids) <= self._length:
            raise ValueError(
                f"{text} has {len(self._ids)} tokens; a window takes {context_tokens + 1}"
            )

    def window(self, number: int) -> Window:
        """The window with a number from 0."""
        ids = self._stretch(number)
        cut = self._length - self._steps
        return Window(
            (*self._opening, *ids[:cut]), tuple(ids[cut : self._length]), tuple(ids[cut + 1 :])
        )

    def facts(self, number: int, num_facts: int, num_questions: int) -> FactWindow:
        """The window's text with facts between its lines, and questions about some of them."""
        rng = random.Random(number)
        keys = [
            f"{adjective} {noun}"
            for adjective, noun in zip(
                rng.sample(KEY_ADJECTIVES, num_facts), rng.sample(KEY_NOUNS, num_facts), strict=True
            )
        ]
        codes = ["".join(rng.choices("0123456789", k=CODE_DIGITS)) for _ in keys]
        facts = [
            self._own_ids(FACT.format(key=key, code=code))
            for key, code in zip(keys, codes, strict=True)
        ]
        longest = max(len(self._own_ids(QUESTION.format(key=key))) for key in keys)
        room = self._length - longest - 2 * CODE_DIGITS - sum(map(len, facts))
        ids = self._stretch(number)[:room]
        pieces: list[int] = []
        last = 0
        for index, fact in enumerate(facts):
            place = self._end_of_line(ids, int((index + 0.5) / num_facts * room))
            pieces += [*ids[last:place], *fact]
            last = place
        pieces += ids[last:]
        asked = [index * num_facts // num_questions for index in range(num_questions)]
        return FactWindow(
            (*self._opening, *pieces), tuple(self._question(keys[i], codes[i]) for i in asked)
        )

    def _stretch(self, number: int) -> list[int]:
        """A window's tokens and one more, the opening left out."""
        spare = len(self._ids) - self._length - 1
        start = spare * number // max(1, self._num_windows - 1)
        stretch: list[int] = self._ids[start : start + self._length + 1]
        return stretch

    def _own_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _end_of_line(self, ids: Sequence[int], place: int) -> int:
        """The first place from this one on that follows the end of a line."""
        while place < len(ids) and "\n" not in self._tokenizer.decode([ids[place - 1]]):
            place += 1
        return place

    def _question(self, key: str, code: str) -> Question:
        ids = self._own_ids(f"{QUESTION.format(key=key)} {code}")
        asked = len(self._own_ids(QUESTION.format(key=key)))
        while not any(c.isdigit() for c in self._tokenizer.decode([ids[asked]])):
            asked += 1
        return Question(tuple(ids[:-1]), tuple(ids[asked:]))
