"""The page's layout: what pages are scored by is stored as extra rows of a vLLM block.

A block of N tokens holds, per KV head, N rows of key|value and then N / page_size rows of
minimum|maximum, one per page:

    [num_blocks, num_kv_heads, N + N / page_size, 2 * head_size]

or, for the score `codes`, nine rows per 128 tokens, see `layout`. vLLM prices those rows in its
memory plan and moves them with the block, so that prefix caching, preemption and block copies need
no word about them.
"""

from dataclasses import replace
from fractions import Fraction

from torch import Tensor
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_quest import layout
from vllm_quest.config import Score


def with_bounds(spec: AttentionSpec, page_size: int, score: Score = "minmax") -> AttentionSpec:
    """Add the rows of what pages are scored by to a layer's KV cache spec.

    Returned as they came: specs of other attention kinds, whose layers QUEST leaves dense, and
    blocks that hold no whole number of units (`layout`), with which vLLM only probes for sizes
    (`vllm/platforms/interface.py`, block size 1).
    """
    tokens, rows = layout.unit(page_size, score)
    if type(spec) is not FullAttentionSpec or spec.block_size % tokens != 0:
        return spec
    return replace(spec, tokens_per_state=Fraction(tokens, tokens + rows))


def block_tokens(kv_cache: Tensor, page_size: int, score: Score = "minmax") -> int:
    """Tokens per block of a layer's cache, `[num_blocks, num_kv_heads, rows, 2 * head_size]`.

    Raises:
        ValueError: the rows are no whole number of units, see `layout`.
    """
    try:
        return layout.block_tokens(kv_cache.shape[2], page_size, score)
    except ValueError as error:
        raise ValueError(
            f"{error}. vLLM split or repacked QUEST's blocks: remove --block-size, or report this "
            "with vLLM's version"
        ) from error
