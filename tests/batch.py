"""Batches of decode rows for tests of the operators, hostile to kernels that read too much."""

from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_quest import layout, ops, reference
from vllm_quest.config import GROUP_TOKENS, Score

CPU = torch.device("cpu")

FAR_AWAY = 2**30
"""A stale block table entry: following it would leave the cache."""

UNTOUCHED = -777
"""What scores and pages hold before a launch; outputs hold NaN."""

PAGES_AT_ONCE = 1 << 14
"""Pages of one head whose bounds are computed together, in fp64."""

SINKS = [0.0, 3.0, -torch.inf, 60.0, -40.0, 6.0, -2.5]
"""Sinks of seven query heads in turn, so that groups differ: with ordinary weight, next to none,
none, and nearly all weight."""

FP8 = reference.FP8

KV_SCALES = (0.37, 1.9)
"""Of the keys and of the values in an fp8 cache. Standard normal keys then fill its range from
denormal numbers up; neither is a power of two."""

UNIT_ROUNDOFF = {
    FP8: 2.0**-4,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
}
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
    """Of the model."""

    cache: torch.dtype | None = None
    """Of the cache, if another one: fp8."""

    score: Score = "minmax"
    """What pages are scored by: `codes` needs blocks of whole groups."""

    is_strided: bool = False
    """Whether the cache is a slice of a larger one, as a layer's view of all layers' blocks is, and
    the query a slice of QKV."""

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.dtype if self.cache is None else self.cache

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def block_tokens(self) -> int:
        return self.page_size * self.pages_per_block

    @property
    def block_rows(self) -> int:
        return layout.block_rows(self.block_tokens, self.page_size, self.score)


@dataclass
class Batch:
    """The arguments of the operators for some decode rows. The operators write to its outputs."""

    shape: Shape
    query: Tensor  # [num_rows, num_heads, head_size]
    kv_cache: Tensor  # [num_blocks, num_kv_heads, block_rows, 2 * head_size]
    rows: ops.Rows
    masses: Tensor | None  # [num_rows, num_heads, mass_columns] fp32; for codes alone
    scores: Tensor  # [num_rows, num_kv_heads, max_pages] fp32
    pages: Tensor  # [num_rows, num_kv_heads, max_selected] int32
    out: Tensor  # [num_rows, num_heads, head_size]
    scale: float
    soft_cap: float
    workspace: Tensor | None
    sinks: Tensor | None = None  # [num_heads]
    scales: ops.KvScales | None = None  # for fp8 alone
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

        scales = None if self.scales is None else ops.KvScales(**moved(self.scales))
        return replace(self, rows=ops.Rows(**moved(self.rows)), scales=scales, **moved(self))

    def fresh(self) -> "Batch":
        """The same rows with outputs that no operator has written to."""
        return replace(self, **untouched_outputs(self.shape, self.rows))

    def take_row(self, row: int) -> "Batch":
        """One row alone, with outputs that no operator has written to."""
        one = slice(row, row + 1)
        return replace(self, query=self.query[one], rows=self.rows[one]).fresh()

    def score(self, module: ModuleType = ops) -> Tensor:
        page_size = self.shape.page_size
        rows = (self.query, self.kv_cache, self.rows)
        if self.shape.score == "codes":
            logits = {"scale": self.scale, "soft_cap": self.soft_cap}
            module.score_codes(*rows, self.masses, self.scores, page_size=page_size, **logits)
        else:
            module.score(*rows, self.scores, page_size=page_size)
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
        """The three stages in one launch, after `weigh_pages` for the score `codes`.

        Far keys take the place of the scores, as in vLLM.
        """
        shape, max_pages = self.shape, self.scores.shape[-1]
        if self.masses is not None:
            logits = {"scale": self.scale, "soft_cap": self.soft_cap}
            rows = (self.query, self.kv_cache, self.rows)
            ops.weigh_pages(*rows, self.masses, page_size=shape.page_size, **logits)
        near = max_near_pages(shape, self.query.device)
        ops.cluster_decode(
            self.query,
            self.kv_cache,
            self.rows,
            self.out,
            workspace=self.workspace,
            far_keys=self.scores.view(torch.int32) if max_pages > near else None,
            follows_write_kv=follows_write_kv,
            masses=self.masses,
            **self._attention,
            **self.kept,
        )
        return self.out

    def full_attention(self) -> Tensor:
        """Attention over every token of every row, `[num_rows, num_heads, head_size]` fp64."""
        return reference.full_attention(self.query, self.kv_cache, self.rows, **self._attention)

    @property
    def block_tokens(self) -> int:
        return self.shape.block_tokens

    @property
    def _attention(self) -> dict[str, Any]:
        return {
            "page_size": self.shape.page_size,
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "score": self.shape.score,
            "sinks": self.sinks,
            "scales": self.scales,
        }


def max_near_pages(shape: Shape, device: torch.device) -> int:
    """Pages a row may have in `cluster_decode` without far keys."""
    is_fp8 = shape.cache_dtype == FP8
    return ops.max_cluster_pages(shape.group_size, shape.head_size, device, is_fp8=is_fp8)


