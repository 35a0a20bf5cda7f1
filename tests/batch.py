"""Batches of decode rows for tests of the operators, hostile to kernels that read too much."""

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_quest import ops, reference
from vllm_quest.config import Score

CPU = torch.device("cpu")

FAR_AWAY = 2**30
"""A stale block table entry: following it would leave the cache."""

UNTOUCHED = -777
"""What scores and pages hold before a launch; outputs hold NaN."""

PAGES_AT_ONCE = 1 << 14
"""Pages of one head whose bounds are computed together, in fp64."""

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
FP32_ROUNDOFF = UNIT_ROUNDOFF[torch.float32]


@dataclass(frozen=True)
class Shape:
    """An attention layer, and how its cache is laid out."""

    head_size: int = 128
    num_kv_heads: int = 2
    group_size: int = 4
    page_size: int = 16
    pages_per_block: int = 1
    dtype: torch.dtype = torch.bfloat16
    is_strided: bool = False
    """Whether the cache is a slice of a larger one, as a layer's view of all layers' blocks is, and
    the query a slice of QKV."""

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def block_tokens(self) -> int:
        return self.page_size * self.pages_per_block

    @property
    def block_rows(self) -> int:
        return self.block_tokens + self.pages_per_block


@dataclass
class Batch:
    """The arguments of the operators for some decode rows. The operators write to its outputs."""

    shape: Shape
    query: Tensor  # [num_rows, num_heads, head_size]
    kv_cache: Tensor  # [num_blocks, num_kv_heads, block_rows, 2 * head_size]
    rows: ops.Rows
    scores: Tensor  # [num_rows, num_kv_heads, max_pages] fp32
    pages: Tensor  # [num_rows, num_kv_heads, max_selected] int32
    out: Tensor  # [num_rows, num_heads, head_size]
    scale: float
    soft_cap: float
    workspace: Tensor | None
    kept: dict[str, int] = field(default_factory=dict)
    """What `select` and `cluster_decode` keep before they choose, as their arguments."""

    def num_pages(self, row: int) -> int:
        return reference.num_pages(int(self.rows.seq_lens[row]), self.shape.page_size)

    def over_budget(self, row: int) -> bool:
        return self.num_pages(row) > int(self.rows.budget_pages[row])

    def to(self, device: torch.device) -> "Batch":
        """A copy on a device, outputs included."""

        def moved(of: Any) -> dict[str, Tensor]:
            tensors = {name: x for name, x in vars(of).items() if isinstance(x, Tensor)}
            return {name: x.to(device, copy=True) for name, x in tensors.items()}

        return replace(self, rows=ops.Rows(**moved(self.rows)), **moved(self))

    def fresh(self) -> "Batch":
        """The same rows with outputs that no operator has written to."""
        return replace(self, **untouched_outputs(self.shape, self.rows))

    def take_row(self, row: int) -> "Batch":
        """One row alone, with outputs that no operator has written to."""
        one = slice(row, row + 1)
        return replace(self, query=self.query[one], rows=self.rows[one]).fresh()

    def score(self, module: ModuleType = ops) -> Tensor:
        page_size = self.shape.page_size
        module.score(self.query, self.kv_cache, self.rows, self.scores, page_size=page_size)
        return self.scores

    def select(self, module: ModuleType = ops) -> Tensor:
        page_size = self.shape.page_size
        module.select(self.scores, self.rows, self.pages, page_size=page_size, **self.kept)
        return self.pages

    def sparse_decode(self, module: ModuleType = ops, *, counters: Tensor | None = None) -> Tensor:
        module.sparse_decode(
            self.query,
            self.kv_cache,
            self.rows,
            self.pages,
            self.out,
            workspace=self.workspace,
            counters=counters,
            **self._attention,
        )
        return self.out

    def run(self, module: ModuleType = ops) -> "Batch":
        """Score, select and attend by `vllm_quest.ops` or `vllm_quest.reference`."""
        self.score(module)
        self.select(module)
        self.sparse_decode(module)
        return self

    def cluster_decode(self, *, follows_write_kv: bool = False) -> Tensor:
        """The three stages in one launch. Far keys take the place of the scores, as in vLLM."""
        shape, max_pages = self.shape, self.scores.shape[-1]
        near = ops.max_cluster_pages(shape.group_size, shape.head_size, self.query.device)
        ops.cluster_decode(
            self.query,
            self.kv_cache,
            self.rows,
            self.out,
            workspace=self.workspace,
            far_keys=self.scores.view(torch.int32) if max_pages > near else None,
            follows_write_kv=follows_write_kv,
            **self._attention,
            **self.kept,
        )
        return self.out

    def full_attention(self) -> Tensor:
        """Attention over every token of every row, `[num_rows, num_heads, head_size]` fp64."""
        return reference.full_attention(self.query, self.kv_cache, self.rows, **self._attention)

    @property
    def _attention(self) -> dict[str, Any]:
        page_size = self.shape.page_size
        return {"page_size": page_size, "scale": self.scale, "soft_cap": self.soft_cap}


