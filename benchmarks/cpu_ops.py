"""Times the CPU operators for one decode step of one layer, beside vLLM's CPU_ATTN.

Layers are visited in turn, so that, as in a model, a layer's pages have left the CPU's caches when
it comes around again. Prints the median over calls, in µs per layer: quest = score + select +
sparse_decode; dense = sparse_decode without a budget. With `codes`, a write at a context that is a
multiple of 128 tokens codes a group.

    python benchmarks/cpu_ops.py --threads 1 --contexts 1024 32768
    python benchmarks/cpu_ops.py --scores minmax codes --contexts 8192
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from report import print_as_measured, print_machine, write_json
from vllm_quest import layout, ops
from vllm_quest.config import SCORES, Score

LAYERS = 40  # a stage reads some 2 MiB of a layer: together more than a last-level cache holds
MAX_BYTES = 4 << 30


@dataclass(frozen=True)
class Shape:
    rows: int
    context_tokens: int
    budget_tokens: int
    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    block_tokens: int
    dtype: torch.dtype
    score: Score

    @property
    def blocks(self) -> int:
        return self.rows * -(-self.context_tokens // self.block_tokens)

    @property
    def row_bytes(self) -> int:
        """Of one token's key and value, or of one page's bounds, for all KV heads."""
        return 2 * self.kv_heads * self.head_size * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        return self.rows * self.context_tokens * self.row_bytes

    @property
    def quest_bytes(self) -> float:
        unit_tokens, unit_rows = layout.unit(self.page_size, self.score)
        scored = self.dense_bytes * unit_rows / unit_tokens
        return scored + self.rows * min(self.context_tokens, self.budget_tokens) * self.row_bytes


class Step:
    """The arguments of one decode step, with enough layers to keep every cache cold."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        layers = max(2, min(LAYERS, MAX_BYTES // shape.dense_bytes))
        block_rows = layout.block_rows(shape.block_tokens, shape.page_size, shape.score)
        first = torch.randn(
            shape.blocks, shape.kv_heads, block_rows, 2 * shape.head_size, dtype=shape.dtype
        )
        keys = first[:, :, : shape.block_tokens, : shape.head_size].transpose(1, 2).flatten(0, 1)
        self._write(keys, first, torch.arange(len(keys)))
        self.caches = [first] + [first.clone() for _ in range(layers - 1)]
        block_table = torch.randperm(shape.blocks).to(torch.int32).view(shape.rows, -1).contiguous()
        seq_lens = torch.full((shape.rows,), shape.context_tokens, dtype=torch.int32)
        budget_pages = -(-shape.budget_tokens // shape.page_size)
        self.rows = ops.Rows(block_table, seq_lens, torch.full_like(seq_lens, budget_pages))
        unlimited = torch.full_like(seq_lens, ops.UNLIMITED_PAGES)
        self.dense_rows = ops.Rows(block_table, seq_lens, unlimited)
        self.query = torch.randn(shape.rows, shape.heads, shape.head_size, dtype=shape.dtype)
        self.out = torch.empty_like(self.query)
        max_pages = block_table.shape[1] * shape.block_tokens // shape.page_size
        mass_columns = layout.mass_columns(max_pages, shape.page_size)
        self.masses = torch.zeros(shape.rows, shape.heads, mass_columns)
        self.scores = torch.zeros(shape.rows, shape.kv_heads, max_pages)
        self.pages = torch.zeros(shape.rows, shape.kv_heads, budget_pages, dtype=torch.int32)
        self.key = torch.randn(shape.rows, shape.kv_heads, shape.head_size, dtype=shape.dtype)
        last = shape.context_tokens - 1
        self.slots = (
            block_table[:, last // shape.block_tokens].long() * shape.block_tokens
            + last % shape.block_tokens
        )

    def write_kv(self, cache: Tensor) -> None:
        self._write(self.key, cache, self.slots)

    def _write(self, key: Tensor, cache: Tensor, slots: Tensor) -> None:
        shape = self.shape
        ops.write_kv(key, key, cache, slots, page_size=shape.page_size, score=shape.score)

    def score(self, cache: Tensor) -> None:
        page_size = self.shape.page_size
        if self.shape.score == "codes":
            ops.score_codes(
                self.query,
                cache,
                self.rows,
                self.masses,
                self.scores,
                page_size=page_size,
                scale=self.shape.head_size**-0.5,
            )
        else:
            ops.score(self.query, cache, self.rows, self.scores, page_size=page_size)

    def select(self, cache: Tensor) -> None:
        ops.select(self.scores, self.rows, self.pages, page_size=self.shape.page_size)

    def sparse_decode(self, cache: Tensor) -> None:
        self._attend(cache, self.rows)

    def dense_decode(self, cache: Tensor) -> None:
        self._attend(cache, self.dense_rows)

    def _attend(self, cache: Tensor, rows: ops.Rows) -> None:
        ops.sparse_decode(
            self.query,
            cache,
            rows,
            self.pages,
            self.out,
            page_size=self.shape.page_size,
            scale=self.shape.head_size**-0.5,
            score=self.shape.score,
        )

    def cpu_attn(self) -> Callable[[Tensor], None]:
        """vLLM's decode over the same memory; what the keys are does not change its speed."""
        shape = self.shape
        isa = _get_attn_isa(shape.dtype, shape.block_tokens, shape.head_size)
        starts = torch.arange(shape.rows + 1, dtype=torch.int32)
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=shape.rows,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_size,
            seq_lens=self.rows.seq_lens,
            dtype=shape.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

        def run(cache: Tensor) -> None:
            # Its own layout has no rows of bounds: block_tokens rows of keys, then of values.
            size = shape.kv_heads * shape.block_tokens * 2 * shape.head_size
            plain = cache.flatten()[: shape.blocks * size].view(
                shape.blocks, shape.kv_heads, 2 * shape.block_tokens, shape.head_size
            )
            key, value = plain.chunk(2, dim=2)
            vllm_ops.cpu_attention_with_kv_cache(
                query=self.query,
                key_cache=key,
                value_cache=value,
                output=self.out,
                query_start_loc=starts,
                seq_lens=self.rows.seq_lens,
                scale=shape.head_size**-0.5,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=self.rows.block_table,
                softcap=0.0,
                scheduler_metadata=metadata,
                s_aux=None,
            )

        return run


def median_us(run: Callable[[Tensor], None], caches: list[Tensor], rounds: int) -> float:
    """Of one call on one layer. Each round visits every layer once; the first warms up."""
    times_us = []
    for _ in range(rounds + 1):
        for cache in caches:
            start = time.perf_counter()
            run(cache)
            times_us.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times_us[len(caches) :])


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    step = Step(shape)
    stages = [step.write_kv, step.score, step.select, step.sparse_decode]
    write_us, *stages_us = (median_us(stage, step.caches, rounds) for stage in stages)
    quest_us = sum(stages_us)
    dense_us = median_us(step.dense_decode, step.caches, rounds)
    cpu_attn_us = median_us(step.cpu_attn(), step.caches, rounds)
    return {
        "rows": shape.rows,
        "context": shape.context_tokens,
        "score": shape.score,
        "budget": shape.budget_tokens,
        "write_kv µs": write_us,
        **{f"{stage.__name__} µs": us for stage, us in zip(stages[1:], stages_us, strict=True)},
        "quest µs": quest_us,
        "quest GB/s": shape.quest_bytes / quest_us / 1e3,
        "dense µs": dense_us,
        "CPU_ATTN µs": cpu_attn_us,
        "CPU_ATTN GB/s": shape.dense_bytes / cpu_attn_us / 1e3,
        "CPU_ATTN / quest": cpu_attn_us / quest_us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768, 61440])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=["minmax"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[2048], metavar="TOKENS")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--block-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    print_machine()
    print(
        f"{torch.ops.vllm_quest.cpu_isas().split()[0]}; {args.dtype}, heads "
        f"{args.heads}/{args.kv_heads} of {args.head_size}, page {args.page_size}, "
        f"block {args.block_tokens}"
    )
    rows = print_as_measured(
        measure(
            Shape(
                rows=args.rows,
                context_tokens=context_tokens,
                budget_tokens=budget_tokens,
                heads=args.heads,
                kv_heads=args.kv_heads,
                head_size=args.head_size,
                page_size=args.page_size,
                block_tokens=args.block_tokens,
                dtype=getattr(torch, args.dtype),
                score=score,
            ),
            args.rounds,
        )
        for context_tokens, budget_tokens, score in itertools.product(
            args.contexts, args.budgets, args.scores
        )
    )
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
