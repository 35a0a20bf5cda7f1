"""Random decode batches whose caches are NaN wherever nothing may be read."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_quest import ops

FAR_AWAY = 2**30
"""A stale block table entry: following it would leave the cache."""

UNTOUCHED = -777
"""What outputs hold before a launch."""


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
    """Whether the cache is a slice of a larger one, as a layer's view of all layers' blocks is."""

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def block_tokens(self) -> int:
        return self.page_size * self.pages_per_block

    @property
    def block_rows(self) -> int:
        return self.block_tokens + self.pages_per_block


def empty_cache(shape: Shape, num_blocks: int, device: torch.device) -> Tensor:
    """A cache of NaN: `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`."""
    layers = 3 if shape.is_strided else 1
    sizes = (num_blocks, layers, shape.num_kv_heads, shape.block_rows, 2 * shape.head_size)
    return torch.full(sizes, torch.nan, dtype=shape.dtype, device=device)[:, layers // 2]


@dataclass
class Batch:
    """The arguments of the operators for some decode rows."""

    shape: Shape
    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    budgets: Tensor
    scores: Tensor
    pages: Tensor
    out: Tensor
    scale: float
    soft_cap: float = 0.0
    workspace: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on another device."""
        tensors = {
            k: v.to(device, copy=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **tensors)

    def score(self, module=ops) -> Tensor:
        module.score(
            self.query,
            self.kv_cache,
            self.block_table,
            self.seq_lens,
            self.budgets,
            self.shape.page_size,
            self.scores,
        )
        return self.scores

    def select(self, module=ops) -> Tensor:
        module.select(self.scores, self.seq_lens, self.budgets, self.shape.page_size, self.pages)
        return self.pages

    def sparse_decode(self, module=ops) -> Tensor:
        workspace = {"workspace": self.workspace} if module is ops else {}
        module.sparse_decode(
            self.query,
            self.kv_cache,
            self.block_table,
            self.seq_lens,
            self.budgets,
            self.pages,
            self.shape.page_size,
            self.scale,
            self.soft_cap,
            self.out,
            **workspace,
        )
        return self.out

    def cluster_decode(self, *, follows_write_kv: bool = False) -> Tensor:
        shape, device = self.shape, self.query.device
        max_pages = ops.max_cluster_pages(shape.group_size, shape.head_size, device)
        is_wide = self.block_table.shape[1] * shape.pages_per_block > max_pages
        ops.cluster_decode(
            self.query,
            self.kv_cache,
            self.block_table,
            self.seq_lens,
            self.budgets,
            self.shape.page_size,
            self.scale,
            self.soft_cap,
            self.out,
            self.workspace,
            None,
            self.scores if is_wide else None,
            follows_write_kv=follows_write_kv,
        )
        return self.out

    def run(self, module=ops) -> Tensor:
        """All decode stages."""
        self.score(module)
        self.select(module)
        return self.sparse_decode(module)


def make_batch(
    shape: Shape,
    seq_lens: list[int],
    budgets: int | list[int],
    device: torch.device,
    *,
    max_tokens: int | None = None,
    soft_cap: float = 0.0,
    seed: int = 0,
) -> Batch:
    """Rows with random keys and values in scattered blocks, bounds made, all else NaN.

    Args:
        budgets: pages, of all rows or of each.
        max_tokens: capacity of the block table; by default what the rows need and some more.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(seq_lens)
    row_budgets = [budgets] * num_rows if isinstance(budgets, int) else budgets
    blocks_of_row = [-(-n // shape.block_tokens) for n in seq_lens]
    num_blocks = sum(blocks_of_row) + 3
    max_blocks = max(blocks_of_row) + 2
    if max_tokens is not None:
        max_blocks = max_tokens // shape.block_tokens

    block_table = torch.full((num_rows, max_blocks), FAR_AWAY, dtype=torch.int32)
    free = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    cache = empty_cache(shape, num_blocks, torch.device("cpu"))
    for row, (tokens, count) in enumerate(zip(seq_lens, blocks_of_row, strict=True)):
        blocks, free = free[:count], free[count:]
        block_table[row, :count] = blocks
        if tokens:
            cache[blocks.long()] = filled_blocks(shape, tokens, generator)

    finite_budgets = [b for b in row_budgets if b < ops.UNSETTLED_PAGES]
    max_pages = max_blocks * shape.pages_per_block
    rows_heads = (num_rows, shape.num_kv_heads)
    query = torch.randn(num_rows, shape.num_heads, shape.head_size, generator=generator)
    batch = Batch(
        shape=shape,
        query=query.to(shape.dtype),
        kv_cache=cache,
        block_table=block_table,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        budgets=torch.tensor(row_budgets, dtype=torch.int32),
        scores=torch.full((*rows_heads, max_pages), float(UNTOUCHED)),
        pages=torch.full((*rows_heads, max([*finite_budgets, 1])), UNTOUCHED, dtype=torch.int32),
        out=torch.full_like(query, torch.nan, dtype=shape.dtype),
        scale=shape.head_size**-0.5,
        soft_cap=soft_cap,
    ).to(device)
    if shape.is_strided:
        strided = empty_cache(shape, num_blocks, device)
        strided.copy_(batch.kv_cache)
        batch.kv_cache = strided
    batch.workspace = ops.decode_workspace(shape.group_size, shape.head_size, device)
    return batch


def filled_blocks(shape: Shape, tokens: int, generator: torch.Generator) -> Tensor:
    """Blocks of one row: `[blocks, num_kv_heads, block_rows, 2 * head_size]`."""
    num_pages = -(-tokens // shape.page_size)
    num_blocks = -(-tokens // shape.block_tokens)
    sizes = (num_blocks * shape.pages_per_block, shape.num_kv_heads, shape.page_size)
    rows = torch.randn(*sizes, 2 * shape.head_size, generator=generator).to(shape.dtype)
    position = torch.arange(sizes[0] * shape.page_size).view(sizes[0], 1, shape.page_size, 1)
    is_filled = position < tokens

    keys = rows[..., : shape.head_size]
    low = keys.masked_fill(~is_filled, torch.inf).amin(dim=2)
    high = keys.masked_fill(~is_filled, -torch.inf).amax(dim=2)
    bounds = torch.cat([low, high], dim=-1)
    bounds[num_pages:] = torch.nan

    def by_block(pages: Tensor, rows_per_page: int) -> Tensor:
        pages = pages.view(num_blocks, shape.pages_per_block, shape.num_kv_heads, rows_per_page, -1)
        return pages.transpose(1, 2).reshape(
            num_blocks, shape.num_kv_heads, shape.pages_per_block * rows_per_page, -1
        )

    tokens_rows = by_block(rows.masked_fill(~is_filled, torch.nan), shape.page_size)
    return torch.cat([tokens_rows, by_block(bounds.unsqueeze(2), 1)], dim=2)