def make_batch(
    shape: Shape,
    seq_lens: list[int],
    budget_pages: int | list[int],
    device: torch.device = CPU,
    *,
    max_tokens: int | None = None,
    soft_cap: float = 0.0,
    score: Score = "minmax",
    seed: int = 0,
) -> Batch:
    """Rows with random keys and values in scattered blocks, bounds made, all else NaN.

    Block table entries past a row's end point at a block of NaN and far outside of the cache, in
    turn; the first of them far outside in every second row.

    Args:
        shape: of the layer.
        seq_lens: tokens of each row.
        budget_pages: of all rows or of each.
        device: where the tensors are.
        max_tokens: capacity of the block table; by default what the rows need and some more.
        soft_cap: of the logits; 0 for none.
        score: what bounds are made for.
        seed: of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(seq_lens)
    budgets = [budget_pages] * num_rows if isinstance(budget_pages, int) else budget_pages
    blocks_of_row = [-(-tokens // shape.block_tokens) for tokens in seq_lens]
    max_blocks = max(blocks_of_row) + 2
    if max_tokens is not None:
        max_blocks = max_tokens // shape.block_tokens
    num_blocks = sum(blocks_of_row) + 3

    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    blank, *blocks = order.split([3, *blocks_of_row])
    kv_cache = empty_cache(shape, num_blocks, CPU)
    block_table = torch.full((num_rows, max_blocks), FAR_AWAY, dtype=torch.int32)
    for row, (tokens, own) in enumerate(zip(seq_lens, blocks, strict=True)):
        block_table[row, : len(own)] = own
        block_table[row, len(own) + 1 - row % 2 :: 2] = blank[0]
        if tokens:
            kv_cache[own.long()] = filled_blocks(shape, tokens, score, generator)
    if device != CPU:
        kv_cache = empty_cache(shape, num_blocks, device).copy_(kv_cache)

    qkv_heads = shape.num_heads + (2 * shape.num_kv_heads if shape.is_strided else 0)
    qkv = torch.randn(num_rows, qkv_heads, shape.head_size, generator=generator)
    rows = ops.Rows(
        block_table=block_table.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        budget_pages=torch.tensor(budgets, dtype=torch.int32, device=device),
    )
    return Batch(
        shape=shape,
        query=qkv.to(device, shape.dtype)[:, : shape.num_heads],
        kv_cache=kv_cache,
        rows=rows,
        scale=shape.head_size**-0.5,
        soft_cap=soft_cap,
        workspace=ops.decode_workspace(shape.group_size, shape.head_size, device),
        **untouched_outputs(shape, rows),
    )


def empty_cache(shape: Shape, num_blocks: int, device: torch.device) -> Tensor:
    """A cache of NaN: `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`."""
    layers = 3 if shape.is_strided else 1
    sizes = (num_blocks, layers, shape.num_kv_heads, shape.block_rows, 2 * shape.head_size)
    return torch.full(sizes, torch.nan, dtype=shape.dtype, device=device)[:, layers // 2]


def filled_blocks(shape: Shape, tokens: int, score: Score, generator: torch.Generator) -> Tensor:
    """One row's blocks, NaN past its end: `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`.

    Args:
        shape: of the layer.
        tokens: of the row, at least 1.
        score: what bounds are made for.
        generator: of keys and values.
    """
    num_blocks = -(-tokens // shape.block_tokens)
    sizes = (num_blocks, shape.num_kv_heads, shape.pages_per_block, shape.page_size)
    pages = torch.randn(*sizes, 2 * shape.head_size, generator=generator).to(shape.dtype)
    tokens_of_last_block = tokens - (num_blocks - 1) * shape.block_tokens
    pages[-1].flatten(1, 2)[:, tokens_of_last_block:] = torch.nan

    keys = pages[..., : shape.head_size]
    # The bounds of a page with a key of NaN are NaN.
    parts = [
        torch.cat(reference.bounds_of(part, score), dim=-1).to(shape.dtype)
        for part in keys.flatten(0, 2).split(PAGES_AT_ONCE)
    ]
    bounds = torch.cat(parts).view(*sizes[:3], 2 * shape.head_size)
    last = reference.num_pages(tokens_of_last_block, shape.page_size) - 1
    filled = keys[-1, :, last, : tokens_of_last_block - last * shape.page_size]
    bounds[-1, :, last] = torch.cat(reference.bounds_of(filled, score), dim=-1)
    return torch.cat([pages.flatten(2, 3), bounds], dim=2)


def untouched_outputs(shape: Shape, rows: ops.Rows) -> dict[str, Tensor]:
    """Scores, room for the pages of rows over their budget, and out; no operator wrote to them."""
    device, num_rows = rows.seq_lens.device, len(rows)
    row_pages = -(-rows.seq_lens // shape.page_size)
    max_selected = max([1, *rows.budget_pages[row_pages > rows.budget_pages].tolist()])
    max_pages = rows.block_table.shape[1] * shape.pages_per_block
    rows_heads = (num_rows, shape.num_kv_heads)
    out_sizes = (num_rows, shape.num_heads, shape.head_size)
    return {
        "scores": torch.full((*rows_heads, max_pages), float(UNTOUCHED), device=device),
        "pages": torch.full(
            (*rows_heads, max_selected), UNTOUCHED, dtype=torch.int32, device=device
        ),
        "out": torch.full(out_sizes, torch.nan, dtype=shape.dtype, device=device),
    }


def rows_to_select(
    seq_lens: list[int], budget_pages: list[int], device: torch.device = CPU
) -> ops.Rows:
    """Rows for `select`, which reads no block table."""
    block_table = torch.empty(len(seq_lens), 0)
    tensors = (block_table, torch.tensor(seq_lens), torch.tensor(budget_pages))
    return ops.Rows(*(tensor.to(device, torch.int32) for tensor in tensors))


class Attended(Protocol):
    """What says how exact an operator can be: a `Batch`, or rows of a running engine."""

    query: Tensor
    kv_cache: Tensor
    rows: ops.Rows
    scale: float
    soft_cap: float


def score_error(batch: Attended) -> float:
    """How far a score summed in fp32 may be from the exact one.

    Each of 2 * head_size products is rounded and then takes part in as many sums:
    |error| <= 2 * 2 * head_size * u * Σ|q_d| max(|min_d|, |max_d|), to first order. Products of 16
    bits are exact in fp32; the GPU's matrix unit truncates their sums, at 2u each.
    """
    magnitude = batch.query.double().abs().sum(-1).amax() * largest(batch.kv_cache)
    return 4 * batch.query.shape[-1] * FP32_ROUNDOFF * float(magnitude)


def bounds_error(kv_cache: Tensor, page_size: int) -> float:
    """How far a bound that estimates, computed in fp32 and rounded, may be from another such.

    Both are rounded to the cache's dtype. A sum over the page takes part in `page_size` roundings,
    and so does the one of the deviations from it; a root doubles what is near 0.
    """
    u = UNIT_ROUNDOFF[kv_cache.dtype] + 4 * page_size * FP32_ROUNDOFF
    smallest_step = 2.0**-24 if kv_cache.dtype == torch.float16 else 0.0
    return 2 * (2 * largest(kv_cache) * u + smallest_step)


def decode_error(batch: Attended, exact: Tensor) -> Tensor:
    """How far attention computed in fp32 and rounded to the output's dtype may be from `exact`.

    A logit is off by at most δ: head_size roundings of its sum, a few of its own size (scale, log2,
    soft cap). A weight is then off by 2δ relative to the total weight (its own and the maximum's),
    plus 2 roundings per token summed, plus 8 for exponential, rescaling and merging.
    """
    head_size, dtype = batch.query.shape[-1], batch.query.dtype
    largest_value = largest(batch.kv_cache)
    product = float(batch.query.double().abs().sum(-1).amax()) * largest_value * batch.scale
    logit_error = (head_size + 8) * FP32_ROUNDOFF * (product + batch.soft_cap)
    tokens = int(batch.rows.seq_lens.max())
    weight_error = 2 * logit_error + (2 * tokens + 8) * FP32_ROUNDOFF
    smallest_step = 2.0**-24 if dtype == torch.float16 else 0.0
    rounding = UNIT_ROUNDOFF[dtype] * exact.double().abs() + smallest_step
    return rounding + weight_error * largest_value


def largest(kv_cache: Tensor) -> float:
    return float(kv_cache.double().nan_to_num(0.0).abs().max())