def make_batch(
    shape: Shape,
    seq_lens: list[int],
    budget_pages: int | list[int],
    device: torch.device = CPU,
    *,
    max_tokens: int | None = None,
    soft_cap: float = 0.0,
    shift: float = 0.0,
    sinks: list[float] | None = None,
    seed: int = 0,
) -> Batch:
    """Rows with random keys and values in scattered blocks, bounds or codes made, all else NaN.

    Block table entries past a row's end point at a block of NaN and far outside of the cache, in
    turn; the first of them far outside in every second row.

    Args:
        shape: of the layer.
        seq_lens: tokens of each row.
        budget_pages: of all rows or of each.
        device: where the tensors are.
        max_tokens: capacity of the block table; by default what the rows need and some more.
        soft_cap: of the logits; 0 for none.
        shift: mean of the keys.
        sinks: of the query heads, over and over; None for none.
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
            kv_cache[own.long()] = filled_blocks(shape, tokens, shift, generator)
    if device != CPU:
        kv_cache = empty_cache(shape, num_blocks, device).copy_(kv_cache)

    qkv_heads = shape.num_heads + (2 * shape.num_kv_heads if shape.is_strided else 0)
    qkv = torch.randn(num_rows, qkv_heads, shape.head_size, generator=generator)
    of_heads = None
    if sinks is not None:
        of_heads = torch.tensor(list(islice(cycle(sinks), shape.num_heads)))
        of_heads = of_heads.to(device, shape.dtype)
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
        sinks=of_heads,
        scales=kv_scales(shape, device),
        workspace=ops.decode_workspace(shape.group_size, shape.head_size, device),
        **untouched_outputs(shape, rows),
    )


def kv_scales(shape: Shape, device: torch.device) -> ops.KvScales | None:
    """`KV_SCALES` for an fp8 cache."""
    if shape.cache_dtype != FP8:
        return None
    return ops.KvScales(*(torch.tensor(scale, device=device) for scale in KV_SCALES))


def empty_cache(shape: Shape, num_blocks: int, device: torch.device) -> Tensor:
    """A cache of NaN: `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`."""
    layers = 3 if shape.is_strided else 1
    sizes = (num_blocks, layers, shape.num_kv_heads, shape.block_rows, 2 * shape.head_size)
    return torch.full(sizes, torch.nan, dtype=shape.cache_dtype, device=device)[:, layers // 2]


def filled_blocks(shape: Shape, tokens: int, shift: float, generator: torch.Generator) -> Tensor:
    """One row's blocks, NaN past its end: `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`.

    Args:
        shape: of the layer.
        tokens: of the row, at least 1.
        shift: mean of the keys.
        generator: of keys and values.
    """
    num_blocks = -(-tokens // shape.block_tokens)
    sizes = (num_blocks, shape.num_kv_heads, shape.block_tokens, 2 * shape.head_size)
    keys_values = torch.randn(*sizes, generator=generator)
    keys_values[..., : shape.head_size] += shift
    if (scales := kv_scales(shape, CPU)) is not None:
        key, value = keys_values.chunk(2, dim=-1)
        parts = [reference.quantised(key, scales.key), reference.quantised(value, scales.value)]
        keys_values = torch.cat(parts, dim=-1)
    block_sizes = (*sizes[:2], shape.block_rows, sizes[3])
    blocks = torch.full(block_sizes, torch.nan, dtype=shape.cache_dtype)
    blocks[:, :, : shape.block_tokens] = keys_values
    tokens_of_last_block = tokens - (num_blocks - 1) * shape.block_tokens
    blocks[-1, :, tokens_of_last_block:] = torch.nan
    if shape.score == "codes":
        groups_of_block = shape.block_tokens // GROUP_TOKENS
        for group in range(tokens // GROUP_TOKENS):
            reference.update_codes(blocks, *divmod(group, groups_of_block))
    else:
        write_bounds(shape, blocks, tokens_of_last_block)
    return blocks


def write_bounds(shape: Shape, blocks: Tensor, tokens_of_last_block: int) -> None:
    """The bounds of all pages of a row's blocks; those of a page with a key of NaN are NaN."""
    keys = blocks[:, :, : shape.block_tokens, : shape.head_size].unflatten(2, (-1, shape.page_size))
    parts = [
        reference.to_dtype(torch.cat(reference.bounds_of(part, shape.score), dim=-1), blocks.dtype)
        for part in keys.flatten(0, 2).split(PAGES_AT_ONCE)
    ]
    bounds = blocks[:, :, shape.block_tokens :]
    bounds.copy_(torch.cat(parts).view(bounds.shape))
    last = reference.num_pages(tokens_of_last_block, shape.page_size) - 1
    filled = keys[-1, :, last, : tokens_of_last_block - last * shape.page_size]
    of_last = torch.cat(reference.bounds_of(filled, shape.score), dim=-1)
    bounds[-1, :, last] = reference.to_dtype(of_last, blocks.dtype)


