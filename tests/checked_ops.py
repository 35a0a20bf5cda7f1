"""Operators that check themselves against the reference, on the real cache of a running engine."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from batch import (
    UNIT_ROUNDOFF,
    decode_error,
    rounding_of_the_query,
    score_codes_error,
    score_error,
)
from vllm_quest import ops, reference
from vllm_quest.config import GROUP_TOKENS, Score

REAL = {
    name: getattr(ops, name)
    for name in ("write_kv", "score", "score_codes", "select", "sparse_decode", "cluster_decode")
}


@dataclass
class Checked:
    """How many calls agreed, those of `write_kv` apart."""

    writes: int = 0
    fp8_writes: int = 0
    """Those of them to fp8 caches."""

    decodes: int = 0
    """Of `sparse_decode` and `cluster_decode`, with rows over their budget."""

    recoded: int = 0
    """Groups that a write of `write_kv` coded, after an earlier one had coded them."""


@contextlib.contextmanager
def check_operators() -> Iterator[Checked]:
    """Let every call of an operator fail that disagrees with the reference.

    CUDA graphs would not see it.
    """
    checked = Checked()
    coded: set[tuple[int, int]] = set()  # (layer's cache, group in it)

    def write_kv(key, value, kv_cache, slots, *, page_size, score, scales=None):
        block_tokens = reference.tokens_per_block(kv_cache, page_size, score)
        slots_on_host = slots.cpu()[: len(key)]
        written = slots_on_host[slots_on_host >= 0]
        blocks, place = torch.unique(written // block_tokens, return_inverse=True)
        expected = kv_cache[blocks.to(kv_cache.device)].cpu()
        settings = {"page_size": page_size, "score": score}
        REAL["write_kv"](key, value, kv_cache, slots, scales=scales, **settings)
        reference.write_kv(
            key.cpu()[: len(slots_on_host)][slots_on_host >= 0],
            value.cpu()[: len(slots_on_host)][slots_on_host >= 0],
            expected,
            place * block_tokens + written % block_tokens,
            scales=scales_on_host(scales),
            **settings,
        )
        found = kv_cache[blocks.to(kv_cache.device)].cpu()
        if score == "codes":  # not numbers, but bits
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
            for slot in written[written % GROUP_TOKENS == GROUP_TOKENS - 1].tolist():
                group = (kv_cache.data_ptr(), slot // GROUP_TOKENS)
                checked.recoded += group in coded
                coded.add(group)
        elif scales is not None:  # a bound of 0 may have either sign
            tokens = (slice(None), slice(None), slice(block_tokens))
            assert torch.equal(found.view(torch.uint8)[tokens], expected.view(torch.uint8)[tokens])
            assert torch.equal(found.double(), expected.double())
            checked.fp8_writes += 1
        else:
            assert torch.equal(found, expected)
        checked.writes += 1

    def score(query, kv_cache, rows, scores, *, page_size):
        REAL["score"](query, kv_cache, rows, scores, page_size=page_size)
        small = Small.of(query, kv_cache, rows, page_size)
        expected = copied(scores)
        reference.score(small.query, small.kv_cache, small.rows, expected, page_size=page_size)
        for row in small.over_budget():
            pages = reference.num_pages(int(small.rows.seq_lens[row]), page_size)
            difference = (scores[row, :, :pages].cpu() - expected[row, :, :pages]).abs().max()
            assert difference <= score_error(small)

    def score_codes(query, kv_cache, rows, masses, scores, *, page_size, scale, soft_cap=0.0):
        logits = {"page_size": page_size, "scale": scale, "soft_cap": soft_cap}
        REAL["score_codes"](query, kv_cache, rows, masses, scores, **logits)
        small = Small.of(query, kv_cache, rows, page_size, scale, soft_cap, "codes")
        expected = copied(scores)
        reference.score_codes(
            small.query, small.kv_cache, small.rows, copied(masses), expected, **logits
        )
        limit = score_codes_error(small)
        if query.is_cuda:
            limit += rounding_of_the_query(small)
        for row in small.over_budget():
            pages = reference.num_pages(int(small.rows.seq_lens[row]), page_size)
            found, wanted = scores[row, :, :pages].cpu(), expected[row, :, :pages]
            has_codes = wanted.abs() < 2.0**100
            assert torch.equal(found[~has_codes], wanted[~has_codes])
            assert ((found - wanted).abs()[has_codes] <= limit).all()

    def select(scores, rows, pages, *, page_size, **kept):
        expected = copied(pages)
        REAL["select"](scores, rows, pages, page_size=page_size, **kept)
        reference.select(scores.cpu(), on_host(rows), expected, page_size=page_size, **kept)
        assert torch.equal(pages.cpu(), expected)

    def sparse_decode(query, kv_cache, rows, pages, out, **options):
        REAL["sparse_decode"](query, kv_cache, rows, pages, out, **options)
        check_output(query, kv_cache, rows, pages, out, **options)

    def cluster_decode(query, kv_cache, rows, out, *, page_size, **options):
        REAL["cluster_decode"](query, kv_cache, rows, out, page_size=page_size, **options)
        num_rows, num_kv_heads = len(rows), kv_cache.shape[1]
        kind = options.get("score", "minmax")
        block_tokens = reference.tokens_per_block(kv_cache, page_size, kind)
        max_pages = rows.block_table.shape[1] * block_tokens // page_size
        scores = torch.empty(num_rows, num_kv_heads, max_pages, device=query.device)
        pages = torch.zeros_like(scores, dtype=torch.int32)
        if kind == "codes":
            logits = {name: options[name] for name in ("scale", "soft_cap")}
            masses = torch.empty_like(options["masses"])
            score_codes(query, kv_cache, rows, masses, scores, page_size=page_size, **logits)
        else:
            score(query, kv_cache, rows, scores, page_size=page_size)
        kept = {name: value for name, value in options.items() if name.startswith("keep_")}
        select(scores, rows, pages, page_size=page_size, **kept)
        check_output(query, kv_cache, rows, pages, out, page_size=page_size, **options)

    def check_output(query, kv_cache, rows, pages, out, *, page_size, scale, **options):
        soft_cap, score = options.get("soft_cap", 0.0), options.get("score", "minmax")
        sinks = options.get("sinks")
        scales = scales_on_host(options.get("scales"))
        small = Small.of(query, kv_cache, rows, page_size, scale, soft_cap, score, sinks, scales)
        exact = small.attention(pages.cpu())
        limit = decode_error(small, exact)
        if query.is_cuda:
            # Its kernels round weights to the model's dtype, with fp8 caches to fp16, before they
            # multiply values, and then outputs that are off by as much (csrc/cuda/attention.cuh,
            # `weigh`).
            u = UNIT_ROUNDOFF[query.dtype]
            magnitudes = replace(small, kv_cache=small.kv_cache.clone())
            magnitudes.kv_cache[..., query.shape[-1] :].abs_()
            limit = (1 + u) * (limit + u * magnitudes.attention(pages.cpu()))
        assert ((out.cpu().double() - exact).abs() <= limit).all()
        checked.decodes += bool(small.over_budget())

    checks = (write_kv, score, score_codes, select, sparse_decode, cluster_decode)
    with mock.patch.multiple(ops, **{check.__name__: check for check in checks}):
        yield checked


def copied(tensor: Tensor) -> Tensor:
    """On the host, and nobody else's."""
    return tensor.to("cpu", copy=True)


