"""Watches QUEST's layers while one request decodes: the pages read, and the true attention mass."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_quest import kv_page
from vllm_quest.config import GROUP_TOKENS, Score


@dataclass(frozen=True)
class LayerRecord:
    """One layer over the decode steps of a request.

    *Mass* is the softmax of the true q·k over the whole context, in fp32, summed over each page.
    """

    read: np.ndarray
    """[num_steps, num_kv_heads, num_pages] bool: the pages selected; none past a step's context."""

    mass: np.ndarray
    """[num_steps, num_kv_heads, num_pages] fp16: mean over the query heads of a KV head."""

    held: np.ndarray
    """[num_steps, num_kv_heads, group_size] fp32: each query head's mass in the pages selected."""

    best: np.ndarray
    """[num_steps, num_kv_heads, group_size] fp32: in as many pages, those of the most mass."""

    error: np.ndarray
    """[num_steps, num_kv_heads, 2] fp32: mean and standard deviation of `score_errors` over the
    pages; NaN where no page has an estimate."""

    def of_heads(self, heads: list[int]) -> "LayerRecord":
        """The record of some KV heads."""
        parts = (self.read, self.mass, self.held, self.best, self.error)
        return LayerRecord(*(part[:, heads] for part in parts))


@dataclass(frozen=True)
class _Step:
    read: np.ndarray  # [num_kv_heads, num_pages] bool
    mass: np.ndarray  # [num_kv_heads, num_pages] fp16
    held: np.ndarray  # [num_kv_heads, group_size] fp32
    best: np.ndarray  # [num_kv_heads, group_size] fp32
    error: np.ndarray  # [num_kv_heads, 2] fp32


@dataclass(frozen=True)
class Truth:
    """What the pages of a row are worth to each query head, by all of their keys."""

    log_mass: Tensor
    """[num_heads, num_pages] fp32: natural logarithm of the page's share of the attention."""

    largest: Tensor
    """[num_heads, num_pages] fp32: the largest scaled q·k of the page, before any soft cap."""


class Recorder:
    """Records the decode steps of one request; the engine must run in this process, eagerly."""

    def __init__(self, prompt_tokens: int, layers: dict[str, int]) -> None:
        """`layers`: the numbers of those to record, by their names in vLLM."""
        self.prompt_tokens = prompt_tokens
        self.layers = layers
        self._steps: dict[int, dict[int, _Step]] = {number: {} for number in layers.values()}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the steps that run inside of the context."""
        from vllm_quest.impl import QuestImpl
        from vllm_quest.ops import Rows

        choose = QuestImpl.chooser

        def choose_and_record(
            impl: QuestImpl,
            layer: Any,
            query: Tensor,
            kv_cache: Tensor,
            rows: Rows,
            scores: Tensor,
            pages: Tensor,
        ) -> None:
            choose(impl, layer, query, kv_cache, rows, scores, pages)
            number = self.layers.get(layer.layer_name)
            # A prompt's last token can be a row too; it is attended in full.
            seq_len = int(rows.seq_lens[0])
            if number is not None and seq_len > self.prompt_tokens:
                truth = page_truth(
                    query[0],
                    kv_cache,
                    rows.block_table[0],
                    seq_len,
                    page_size=impl.quest.page_size,
                    scale=impl.scale,
                    soft_cap=impl.soft_cap,
                    score=impl.quest.score,
                )
                selected = pages[0, :, : int(rows.budget_pages[0])]
                errors = score_errors(
                    scores[0],
                    truth,
                    seq_len,
                    page_size=impl.quest.page_size,
                    scale=impl.scale,
                    score=impl.quest.score,
                )
                step = _weigh(truth.log_mass.exp(), selected, errors)
                self._steps[number][seq_len - self.prompt_tokens - 1] = step

        with QuestImpl.choosing(choose_and_record):
            yield

    def records(self, num_steps: int) -> dict[int, LayerRecord]:
        """The first steps of every layer that was sparse, by the layer's number."""
        return {
            layer: _stack([steps[step] for step in range(num_steps)])
            for layer, steps in self._steps.items()
            if steps
        }


