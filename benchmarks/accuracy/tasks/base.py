"""What a task is: it makes samples for a model's tokenizer, and grades the answers."""

import operator
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, Protocol

from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.tokens import Language, Tokens
from vllm_quest import pass_keys

Unit = Literal["share right", "perplexity"]
Filler = pass_keys.Filler | Literal["text"]


@dataclass(frozen=True)
class Request:
    """Which samples to make: equal requests give equal samples."""

    tokens: Tokens
    language: Language
    context_tokens: int
    """Tokens of material and question together, at most."""

    num_samples: int
    seed: int
    first_sample: int = 0
    """Number of the first sample among those of all seeds; tasks spread depths over them."""

    total_samples: int = 0
    """Samples of all seeds; 0: num_samples."""

    filler: Filler = "sentences"
    """What lies between facts of `vllm_quest.pass_keys`; `text`: lines of the text file."""

    text_file: Path | None = None
    scored_tokens: int = 256
    """Tokens at a text's end whose probability is taken; -1: all but the first."""

    data_folder: Path | None = None
    """Where LongBench's files lie; None: its hub."""

    def depths(self) -> list[float]:
        """Where each sample's fact lies, 0 the beginning to 1 the end, evenly over all samples."""
        total = self.total_samples or self.num_samples
        numbers = range(self.first_sample, self.first_sample + self.num_samples)
        return [(number + 0.5) / total for number in numbers]


@dataclass(frozen=True)
class Sample:
    """A prompt and what a right answer holds."""

    prompt: Prompt
    targets: tuple[str, ...] = ()
    depth: float | None = None
    scored: tuple[int, ...] = ()
    """Indices of the question tokens whose probability counts, for perplexity."""

    code: tuple[str, ...] = ()
    """The numbers that a right answer begins with; empty: it need not begin with any."""

    def token_share(self, answer: Answer, text: str) -> float | None:
        """The share of tokens that are right, one by one; None: no tokens are the right ones.

        Of scored tokens, those that the model held for the most probable; of a code, the numbers
        that the answer's text has in their places. To the models of `training/` a number is one
        token.
        """
        if self.scored:
            return fmean(answer.question_hits[i] for i in self.scored)
        if self.code:
            numbers = re.findall(r"\d+", text)
            hits = map(operator.eq, numbers, self.code)
            return sum(hits) / len(self.code)
        return None

    def most_probable(self, answer: Answer) -> list[int]:
        """The most probable token in each scored token's place."""
        return [answer.question_most_probable[i] for i in self.scored]


class Task(Protocol):
    name: str
    title: str
    """How a heading calls it."""

    unit: Unit

    def refusal(self, request: Request) -> str | None:
        """Why the numbers would mean nothing for this model, or cannot be had; None if they can."""
        ...

    def samples(self, request: Request) -> list[Sample]: ...

    def grade(self, sample: Sample, answer: Answer, text: str) -> float:
        """How good an answer is: 0 to 1, or the mean negative log-probability per token, in nats.

        `text` is the answer's tokens as text.
        """
        ...
