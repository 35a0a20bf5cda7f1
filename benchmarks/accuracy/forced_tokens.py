"""Feeds given tokens to a model as decode steps: a logits processor that leaves it no choice.

A request's `extra_args={"forced_tokens": [...]}` become its first output tokens; what follows is
the model's own. vLLM takes log-probabilities from the logits as they were before
(`logprobs_mode="raw_logprobs"`, its default), so they tell what the model thought of each token.

The number of tokens that a request has been given so far says which is next. The V2 model runner
keeps it on the device; the V1 runner keeps each request's list of output tokens, whose length is
right even while asynchronous scheduling has yet to fill its last entry in.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

FIELD = "forced_tokens"


@dataclass
class _Forced:
    """One request of the V1 runner."""

    tokens: list[int]
    output: list[int]
    """The request's output tokens so far; vLLM appends to it."""


class ForcedTokens(V2LogitsProcessor, V1LogitsProcessor):
    """Gives every token but the forced one a probability of 0."""

    def __init__(self, vllm_config: VllmConfig, *runner: Any) -> None:
        self._by_row: dict[int, _Forced] = {}
        if vllm_config.use_v2_model_runner:
            (self._requests,) = runner
            shape = (self._requests.max_num_reqs, vllm_config.model_config.max_model_len)
            self._tokens = torch.zeros(shape, dtype=torch.int32, device=self._requests.device)
            self._num_tokens = torch.zeros(
                shape[0], dtype=torch.int32, device=self._requests.device
            )

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse anything but a list of token ids."""
        tokens = (sampling_params.extra_args or {}).get(FIELD, [])
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError(f"{FIELD} is {tokens!r}; expected a list of token ids")

    def is_argmax_invariant(self) -> bool:
        """Forcing is nothing but a change of the argmax."""
        return False

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2 runner: a request takes a slot."""
        tokens = (sampling_params.extra_args or {}).get(FIELD, [])
        self._num_tokens[req_idx] = len(tokens)
        self._tokens[req_idx, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        return bool(tokens)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1 runner: requests leave, arrive and move, in this order."""
        if batch_update is None:
            return
        rows = self._by_row
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, _, output in batch_update.added:
            rows.pop(row, None)
            tokens = (params.extra_args or {}).get(FIELD)
            if tokens:
                rows[row] = _Forced(tokens, output)
        for source, target, direction in batch_update.moved:
            moved, replaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                rows[source] = replaced

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Force the next token of every row that has one; `logits` is `[num_rows, vocabulary]`."""
        return self._apply_v1(logits) if ctx is None else self._apply_v2(logits, ctx)

    def _apply_v1(self, logits: Tensor) -> Tensor:
        forced = {
            row: request.tokens[len(request.output)]
            for row, request in self._by_row.items()
            if len(request.output) < len(request.tokens)
        }
        if forced:
            rows, tokens = torch.tensor([list(forced), list(forced.values())]).to(logits.device)
            logits[rows] = -math.inf
            logits[rows, tokens] = 0
        return logits

    def _apply_v2(self, logits: Tensor, ctx: Any) -> Tensor:
        # Nothing here waits for the device.
        slots = ctx.expanded_idx_mapping
        step = ctx.pos + 1 - self._requests.prompt_len.gpu[slots]
        is_forced = (step >= 0) & (step < self._num_tokens[slots])
        step = step.clamp(0, self._tokens.shape[1] - 1)
        token = self._tokens[slots, step].long()[:, None]
        value = torch.where(is_forced[:, None], 0.0, logits.gather(1, token))
        return logits.masked_fill_(is_forced[:, None], -math.inf).scatter_(1, token, value)