def page_truth(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_len: int,
    *,
    page_size: int,
    scale: float,
    soft_cap: float,
    score: Score = "minmax",
) -> Truth:
    """What each page of a context is worth.

    Args:
        query: `[num_heads, head_size]`, one row's.
        kv_cache: see `ops`.
        block_table: `[max_blocks]` int32, one row's.
        seq_len: tokens.
        page_size: tokens per page.
        scale: factor of q·k.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0 for none.
        score: what the cache's pages are scored by.
    """
    num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    block_tokens = kv_page.block_tokens(kv_cache, page_size, score)
    blocks = block_table[: -(-seq_len // block_tokens)].long()
    num_pages = -(-seq_len // page_size)
    log_mass = torch.empty(num_heads, num_pages, device=query.device)
    largest = torch.empty_like(log_mass)
    groups = zip(*(x.chunk(num_kv_heads) for x in (query, log_mass, largest)), strict=True)
    # One KV head at a time: a long context's keys in fp32 are large.
    for head, (group_query, group_mass, group_largest) in enumerate(groups):
        keys = kv_cache[blocks, head, :block_tokens, :head_size].flatten(0, 1)[:seq_len]
        logits = group_query.float() @ keys.float().T * scale
        group_largest.copy_(_by_page(logits, page_size).amax(dim=-1))
        if soft_cap > 0:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        total = logits.logsumexp(dim=-1, keepdim=True)
        group_mass.copy_(_by_page(logits, page_size).logsumexp(dim=-1) - total)
    return Truth(log_mass, largest)


def _by_page(logits: Tensor, page_size: int) -> Tensor:
    """`[num_heads, seq_len]` as `[num_heads, num_pages, page_size]`, filled up with -inf."""
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[1] % page_size), value=-math.inf)
    return padded.view(len(logits), -1, page_size)


def score_errors(
    scores: Tensor,
    truth: Truth,
    seq_len: int,
    *,
    page_size: int,
    scale: float,
    score: Score,
) -> Tensor:
    """By how much pages' scores exceed what they stand for, in logits.

    That is, over the query heads of a KV head, the largest q·k of the page for bounds, and the
    largest logarithm of the page's share of the attention for codes. Pages of a group that is not
    full have no codes and are left out.

    Args:
        scores: `[num_kv_heads, >= num_pages]` fp32, one row's, from `ops.score` or
            `ops.score_codes`.
        truth: the row's.
        seq_len: tokens.
        page_size: tokens per page.
        scale: factor of q·k.
        score: what pages are scored by.

    Returns:
        `[num_kv_heads, pages that have an estimate]` fp32.
    """
    is_coded = score == "codes"
    meant = truth.log_mass if is_coded else truth.largest
    num_pages = seq_len // GROUP_TOKENS * GROUP_TOKENS // page_size if is_coded else meant.shape[1]
    by_group = meant.view(len(scores), -1, meant.shape[1]).amax(dim=1)
    unit = math.log(2) if is_coded else scale
    return scores[:, :num_pages] * unit - by_group[:, :num_pages]


def _weigh(mass: Tensor, pages: Tensor, errors: Tensor) -> _Step:
    """Compare pages, `[num_kv_heads, num_selected]`, with the mass, `[num_heads, num_pages]`."""
    by_group = mass.view(len(pages), -1, mass.shape[1])  # [num_kv_heads, group_size, num_pages]
    mean = by_group.mean(dim=1)
    selected = pages.long()
    most = mean.topk(selected.shape[1]).indices
    read = torch.zeros_like(mean, dtype=torch.bool).scatter_(1, selected, True)
    return _Step(
        read=read.cpu().numpy(),
        mass=mean.half().cpu().numpy(),
        held=_mass_in(by_group, selected),
        best=_mass_in(by_group, most),
        error=_mean_and_deviation(errors),
    )


def _mean_and_deviation(errors: Tensor) -> np.ndarray:
    """Of each KV head: `[num_kv_heads, 2]` fp32."""
    if errors.shape[1] == 0:
        return np.full((len(errors), 2), np.nan, np.float32)
    both = torch.stack([errors.mean(dim=1), errors.std(dim=1, correction=0)], dim=1)
    found: np.ndarray = both.cpu().numpy()
    return found


def _mass_in(by_group: Tensor, pages: Tensor) -> np.ndarray:
    """The share in the pages: `[num_kv_heads, group_size]` fp32."""
    lists = pages[:, None].expand(-1, by_group.shape[1], -1)
    held: np.ndarray = by_group.gather(2, lists).sum(dim=-1).cpu().numpy()
    return held


def _stack(steps: list[_Step]) -> LayerRecord:
    """Join the steps; earlier ones have fewer pages and are filled up."""
    num_pages = max(step.read.shape[1] for step in steps)

    def fill(part: np.ndarray) -> np.ndarray:
        return np.pad(part, ((0, 0), (0, num_pages - part.shape[1])))

    return LayerRecord(
        read=np.stack([fill(step.read) for step in steps]),
        mass=np.stack([fill(step.mass) for step in steps]),
        held=np.stack([step.held for step in steps]),
        best=np.stack([step.best for step in steps]),
        error=np.stack([step.error for step in steps]),
    )
