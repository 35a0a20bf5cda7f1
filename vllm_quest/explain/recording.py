"""Watches QUEST's layers while one request decodes: the pages read, and the true attention mass."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_quest import kv_page
from vllm_quest.config import Score


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

    def of_heads(self, heads: list[int]) -> "LayerRecord":
        """The record of some KV heads."""
        parts = (self.read, self.mass, self.held, self.best)
        return LayerRecord(*(part[:, heads] for part in parts))


@dataclass(frozen=True)
class _Step:
    read: np.ndarray  # [num_kv_heads, num_pages] bool
    mass: np.ndarray  # [num_kv_heads, num_pages] fp16
    held: np.ndarray  # [num_kv_heads, group_size] fp32
    best: np.ndarray  # [num_kv_heads, group_size] fp32


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
                mass = page_mass(
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
                step = _weigh(mass, selected, impl.num_kv_heads)
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


def page_mass(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_len: int,
    *,
    page_size: int,
    scale: float,
    soft_cap: float,
    score: Score = "minmax",
) -> Tensor:
    """The attention that each page of a context holds, over all of its tokens.

    Args:
        query: `[num_heads, head_size]`, one row's.
        kv_cache: see `ops`.
        block_table: `[max_blocks]` int32, one row's.
        seq_len: tokens.
        page_size: tokens per page.
        scale: factor of q·k.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0 for none.
        score: what the cache's pages are scored by.

    Returns:
        `[num_heads, num_pages]` fp32, each row of sum 1.
    """
    num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    block_tokens = kv_page.block_tokens(kv_cache, page_size, score)
    blocks = block_table[: -(-seq_len // block_tokens)].long()
    num_pages = -(-seq_len // page_size)
    mass = torch.empty(num_heads, num_pages, device=query.device)
    groups = zip(query.chunk(num_kv_heads), mass.chunk(num_kv_heads), strict=True)
    # One KV head at a time: a long context's keys in fp32 are large.
    for head, (group_query, group_mass) in enumerate(groups):
        keys = kv_cache[blocks, head, :block_tokens, :head_size].flatten(0, 1)[:seq_len]
        logits = group_query.float() @ keys.float().T * scale
        if soft_cap > 0:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        weights = torch.softmax(logits, dim=-1)
        padding = num_pages * page_size - seq_len
        padded = torch.nn.functional.pad(weights, (0, padding))
        group_mass.copy_(padded.view(-1, num_pages, page_size).sum(dim=-1))
    return mass


def _weigh(mass: Tensor, pages: Tensor, num_kv_heads: int) -> _Step:
    """Compare pages, `[num_kv_heads, num_selected]`, with the mass, `[num_heads, num_pages]`."""
    by_group = mass.view(num_kv_heads, -1, mass.shape[1])  # [num_kv_heads, group_size, num_pages]
    mean = by_group.mean(dim=1)
    selected = pages.long()
    most = mean.topk(selected.shape[1]).indices
    read = torch.zeros_like(mean, dtype=torch.bool).scatter_(1, selected, True)
    return _Step(
        read=read.cpu().numpy(),
        mass=mean.half().cpu().numpy(),
        held=_mass_in(by_group, selected),
        best=_mass_in(by_group, most),
    )


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
    )
