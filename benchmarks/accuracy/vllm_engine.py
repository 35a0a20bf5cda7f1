"""Answers inside vLLM: dense prefill, the question as forced decode steps, greedy decode.

One engine serves all budgets and questions: a request carries its budget, and the prefix cache
shares a material's keys and values. Requests are salted with their material, so that none ever
reads what another one decoded sparsely; decode graphs are off, since methods are swapped in Python.
"""

import gc
import hashlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.outputs import RequestOutput

from benchmarks.accuracy.forced_tokens import FIELD as FORCED_FIELD
from benchmarks.accuracy.forced_tokens import ForcedTokens
from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.selections import CHOICES, choosing
from vllm_quest.budgets import FIELD as BUDGET_FIELD
from vllm_quest.config import UNLIMITED

METHODS = tuple(CHOICES)
SWAPPED_METHODS = ("streaming", "oracle")
"""Methods that replace QUEST's choice of pages, which lives in the process of the model."""

CPU_KV_CACHE_BYTES = 2 << 30
PROMPTS_PER_PROGRESS = 2
"""Progress is reported after so many times the prompts that run at once."""


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
        """
        options = dict(options or {})
        quest: dict[str, Any] = options.pop("additional_config", {}).get("quest", {})
        quest = quest | {"dense_layers": dense_layers, "token_budget": UNLIMITED}
        if score != "minmax":
            quest["score"] = score
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
            attention_backend="QUEST",
            additional_config={"quest": quest},
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
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[Answer]:
        """Answer prompts, in order; see `interface.Engine`."""
        if method in SWAPPED_METHODS and self._options.get("tensor_parallel_size", 1) > 1:
            raise NotImplementedError(
                f"{method} replaces code of the process that runs the model; "
                "tensor parallelism has several"
            )
        answers: list[Answer] = []
        step = PROMPTS_PER_PROGRESS * self._options["max_num_seqs"]
        requests = list(zip(prompts, token_budgets, strict=True))
        with choosing(method):
            for first in range(0, len(requests), step):
                part = requests[first : first + step]
                results = self._llm.generate(
                    [_tokens(prompt) for prompt, _ in part],
                    [_sampling(prompt, budget) for prompt, budget in part],
                    use_tqdm=False,
                )
                for (prompt, _), result in zip(part, results, strict=True):
                    answers.append(_answer(prompt, result))
                progress(len(part))
        return answers


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
        logprobs=0,
        detokenize=False,
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
    of_question = [
        entry[token] for entry, token in zip(output.logprobs, prompt.question, strict=False)
    ]
    return Answer(
        tokens=tokens[num_forced : len(tokens) - has_end],
        question_logprobs=tuple(found.logprob for found in of_question),
        question_hits=tuple(found.rank == 1 for found in of_question),
    )