def on_host(rows: ops.Rows) -> ops.Rows:
    return ops.Rows(rows.block_table.cpu(), rows.seq_lens.cpu(), rows.budget_pages.cpu())


def scales_on_host(scales: ops.KvScales | None) -> ops.KvScales | None:
    return None if scales is None else ops.KvScales(scales.key.cpu(), scales.value.cpu())


@dataclass(frozen=True)
class Small:
    """Decode rows on the host, with the blocks of the cache that they read and no others."""

    query: Tensor
    kv_cache: Tensor
    rows: ops.Rows
    page_size: int
    scale: float
    soft_cap: float
    score: Score
    sinks: Tensor | None
    scales: ops.KvScales | None

    @classmethod
    def of(
        cls,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        page_size: int,
        scale: float = 1.0,
        soft_cap: float = 0.0,
        score: Score = "minmax",
        sinks: Tensor | None = None,
        scales: ops.KvScales | None = None,
    ) -> "Small":
        rows = on_host(rows)
        block_tokens = reference.tokens_per_block(kv_cache, page_size, score)
        table = torch.zeros_like(rows.block_table)
        blocks: list[Tensor] = []
        for row, seq_len in enumerate(rows.seq_lens.tolist()):
            num_blocks = -(-seq_len // block_tokens)
            first = sum(map(len, blocks))
            table[row, :num_blocks] = torch.arange(first, first + num_blocks)
            blocks.append(rows.block_table[row, :num_blocks].long())
        cache = kv_cache[torch.cat(blocks).to(kv_cache.device)].cpu()
        rows = ops.Rows(table, rows.seq_lens, rows.budget_pages)
        sinks = None if sinks is None else sinks.detach().cpu()
        return cls(query.cpu(), cache, rows, page_size, scale, soft_cap, score, sinks, scales)

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
            score=self.score,
            sinks=self.sinks,
            scales=self.scales,
        )
        return out

    @property
    def block_tokens(self) -> int:
        return reference.tokens_per_block(self.kv_cache, self.page_size, self.score)

    def over_budget(self) -> list[int]:
        pages = -(-self.rows.seq_lens // self.page_size)
        return (pages > self.rows.budget_pages).nonzero().flatten().tolist()
