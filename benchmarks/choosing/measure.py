"""Every method and budget on one window: agreement, probabilities and facts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.choosing.attention import KeyValue, Model
from benchmarks.choosing.methods import Method
from benchmarks.choosing.samples import FactWindow, Question, Window

FULL, FLOOR = "full attention", "full attention, computed another way"
MAX_ELEMENTS = 2**28
"""Of a layer's logits in fp32, for questions that run at once."""


@dataclass(frozen=True)
class Outcome:
    """A method and budget on a window."""

    method: str
    token_budget: int
    """0: all tokens."""

    agrees: list[int]
    """By step, 1 where the most probable token is full attention's."""

    nats: list[float]
    """By step, the negative log-probability of the text's next token."""

    facts_right: list[int]
    """By question, 1 where the whole code is answered."""

    tokens_attended: float | None = None
    """By a step, KV head and sparse layer of the text, on average; None: all."""


def measure_window(
    model: Model,
    window: Window,
    facts: FactWindow,
    cells: Sequence[tuple[Method, int]],
    progress: Callable[[], object],
) -> list[Outcome]:
    """Full attention, its floor, and every method at its budget.

    The floor reads the whole window in one pass: another batch composition, and PyTorch's fused
    attention in the place of explicit logits.
    """
    text = model.read(window.read)
    fact_text = model.read(facts.read) if facts.questions else []
    fed = torch.tensor([window.fed])
    targets = torch.tensor(window.targets)
    full = model.decode(text, fed, None, 0).logits[0].argmax(-1)

    def outcome(
        name: str, budget: int, logits: Tensor, right: list[int], attended: float | None = None
    ) -> Outcome:
        nats = -logits.float().log_softmax(-1).gather(1, targets.to(logits.device)[:, None])
        agrees = (logits.argmax(-1) == full).int().tolist()
        progress()
        rounded = [round(n, 4) for n in nats[:, 0].tolist()]
        return Outcome(name, budget, agrees, rounded, right, attended)

    again = model.read_logits(window.read + window.fed, last=len(window.fed))
    outcomes = [outcome(FLOOR, 0, again, [])]
    for method, budget in [(None, 0), *cells]:
        decoded = model.decode(text, fed, method, budget)
        right = facts_right(model, fact_text, facts.questions, method, budget)
        name = method.name if method else FULL
        outcomes.append(outcome(name, budget, decoded.logits[0], right, decoded.tokens_attended))
    return outcomes


def facts_right(
    model: Model,
    text: list[KeyValue],
    questions: Sequence[Question],
    method: Method | None,
    token_budget: int,
) -> list[int]:
    """By question, 1 where the most probable tokens are the answer's, one after the other."""
    if not questions:
        return []
    steps = max(len(question.fed) for question in questions)
    at_once = max(1, MAX_ELEMENTS // model.elements_per_stream(text, steps))
    right: list[int] = []
    for first in range(0, len(questions), at_once):
        chosen = questions[first : first + at_once]
        # What follows a question's end changes nothing before it.
        fed = torch.zeros(len(chosen), steps, dtype=torch.int64)
        for row, question in enumerate(chosen):
            fed[row, : len(question.fed)] = torch.tensor(question.fed)
        most_probable = model.decode(text, fed, method, token_budget).logits.argmax(-1).tolist()
        for tokens, question in zip(most_probable, chosen, strict=True):
            end = len(question.fed)
            answer = tokens[end - len(question.answer) : end]
            right.append(int(answer == list(question.answer)))
    return right
