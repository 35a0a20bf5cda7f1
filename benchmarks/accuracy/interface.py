"""What passes between tasks, which ask, and engines, which answer: token ids."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self


@dataclass(frozen=True)
class Prompt:
    """A text and a question about it."""

    material: tuple[int, ...]
    """Read densely, as a prompt; it begins with whatever the tokenizer puts first."""

    question: tuple[int, ...]
    """Fed token by token as decode steps, each under the method's budget."""

    max_answer_tokens: int
    """Then so many tokens are decoded greedily, or until the model ends its answer; 0: none."""

    @property
    def num_tokens(self) -> int:
        return len(self.material) + len(self.question) + self.max_answer_tokens


@dataclass(frozen=True)
class Answer:
    """What a model made of a prompt."""

    tokens: tuple[int, ...]
    """The greedy answer, without the token that ends it."""

    question_logprobs: tuple[float, ...]
    """Natural logarithm of the probability that the model gave each question token before it was
    fed; the first comes from the dense material."""

    question_hits: tuple[bool, ...] = ()
    """Whether each question token was the one that the model held for the most probable."""

    question_most_probable: tuple[int, ...] = ()
    """The token that the model held for the most probable in each question token's place."""


def num_tokens(prompts: Sequence[Prompt]) -> int:
    """What prompts take: each material once, each question and answer token."""
    read = {prompt.material for prompt in prompts}
    fed = sum(len(prompt.question) + prompt.max_answer_tokens for prompt in prompts)
    return fed + sum(map(len, read))


def ignore(*_: object) -> None:
    """What is called about answers by default."""


class Engine(Protocol):
    """A model, loaded once, that answers under several methods; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def run(
        self,
        prompts: Sequence[Prompt],
        method: str,
        token_budgets: Sequence[int],
        progress: Callable[[int], object] = ignore,
        answered: Callable[[int, Answer], object] = ignore,
    ) -> list[Answer]:
        """Answer prompts, in order.

        Args:
            prompts: what to ask.
            method: how the engine is to choose what it attends to.
            token_budgets: for each prompt, tokens attended per KV head and decode step; -1: all.
            progress: called with tokens computed since the last call; `num_tokens` together.
            answered: called with a prompt's number and its answer, as soon as it is there.

        Raises:
            NotImplementedError: the method cannot do this; one line says why.
        """
        ...


def quest_settings(engine_args: Mapping[str, Any], score: str = "minmax") -> dict[str, Any]:
    """QUEST's settings among the arguments of an engine, with a page score of their own.

    Args:
        engine_args: as `vllm.LLM` takes them.
        score: of the cell that is measured; `minmax` leaves the arguments' own.
    """
    settings: dict[str, Any] = engine_args.get("additional_config", {}).get("quest", {})
    return settings if score == "minmax" else settings | {"score": score}
