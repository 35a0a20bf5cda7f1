"""Batches of decode rows for tests of the operators, hostile to kernels that read too much."""

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from vllm_quest import reference
from vllm_quest.config import Score

OUT_OF_RANGE_BLOCK = 1 << 30
UNTOUCHED_SCORE = -7.0
UNTOUCHED_PAGE = -7

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FP32_ROUNDOFF = UNIT_ROUNDOFF[torch.float32]


@dataclass(frozen=True)
class Batch:
    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    budgets: Tensor
    page_size: int
    soft_cap: float = 0.0

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    def num_pages(self, row: int) -> int:
        return reference.num_pages(int(self.seq_lens[row]), self.page_size)

    def over_budget(self, row: int) -> bool:
        return self.num_pages(row) > int(self.budgets[row])

    def take_row(self, row: int) -> "Batch":
        one = slice(row, row + 1)
        return replace(
            self,
            query=self.query[one],
            block_table=self.block_table[one],
            seq_lens=self.seq_lens[one],
            budgets=self.budgets[one],
        )


@dataclass(frozen=True)
class Result:
    scores: Tensor
    pages: Tensor
    out: Tensor


def make_batch(
    seq_lens: list[int],
    budgets: list[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_size: int = 64,
    num_kv_heads: int = 2,
    group_size: int = 4,
    page_size: int = 16,
    block_tokens: int = 32,
    soft_cap: float = 0.0,
    strided: bool = False,
    score: Score = "minmax",
    seed: int = 0,
) -> Batch:
    """A batch whose memory is NaN wherever no token or bound of a row lies.

    Block-table entries past a row's length point at a poisoned block or at none at all. `strided`
    gives the cache a larger block stride, as in the layout BLHNC, and cuts the query out of QKV.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(seq_lens)
    blocks_of = [-(-seq_len // block_tokens) for seq_len in seq_lens]
    max_blocks = max(blocks_of) + 2
    num_blocks = sum(blocks_of) + 1
    block_rows = block_tokens + block_tokens // page_size

    layers = 3 if strided else 1
    kv_cache = torch.full(
        (num_blocks, layers, num_kv_heads, block_rows, 2 * head_size), float("nan"), dtype=dtype
    )[:, layers // 2]
    shuffled = torch.randperm(num_blocks, generator=generator).tolist()
    poisoned = shuffled.pop()
    block_table = torch.full((num_rows, max_blocks), OUT_OF_RANGE_BLOCK, dtype=torch.int32)
    block_table[:, ::2] = poisoned
    for row, seq_len in enumerate(seq_lens):
        for i in range(blocks_of[row]):
            block_table[row, i] = shuffled.pop()
        tokens = torch.arange(seq_len)
        slots = block_table[row, tokens // block_tokens].long() * block_tokens
        key, value = torch.randn(2, seq_len, num_kv_heads, head_size, generator=generator)
        slots += tokens % block_tokens
        reference.write_kv(key.to(dtype), value.to(dtype), kv_cache, slots, page_size, score)

    num_heads = num_kv_heads * group_size
    packed_heads = num_heads + (2 * num_kv_heads if strided else 0)
    query = torch.randn(num_rows, packed_heads, head_size, generator=generator).to(dtype)
    return Batch(
        query=query[:, :num_heads],
        kv_cache=kv_cache,
        block_table=block_table,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        budgets=torch.tensor(budgets, dtype=torch.int32),
        page_size=page_size,
        soft_cap=soft_cap,
    )


def run(operators: ModuleType, batch: Batch) -> Result:
    """Score, select and attend by `vllm_quest.ops` or `vllm_quest.reference`."""
    num_rows, num_kv_heads = len(batch.seq_lens), batch.kv_cache.shape[1]
    block_tokens = reference.tokens_per_block(batch.kv_cache, batch.page_size)
    max_pages = batch.block_table.shape[1] * block_tokens // batch.page_size
    budgets = [int(batch.budgets[row]) for row in range(num_rows) if batch.over_budget(row)]
    scores = torch.full((num_rows, num_kv_heads, max_pages), UNTOUCHED_SCORE)
    pages = torch.full(
        (num_rows, num_kv_heads, max(budgets, default=1)), UNTOUCHED_PAGE, dtype=torch.int32
    )
    out = torch.full(batch.query.shape, float("nan"), dtype=batch.query.dtype)
    rows = (batch.block_table, batch.seq_lens, batch.budgets)
    operators.score(batch.query, batch.kv_cache, *rows, batch.page_size, scores)
    operators.select(scores, batch.seq_lens, batch.budgets, batch.page_size, pages)
    operators.sparse_decode(
        batch.query,
        batch.kv_cache,
        *rows,
        pages,
        batch.page_size,
        batch.scale,
        batch.soft_cap,
        out,
    )
    return Result(scores, pages, out)


def score_error(batch: Batch) -> float:
    """How far a score summed in fp32 may be from the exact one.

    Each of 2 * head_size products is rounded and then takes part in as many sums:
    |error| <= 2 * 2 * head_size * u * Σ|q_d| max(|min_d|, |max_d|), to first order.
    """
    head_size = batch.query.shape[-1]
    magnitude = batch.query.double().abs().sum(-1).amax() * largest(batch.kv_cache)
    return 4 * head_size * FP32_ROUNDOFF * float(magnitude)


def bounds_error(kv_cache: Tensor, page_size: int) -> float:
    """How far a bound that estimates, computed in fp32 and rounded, may be from another such.

    Both are rounded to the cache's dtype. A sum over the page takes part in `page_size` roundings,
    and so does the one of the deviations from it; a root doubles what is near 0.
    """
    u = UNIT_ROUNDOFF[kv_cache.dtype] + 4 * page_size * FP32_ROUNDOFF
    smallest_step = 2.0**-24 if kv_cache.dtype == torch.float16 else 0.0
    return 2 * (2 * largest(kv_cache) * u + smallest_step)


def decode_error(batch: Batch, exact: Tensor) -> Tensor:
    """How far attention computed in fp32 and rounded to the output's dtype may be from `exact`.

    A logit is off by at most δ: head_size roundings of its sum, a few of its own size (scale, log2,
    soft cap). A weight is then off by 2δ relative to the total weight (its own and the maximum's),
    plus 2 roundings per token summed, plus 8 for exponential, rescaling and merging.
    """
    head_size = batch.query.shape[-1]
    largest_value = largest(batch.kv_cache)
    product = float(batch.query.double().abs().sum(-1).amax()) * largest_value * batch.scale
    logit_error = (head_size + 8) * FP32_ROUNDOFF * (product + batch.soft_cap)
    tokens = int(batch.seq_lens.max())
    weight_error = 2 * logit_error + (2 * tokens + 8) * FP32_ROUNDOFF
    smallest_step = 2.0**-24 if batch.query.dtype == torch.float16 else 0.0
    rounding = UNIT_ROUNDOFF[batch.query.dtype] * exact.double().abs() + smallest_step
    return rounding + weight_error * largest_value


def largest(kv_cache: Tensor) -> float:
    return float(kv_cache.double().nan_to_num(0.0).abs().max())
