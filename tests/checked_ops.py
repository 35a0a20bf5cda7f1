"""Operators that check themselves against the reference, on the real cache of a running engine."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from batch import UNIT_ROUNDOFF, decode_error, score_error
from vllm_quest import ops, reference

REAL = {
    name: getattr(ops, name)
    for name in ("write_kv", "score", "select", "sparse_decode", "cluster_decode")
}


@dataclass
class Checked:
    """How many calls agreed, those of `write_kv` apart."""

    writes: int = 0
    decodes: int = 0
    """Of `sparse_decode` and `cluster_decode`, with rows over their budget."""


@contextlib.contextmanager
def check_operators() -> Iterator[Checked]:
    """Let every call of an operator fail that disagrees with the reference.

    CUDA graphs would not see it.
    """
    checked = Checked()

    def write_kv(key, value, kv_cache, slots, *, page_size, score):
        block_tokens = reference.tokens_per_block(kv_cache, page_size)
        slots_on_host = slots.cpu()[: len(key)]
        written = slots_on_host[slots_on_host >= 0]
        blocks, place = torch.unique(written // block_tokens, return_inverse=True)
        expected = kv_cache[blocks.to(kv_cache.device)].cpu()
        REAL["write_kv"](key, value, kv_cache, slots, page_size=page_size, score=score)
        reference.write_kv(
            key.cpu()[: len(slots_on_host)][slots_on_host >= 0],
            value.cpu()[: len(slots_on_host)][slots_on_host >= 0],
            expected,
            place * block_tokens + written % block_tokens,
            page_size=page_size,
            score=score,
        )
        assert torch.equal(kv_cache[blocks.to(kv_cache.device)].cpu(), expected)
        checked.writes += 1

    def score(query, kv_cache, rows, scores, *, page_size):
        REAL["score"](query, kv_cache, rows, scores, page_size=page_size)
        small = Small.of(query, kv_cache, rows, page_size)
        expected = scores.cpu()
        reference.score(small.query, small.kv_cache, small.rows, expected, page_size=page_size)
        for row in small.over_budget():
            pages = reference.num_pages(int(small.rows.seq_lens[row]), page_size)
            difference = (scores[row, :, :pages].cpu() - expected[row, :, :pages]).abs().max()
            assert difference <= score_error(small)

    def select(scores, rows, pages, *, page_size, **kept):
        before = pages.cpu()
        REAL["select"](scores, rows, pages, page_size=page_size, **kept)
        reference.select(scores.cpu(), on_host(rows), before, page_size=page_size, **kept)
        assert torch.equal(pages.cpu(), before)

    def sparse_decode(query, kv_cache, rows, pages, out, **options):
        REAL["sparse_decode"](query, kv_cache, rows, pages, out, **options)
        check_output(query, kv_cache, rows, pages, out, **options)

    def cluster_decode(query, kv_cache, rows, out, *, page_size, **options):
        REAL["cluster_decode"](query, kv_cache, rows, out, page_size=page_size, **options)
        num_rows, num_kv_heads = len(rows), kv_cache.shape[1]
        block_tokens = reference.tokens_per_block(kv_cache, page_size)
        max_pages = rows.block_table.shape[1] * block_tokens // page_size
        scores = torch.empty(num_rows, num_kv_heads, max_pages, device=query.device)
        pages = torch.zeros_like(scores, dtype=torch.int32)
        score(query, kv_cache, rows, scores, page_size=page_size)
        kept = {name: value for name, value in options.items() if name.startswith("keep_")}
        select(scores, rows, pages, page_size=page_size, **kept)
        check_output(query, kv_cache, rows, pages, out, page_size=page_size, **options)

    def check_output(query, kv_cache, rows, pages, out, *, page_size, scale, soft_cap=0.0, **_):
        small = Small.of(query, kv_cache, rows, page_size, scale, soft_cap)
        exact = small.attention(pages.cpu())
        limit = decode_error(small, exact)
        if query.is_cuda:
            # Its kernels round weights to the cache's dtype before they multiply values, and then
            # outputs that are off by as much (csrc/cuda/attention.cuh, `weigh`).
            u = UNIT_ROUNDOFF[query.dtype]
            magnitudes = replace(small, kv_cache=small.kv_cache.clone())
            magnitudes.kv_cache[..., query.shape[-1] :].abs_()
            limit = (1 + u) * (limit + u * magnitudes.attention(pages.cpu()))
        assert ((out.cpu().double() - exact).abs() <= limit).all()
        checked.decodes += bool(small.over_budget())

    checks = (write_kv, score, select, sparse_decode, cluster_decode)
    with mock.patch.multiple(ops, **{check.__name__: check for check in checks}):
        yield checked


def on_host(rows: ops.Rows) -> ops.Rows:
    return ops.Rows(rows.block_table.cpu(), rows.seq_lens.cpu(), rows.budget_pages.cpu())


@dataclass(frozen=True)
class Small:
    """Decode rows on the host, with the blocks of the cache that they read and no others."""

    query: Tensor
    kv_cache: Tensor
    rows: ops.Rows
    page_size: int
    scale: float
    soft_cap: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        page_size: int,
        scale: float = 1.0,
        soft_cap: float = 0.0,
    ) -> "Small":
        rows = on_host(rows)
        block_tokens = reference.tokens_per_block(kv_cache, page_size)
        table = torch.zeros_like(rows.block_table)
        blocks: list[Tensor] = []
        for row, seq_len in enumerate(rows.seq_lens.tolist()):
            num_blocks = -(-seq_len // block_tokens)
            first = sum(map(len, blocks))
            table[row, :num_blocks] = torch.arange(first, first + num_blocks)
            blocks.append(rows.block_table[row, :num_blocks].long())
        cache = kv_cache[torch.cat(blocks).to(kv_cache.device)].cpu()
        rows = ops.Rows(table, rows.seq_lens, rows.budget_pages)
        return cls(query.cpu(), cache, rows, page_size, scale, soft_cap)

    def attention(self, pages: Tensor) -> Tensor:
        """What the reference makes of the selected pages, fp64."""
        out = torch.empty(self.query.shape, dtype=torch.float64)
        reference.sparse_decode(
            self.query,
            self.kv_cache,
            self.rows,
            pages,
            out,
            page_size=self.page_size,
            scale=self.scale,
            soft_cap=self.soft_cap,
        )
        return out

    def over_budget(self) -> list[int]:
        pages = -(-self.rows.seq_lens // self.page_size)
        return (pages > self.rows.budget_pages).nonzero().flatten().tolist()
