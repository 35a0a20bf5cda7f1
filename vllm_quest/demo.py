"""`vllm-quest demo`: real servers, the bundled model, pass keys in a long text, three budgets."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from vllm_quest import layout
from vllm_quest.budgets import FIELD, requested_budget
from vllm_quest.config import UNLIMITED, QuestConfig, Score
from vllm_quest.pass_keys import CODE_WORDS, Fact, Haystack, make_haystack

MODEL = Path(__file__).parent / "demo_model"
START_LIMIT_S = 240
TOKENS_PER_FACT = 128
TOKENS_PER_ANSWER = 64
TOKENS_TO_WARM_UP = 8
TOKENS_BESIDE_TEXT = 128
"""Room for the question, the chat template and the answer."""
DECODE_SECONDS = "vllm:request_decode_time_seconds_sum"
SETTINGS = QuestConfig(dense_layers=0)
"""All layers of the bundled model are sparse, so that all of them show what QUEST does."""

CLOSING = """
With a model of your own:

  vllm serve MODEL --attention-backend QUEST \\
      --additional-config '{"quest": {"token_budget": 1024}}'
"""


@dataclass
class Outcome:
    """What one budget brought with one score of pages."""

    score: Score
    token_budget: int
    right: int = 0
    asked: int = 0
    ms_per_step: list[float] = field(default_factory=list)
    """Mean time of a decode step, one mean per answer."""

    @property
    def ms_per_token(self) -> float:
        """Of the fastest answer: what else runs on the machine only ever slows a step."""
        return min(self.ms_per_step)


def run_demo(
    *,
    context_tokens: int,
    num_questions: int,
    budgets: list[int],
    scores: list[Score],
    kv_cache_dtype: str,
    seed: int,
) -> int:
    """Serve with each score in turn, ask, print the table. Returns the exit status."""
    try:
        _check(context_tokens, num_questions, budgets)
        num_facts = max(num_questions, context_tokens // TOKENS_PER_FACT)
        haystack = make_haystack(context_tokens, num_facts, seed=seed)
    except ValueError as error:
        print(f"vllm-quest demo: {error}", file=sys.stderr)
        return 1
    # SIGTERM, which `timeout` sends, would else leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    asked = haystack.facts[:: num_facts // num_questions][:num_questions]
    full = Outcome(scores[0], UNLIMITED)
    outcomes = [full] + [Outcome(score, budget) for budget in budgets for score in scores]

    print(f"{len(asked)} pass keys among {num_facts}, hidden in {haystack.num_tokens} tokens:")
    print(f"  ... {asked[0].sentence} ...")
    for score in scores:
        of_score = [outcome for outcome in outcomes if outcome.score == score]
        _ask_all(haystack, asked, of_score, kv_cache_dtype)
    print(f"\n{table(outcomes, haystack.num_tokens)}")
    print(CLOSING, end="")
    return 0


def _check(context_tokens: int, num_questions: int, budgets: Sequence[int]) -> None:
    """Refuse what the server would refuse, before it is started.

    Raises:
        ValueError: an option's value, and what is allowed.
    """
    if num_questions < 1:
        raise ValueError(f"--questions is {num_questions}; allowed: a positive number")
    config = json.loads((MODEL / "config.json").read_text())
    longest = config["max_position_embeddings"] - TOKENS_BESIDE_TEXT
    if not 1 <= context_tokens <= longest:
        raise ValueError(f"--context is {context_tokens}; allowed: 1 to {longest}")
    for budget in budgets:
        requested_budget({FIELD: budget})


def _ask_all(
    haystack: Haystack, asked: Sequence[Fact], outcomes: Sequence[Outcome], kv_cache_dtype: str
) -> None:
    """Ask a server of its own for all facts, under the budgets of outcomes with one score."""
    num_answers = 1 + len(outcomes) * (1 + len(asked))
    server = _server(outcomes[0].score, kv_cache_dtype)
    with server as url, tqdm(total=num_answers, unit="answer") as progress:

        def ask(fact: Fact, token_budget: int, max_tokens: int) -> tuple[str, float]:
            progress.update()
            return _ask(url, haystack, fact, token_budget, max_tokens)

        progress.set_description("Reading the text")
        # The text is read once: every question finds it in the prefix cache.
        ask(asked[0], UNLIMITED, TOKENS_TO_WARM_UP)
        progress.set_description("Warming up")
        for outcome in outcomes:
            ask(asked[0], outcome.token_budget, TOKENS_TO_WARM_UP)
        progress.set_description("Asking")
        for fact in asked:
            # Budgets take turns: a slow minute of the machine is no budget's alone.
            for outcome in outcomes:
                answer, ms_per_step = ask(fact, outcome.token_budget, TOKENS_PER_ANSWER)
                outcome.asked += 1
                outcome.right += answer == fact.code
                outcome.ms_per_step.append(ms_per_step)


def kv_share(outcome: Outcome, context_tokens: int, page_size: int) -> float:
    """The share of a context's key and value bytes that a sparse decode step reads.

    First what all pages are scored by, in rows of key|value size; then the selected pages.
    """
    token_budget = outcome.token_budget
    if token_budget == UNLIMITED or token_budget >= context_tokens:
        return 1.0
    unit_tokens, unit_rows = layout.unit(page_size, outcome.score)
    return unit_rows / unit_tokens + token_budget / context_tokens


def _name(outcome: Outcome) -> str:
    if outcome.token_budget == UNLIMITED:
        return "full attention"
    return f"budget {outcome.token_budget}, {outcome.score}"


def table(outcomes: list[Outcome], context_tokens: int) -> str:
    """One line per budget and score. `speed` is relative to the first, full attention."""
    lines = [f"{'':<20}{'answers right':>15}{'ms per token':>15}{'speed':>10}{'KV bytes read':>16}"]
    for outcome in outcomes:
        share = kv_share(outcome, context_tokens, SETTINGS.page_size)
        lines.append(
            f"{_name(outcome):<20}"
            f"{f'{outcome.right} of {outcome.asked}':>15}"
            f"{outcome.ms_per_token:>15.1f}"
            f"{f'{outcomes[0].ms_per_token / outcome.ms_per_token:.1f}x':>10}"
            f"{share:>16.1%}"
        )
    return "\n".join(lines)


def _ask(
    url: str, haystack: Haystack, fact: Fact, token_budget: int, max_tokens: int
) -> tuple[str, float]:
    """Ask for one pass key. Returns the answer, and the mean ms of a decode step."""
    from openai import OpenAI

    before_s = _decode_seconds(url)
    completion = OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(
        model=str(MODEL),
        messages=[{"role": "user", "content": haystack.prompt(fact)}],
        temperature=0,
        max_tokens=max_tokens,
        # Going on past the answer gives the clock something to measure.
        extra_body={"ignore_eos": True, "vllm_xargs": {FIELD: token_budget}},
    )
    decode_s = _decode_seconds(url) - before_s
    answer = " ".join((completion.choices[0].message.content or "").split()[:CODE_WORDS])
    return answer, 1e3 * decode_s / (max_tokens - 1)


def _decode_seconds(url: str) -> float:
    """Seconds from first to last token, summed over the requests so far.

    These are the engine's own clock readings. A client is no judge: on two cores the engine leaves
    it little time, and tokens reach it in bursts.
    """
    with urllib.request.urlopen(f"{url}/metrics") as response:
        metrics = response.read().decode()
    values = re.findall(rf"^{DECODE_SECONDS}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, values))


@contextlib.contextmanager
def _server(score: Score, kv_cache_dtype: str) -> Iterator[str]:
    """Run `vllm serve` on the bundled model; yields its address."""
    quest = {"dense_layers": SETTINGS.dense_layers, "score": score}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        # -P: the working directory may have a vllm_quest of its own, such as a clone's unbuilt one.
        *(sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)),
        *("--attention-backend", "QUEST"),
        *("--additional-config", json.dumps({"quest": quest})),
        *("--kv-cache-dtype", kv_cache_dtype),
        *("--host", "127.0.0.1", "--port", str(port)),
        "--enforce-eager",
    ]
    print("\nStarting: vllm serve", shlex.join(command[5:]), flush=True)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    with tempfile.NamedTemporaryFile("w+", prefix="vllm-quest-demo-", suffix=".log") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _wait_until_ready(server, f"http://127.0.0.1:{port}", Path(log.name))
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
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
