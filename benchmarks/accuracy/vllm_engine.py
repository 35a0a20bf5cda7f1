"""Answers inside vLLM: dense prefill, the question as forced decode steps, greedy decode.

One engine serves all budgets and questions: a request carries its budget, and the prefix cache
shares a material's keys and values. Requests are salted with their material, so that none ever
reads what another one decoded sparsely; decode graphs are off, since methods are swapped in Python.
"""

import gc
import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from benchmarks.accuracy.forced_tokens import FIELD as FORCED_FIELD
from benchmarks.accuracy.forced_tokens import ForcedTokens
from benchmarks.accuracy.interface import Answer, Prompt, ignore, quest_settings
from benchmarks.accuracy.selections import CHOICES, choosing
from vllm_quest.budgets import FIELD as BUDGET_FIELD
from vllm_quest.config import UNLIMITED

METHODS = tuple(CHOICES)
SWAPPED_METHODS = ("streaming", "oracle", "oracle-mass")
"""Methods that replace QUEST's choice of pages, which lives in the process of the model."""

CPU_KV_CACHE_BYTES = 2 << 30
TOKENS_PER_PROGRESS = 16
"""A request tells of its progress after so many tokens."""

FLOOR_PROMPTS = 4
"""Prompts that run at once, at most, in full attention's second computation."""


class VllmEngine:
    """A model in vLLM under QUEST's backend; an `interface.Engine`."""

    def __init__(
        self,
        model: str,
        *,
        dense_layers: int,
        score: str = "minmax",
        max_model_len: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Start it.

        Args:
            model: path or name.
            dense_layers: layers at the front that attend in full under every method.
            score: QUEST's page score.
            max_model_len: tokens of the longest prompt, answer included.
            options: further arguments of `vllm.LLM`; of its `additional_config` the part `quest`.
                With another `attention_backend` than QUEST, full attention alone.
        """
        options = dict(options or {})
        quest = quest_settings(options, score) | {
            "dense_layers": dense_layers,
            "token_budget": UNLIMITED,
        }
        options.pop("additional_config", None)
        self._backend = options.pop("attention_backend", "QUEST")
        defaults: dict[str, Any] = {"max_num_seqs": 256}
        if not torch.cuda.is_available():
            # fp32 leaves nothing to rounding.
            defaults = {
                "max_num_seqs": 16,
                "dtype": "float32",
                "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            }
        self._options = defaults | options
        self._llm = LLM(
            model,
            attention_backend=self._backend,
            additional_config={"quest": quest} if self._backend == "QUEST" else {},
            max_model_len=max_model_len,
            enable_prefix_caching=True,
            enforce_eager=True,
            logits_processors=[ForcedTokens],
            **self._options,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

    def run(
        self,
        prompts: Sequence[Prompt],
        method: str,
        token_budgets: Sequence[int],
        progress: Callable[[int], object] = ignore,
        answered: Callable[[int, Answer], object] = ignore,
    ) -> list[Answer]:
        """Answer prompts, in order; see `interface.Engine`."""
        if method in SWAPPED_METHODS and self._options.get("tensor_parallel_size", 1) > 1:
            raise NotImplementedError(
                f"{method} replaces code of the process that runs the model; "
                "tensor parallelism has several"
            )
        if self._backend != "QUEST" and method not in ("full", "floor"):
            raise NotImplementedError(f"{self._backend} has full attention alone, not {method}")
        engine = self._llm.llm_engine
        waiting = deque(enumerate(zip(prompts, token_budgets, strict=True)))
        # Twice what runs at once: others wait here, where they take no memory.
        max_begun = 2 * self._options["max_num_seqs"]
        if method == "floor":
            max_begun = max(1, min(FLOOR_PROMPTS, len(prompts) // 2))
        answers: dict[int, Answer] = {}
        computed = _Computed(prompts)
        with choosing(method):
            while waiting or engine.has_unfinished_requests():
                while waiting and engine.get_num_unfinished_requests() < max_begun:
                    number, (prompt, budget) = waiting.popleft()
                    (tokens,) = engine.renderer.render_cmpl([_tokens(prompt)])
                    engine.add_request(str(number), tokens, _sampling(prompt, budget))
                for output in engine.step():
                    number = int(output.request_id)
                    progress(computed.since_last(number, output))
                    if output.finished:
                        answers[number] = _answer(prompts[number], output)
                        answered(number, answers[number])
        return [answers[number] for number in range(len(prompts))]


class _Computed:
    """Counts a run's tokens, as `interface.num_tokens` does."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._by_request = [0] * len(prompts)
        self._read: set[tuple[int, ...]] = set()

    def since_last(self, number: int, output: RequestOutput) -> int:
        """Tokens of a request since its last output; an answer that ends early counts in full."""
        prompt = self._prompts[number]
        total = len(prompt.question) + prompt.max_answer_tokens
        now = total if output.finished else len(output.outputs[0].token_ids)
        fresh = now - self._by_request[number]
        self._by_request[number] = now
        if prompt.material not in self._read:
            self._read.add(prompt.material)
            fresh += len(prompt.material)
        return fresh


def _tokens(prompt: Prompt) -> TokensPrompt:
    material = array("q", prompt.material).tobytes()
    return TokensPrompt(
        prompt_token_ids=list(prompt.material), cache_salt=hashlib.sha256(material).hexdigest()
    )


def _sampling(prompt: Prompt, token_budget: int) -> SamplingParams:
    num_forced = len(prompt.question)
    return SamplingParams(
        temperature=0,
        max_tokens=num_forced + prompt.max_answer_tokens,
        min_tokens=num_forced,
        ignore_eos=prompt.max_answer_tokens == 0,
        logprobs=1,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE,
        stream_interval=TOKENS_PER_PROGRESS,
        extra_args={FORCED_FIELD: list(prompt.question), BUDGET_FIELD: token_budget},
    )


def _answer(prompt: Prompt, result: RequestOutput) -> Answer:
    output = result.outputs[0]
    tokens = tuple(output.token_ids)
    num_forced = len(prompt.question)
    if tokens[:num_forced] != prompt.question:
        raise RuntimeError(
            f"vLLM was to be fed {prompt.question[:8]}..., but fed itself {tokens[:8]}...; is a "
            "logits processor missing?"
        )
    has_end = output.finish_reason == "stop"
    assert output.logprobs is not None
    entries = output.logprobs[:num_forced]
    of_question = [entry[token] for entry, token in zip(entries, prompt.question, strict=True)]
    return Answer(
        tokens=tokens[num_forced : len(tokens) - has_end],
        question_logprobs=tuple(found.logprob for found in of_question),
        question_hits=tuple(found.rank == 1 for found in of_question),
        question_most_probable=tuple(
            min(entry, key=lambda token: entry[token].rank) for entry in entries
        ),
    )
