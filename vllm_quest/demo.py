"""`vllm-quest demo`: a real server, the bundled model, pass keys in a long text, three budgets."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tqdm import tqdm

from vllm_quest.budgets import FIELD
from vllm_quest.config import UNLIMITED, QuestConfig
from vllm_quest.pass_keys import CODE_WORDS, Fact, Haystack, make_haystack

MODEL = Path(__file__).parent / "demo_model"
START_LIMIT_S = 240
TOKENS_PER_FACT = 128
TOKENS_PER_ANSWER = 32
SETTINGS = QuestConfig(dense_layers=0)
"""All layers of the bundled model are sparse, so that all of them show what QUEST does."""

CLOSING = """
With a model of your own:

  vllm serve MODEL --attention-backend QUEST \\
      --additional-config '{"quest": {"token_budget": 1024}}'
"""


@dataclass
class Outcome:
    """What one budget brought."""

    token_budget: int
    right: int = 0
    asked: int = 0
    ms_per_token: list[float] = field(default_factory=list)
    """One mean per answer: tokens that arrive together hide the gaps between them."""


def run_demo(*, context_tokens: int, num_questions: int, budgets: list[int], seed: int) -> int:
    """Serve, ask, print the table. Returns the exit status."""
    num_facts = max(num_questions, context_tokens // TOKENS_PER_FACT)
    haystack = make_haystack(context_tokens, num_facts, seed=seed)
    asked = haystack.facts[:: num_facts // num_questions][:num_questions]
    outcomes = [Outcome(budget) for budget in (UNLIMITED, *budgets)]

    print(f"{len(asked)} pass keys among {num_facts}, hidden in {haystack.num_tokens} tokens:")
    print(f"  ... {asked[0].sentence} ...")
    with (
        _server() as url,
        tqdm(
            total=len(outcomes) * len(asked) + 1, unit="answer", desc="Reading the text"
        ) as progress,
    ):
        # The text is read once: every question finds it in the prefix cache.
        _ask(url, haystack, asked[0], UNLIMITED)
        progress.update()
        for outcome in outcomes:
            progress.set_description(f"Asking, {_budget_name(outcome.token_budget)}")
            for fact in asked:
                answer, ms_per_token = _ask(url, haystack, fact, outcome.token_budget)
                outcome.asked += 1
                outcome.right += answer == fact.code
                outcome.ms_per_token.append(ms_per_token)
                progress.update()
    _print_table(outcomes, haystack.num_tokens)
    print(CLOSING, end="")
    return 0


def kv_share(token_budget: int, context_tokens: int, page_size: int) -> float:
    """The share of a context's key and value bytes that a sparse decode step reads.

    Bounds are one row of key|value size per page; then come the selected pages.
    """
    if token_budget == UNLIMITED or token_budget >= context_tokens:
        return 1.0
    return 1 / page_size + token_budget / context_tokens


def _budget_name(token_budget: int) -> str:
    return "full attention" if token_budget == UNLIMITED else f"budget {token_budget}"


def _print_table(outcomes: list[Outcome], context_tokens: int) -> None:
    print(f"\n{'':<16}{'answers right':>15}{'ms per token':>15}{'KV bytes read':>15}")
    for outcome in outcomes:
        share = kv_share(outcome.token_budget, context_tokens, SETTINGS.page_size)
        print(
            f"{_budget_name(outcome.token_budget):<16}"
            f"{f'{outcome.right} of {outcome.asked}':>15}"
            f"{median(outcome.ms_per_token):>15.1f}"
            f"{share:>15.1%}"
        )


def _ask(url: str, haystack: Haystack, fact: Fact, token_budget: int) -> tuple[str, float]:
    """Ask for one pass key, streaming. Returns the answer and the ms per output token."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=str(MODEL),
        messages=[{"role": "user", "content": haystack.prompt(fact)}],
        temperature=0,
        max_tokens=TOKENS_PER_ANSWER,
        stream=True,
        # Going on past the answer gives the clock something to measure.
        extra_body={"ignore_eos": True, "vllm_xargs": {FIELD: token_budget}},
    )
    text, first_s, last_s = "", None, 0.0
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
            last_s = time.perf_counter()
            first_s = first_s or last_s
    answer = " ".join(text.split()[:CODE_WORDS])
    return answer, 1e3 * (last_s - (first_s or last_s)) / (TOKENS_PER_ANSWER - 1)


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """Run `vllm serve` on the bundled model; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)),
        *("--attention-backend", "QUEST"),
        *("--additional-config", json.dumps({"quest": {"dense_layers": SETTINGS.dense_layers}})),
        *("--host", "127.0.0.1", "--port", str(port)),
        "--enforce-eager",
    ]
    print("\nStarting: vllm serve", *command[4:])
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    with tempfile.NamedTemporaryFile("w+", prefix="vllm-quest-demo-", suffix=".log") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _wait_until_ready(server, f"http://127.0.0.1:{port}", Path(log.name))
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    with tqdm(bar_format="{desc} {elapsed}", desc="Waiting for the server") as clock:
        for _ in range(START_LIMIT_S * 2):
            if server.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/health", timeout=1)
                return
            time.sleep(0.5)
            clock.refresh()
    last_lines = "\n".join(log.read_text().splitlines()[-30:])
    raise SystemExit(f"{last_lines}\n\nThe server did not start; its last lines are above.")
