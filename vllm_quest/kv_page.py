"""The page's layout: bounds are stored as extra rows of a vLLM block.

A block of N tokens holds, per KV head, N rows of key|value and then N / page_size rows of
minimum|maximum, one per page:

    [num_blocks, num_kv_heads, N + N / page_size, 2 * head_size]

vLLM prices those rows in its memory plan and moves them with the block, so that prefix caching,
preemption and block copies need no word about them.
"""

from dataclasses import replace
from fractions import Fraction

from torch import Tensor
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec


def with_bounds(spec: AttentionSpec, page_size: int) -> AttentionSpec:
    """Add the bounds' rows to a layer's KV cache spec.

    Returned as they came: specs of other attention kinds, whose layers QUEST leaves dense, and
    blocks that hold no whole number of pages, with which vLLM only probes for sizes
    (`vllm/platforms/interface.py`, block size 1).
    """
    if type(spec) is not FullAttentionSpec or spec.block_size % page_size != 0:
        return spec
    return replace(spec, tokens_per_state=Fraction(page_size, page_size + 1))


def block_tokens(kv_cache: Tensor, page_size: int) -> int:
    """Tokens per block of a cache with bounds, `[num_blocks, num_kv_heads, rows, 2 * head_size]`.

    Raises:
        ValueError: the rows are no whole number of pages, each with its row of bounds.
    """
    rows = kv_cache.shape[2]
    tokens, remainder = divmod(rows * page_size, page_size + 1)
    if remainder:
        raise ValueError(
            f"a KV cache block has {rows} rows; expected a multiple of {page_size + 1}, "
            f"{page_size} tokens and their bounds. vLLM split or repacked QUEST's blocks: "
            "remove --block-size, or report this with vLLM's version"
        )
    return tokens