def untouched_outputs(shape: Shape, rows: ops.Rows) -> dict[str, Tensor | None]:
    """What operators write to, before any has: `pages` has room for those of rows over budget."""
    device, num_rows = rows.seq_lens.device, len(rows)
    row_pages = -(-rows.seq_lens // shape.page_size)
    max_selected = max([1, *rows.budget_pages[row_pages > rows.budget_pages].tolist()])
    max_pages = rows.block_table.shape[1] * shape.pages_per_block
    rows_heads = (num_rows, shape.num_kv_heads)
    out_sizes = (num_rows, shape.num_heads, shape.head_size)
    columns = layout.mass_columns(max_pages, shape.page_size)
    masses = torch.full((num_rows, shape.num_heads, columns), torch.nan, device=device)
    return {
        "masses": masses if shape.score == "codes" else None,
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
    sinks: Tensor | None
    scales: ops.KvScales | None

    @property
    def block_tokens(self) -> int: ...


def score_error(batch: Attended) -> float:
    """How far a score summed in fp32 may be from the exact one.

    Each of 2 * head_size products is rounded and then takes part in as many sums:
    |error| <= 2 * 2 * head_size * u * Σ|q_d| max(|min_d|, |max_d|), to first order. Products of 16
    bits are exact in fp32; the GPU's matrix unit truncates their sums, at 2u each.
    """
    magnitude = batch.query.double().abs().sum(-1).amax() * largest(batch.kv_cache)
    return 4 * batch.query.shape[-1] * FP32_ROUNDOFF * float(magnitude)


def score_codes_error(batch: Attended) -> float:
    """How far an estimate from codes computed in fp32 may be from the exact one.

    A logit sums head_size products of three and head_size of four factors, in any order: it is off
    by (head_size + 4) roundings of Σ |q_d| (|offset_d| + 3 |step_d|); a key is no larger. A page's
    mass is off by no more than its logits, and by 2e-7 relative for each exponential and sum: less
    than 1e-6 + 16 roundings of its own size. The mass of all pages is off by as much again.
    """
    head_size = batch.query.shape[-1]
    offset, step = scales(batch).abs().chunk(2, dim=-1)
    keys = batch.kv_cache[:, :, : batch.block_tokens, :head_size]
    largest_key = max(largest(keys), float((offset + 3 * step).max()))
    logit = float(batch.query.double().abs().sum(-1).amax() * largest_key * batch.scale)
    return 2 * (1.4427 * (head_size + 24) * FP32_ROUNDOFF * (logit + batch.soft_cap) + 3e-6)


def rounding_of_the_query(batch: Attended) -> float:
    """How far the integers that stand for q * step on a GPU may move a score.

    Of half the channels each is off by half a part in 32639 of the largest, of the others by four
    times as much, and each meets a code of at most 3. Exponentials and logarithms are approximate
    to within 1e-5. A score is a difference of two masses.
    """
    head_size = batch.query.shape[-1]
    steps = scales(batch)[..., head_size:]
    one = float(steps.amax() * batch.query.double().abs().amax()) / 32639
    return 2 * (1.4427 * batch.scale * 3 * head_size * (0.5 + 2) / 2 * one + 1e-5)


def scales(batch: Attended) -> Tensor:
    """Offset|step of every group, 0 where there are none: `[..., num_groups, 2 * head_size]`."""
    first = batch.block_tokens + layout.GROUP_ROWS - 1
    of_groups = batch.kv_cache[:, :, first :: layout.GROUP_ROWS]
    return of_groups.double().nan_to_num(0.0)


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
    soft cap); a sink by those of its own size. A weight is then off by 2δ relative to the total
    weight (its own and the maximum's), plus 2 roundings per token summed, plus 8 for exponential,
    rescaling and merging.
    """
    head_size, dtype = batch.query.shape[-1], batch.query.dtype
    largest_key = largest_value = largest(batch.kv_cache[:, :, : batch.block_tokens])
    if batch.scales is not None:
        largest_key *= float(batch.scales.key)
        largest_value *= float(batch.scales.value)
    product = float(batch.query.double().abs().sum(-1).amax()) * largest_key * batch.scale
    logit_error = (head_size + 8) * FP32_ROUNDOFF * (product + batch.soft_cap)
    if batch.sinks is not None:
        logit_error += 8 * FP32_ROUNDOFF * largest(batch.sinks.nan_to_num(neginf=0.0))
    tokens = int(batch.rows.seq_lens.max())
    weight_error = 2 * logit_error + (2 * tokens + 8) * FP32_ROUNDOFF
    smallest_step = 2.0**-24 if dtype == torch.float16 else 0.0
    rounding = UNIT_ROUNDOFF[dtype] * exact.double().abs() + smallest_step
    return rounding + weight_error * largest_value


def largest(values: Tensor) -> float:
    """The largest magnitude; NaN counts as 0."""
    return float(values.double().nan_to_num(0.0).abs().max())
