"""Clients: streams, a third of them cut off, whole answers, bad requests; and what they count."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

from .server import DEMO_MODEL

MODEL = str(DEMO_MODEL)
VOCABULARY = 900
BUDGETS = [None, 1, 16, 64, 200, 512, 2048, -1, 10**9]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("a budget of 0", {"extra_body": {"vllm_xargs": {"quest_token_budget": 0}}}),
    ("a budget in words", {"extra_body": {"vllm_xargs": {"quest_token_budget": "many"}}}),
    ("a misspelt field", {"extra_body": {"vllm_xargs": {"quest_budget": 64}}}),
    ("a field in Chinese", {"extra_body": {"vllm_xargs": {"quest_预算": 64}}}),
    ("a very long field", {"extra_body": {"vllm_xargs": {"quest_" + "x" * 10_000: 64}}}),
    ("a negative length", {"max_tokens": -5}),
    ("a temperature of -1", {"temperature": -1.0}),
    ("more than the context", {"max_tokens": 10**6}),
    ("an unknown model", {"model": "no-such-model"}),
]


@dataclass
class Tally:
    """What clients saw, all of them together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    finished: int = 0
    """Requests answered to their end."""

    cut: int = 0
    """Streams that the client left."""

    refused: int = 0
    """Bad requests that were answered with 400 or 404."""

    prompt_tokens: int = 0
    generated: int = 0
    """Tokens of finished requests."""

    asked: int = 0
    """Tokens that cut requests asked for."""

    lost: list[str] = field(default_factory=list)
    """Requests that got another answer than they should."""

    def add(self, **counts: int) -> None:
        """Count."""
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def lose(self, what: str) -> None:
        """A request that should have been answered was not, or one that should not was."""
        with self.lock:
            self.lost.append(what)


def client(url: str) -> openai.OpenAI:
    """One that asks once."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


def draw_request(rng: random.Random) -> dict[str, Any]:
    """A request with its prompt as token ids, so that the client knows their number."""
    length = rng.choice([1, 16, 130, 500, 1500, 3000])
    prompt = [rng.randrange(3, VOCABULARY) for _ in range(length)]
    budget = rng.choice(BUDGETS)
    extra: dict[str, Any] = {"ignore_eos": True}
    if budget is not None:
        extra["vllm_xargs"] = {"quest_token_budget": budget}
    num_tokens = rng.choice([1, 5, 20, 60])
    return {"model": MODEL, "prompt": prompt, "max_tokens": num_tokens, "extra_body": extra}


def ask(to: openai.OpenAI, rng: random.Random, tally: Tally) -> None:
    """One request of a kind that is drawn."""
    request = draw_request(rng)
    kind = rng.random()
    if kind < 0.1:
        what, bad = rng.choice(BAD)
        try:
            to.completions.create(**(request | {"max_tokens": 1} | bad))
            tally.lose(f"{what} was answered")
        except (openai.BadRequestError, openai.NotFoundError):
            tally.add(refused=1)
        return
    length, num_tokens = len(request["prompt"]), request["max_tokens"]
    if kind < 0.4:
        usage = to.completions.create(**request).usage
        tally.add(finished=1, prompt_tokens=length, generated=usage.completion_tokens)
        if usage.completion_tokens != num_tokens:
            tally.lose(f"{usage.completion_tokens} tokens of {num_tokens}")
        return
    cut_after = rng.randint(1, num_tokens) if rng.random() < 1 / 3 else None
    received = 0
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = to.completions.create(**request, stream=True, stream_options=options)
    for chunk in stream:
        received = chunk.usage.completion_tokens if chunk.usage else received
        if cut_after is not None and received >= cut_after:
            break
    if cut_after is not None and received < num_tokens:
        stream.close()
        tally.add(cut=1, prompt_tokens=length, asked=num_tokens)
        return
    stream.close()
    tally.add(finished=1, prompt_tokens=length, generated=received)
    if received != num_tokens:
        tally.lose(f"{received} tokens of {num_tokens} in a stream")


def run_clients(
    url: str, count: int, seed: int, until: Callable[[], bool], tally: Tally
) -> list[threading.Thread]:
    """Start clients that ask until they are told to stop."""

    def work(number: int) -> None:
        rng, to = random.Random(f"{seed} {number}"), client(url)
        while not until():
            try:
                ask(to, rng, tally)
            except Exception as error:  # any: each is a request lost
                tally.lose(f"{type(error).__name__}: {error}"[:300])
                time.sleep(0.5)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads
