"""Dense attention on the CPU, by vLLM's CPU_ATTN kernels.

CPU_ATTN reads a KV cache of its own making (keys packed for the machine's instructions, a plane of
keys before a plane of values). A prefill therefore packs the pages it needs into a scratch cache,
once per layer, which costs one pass over keys that are then read many times.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)
from vllm.v1.kv_cache_interface import AttentionSpec

SCRATCH_BLOCK_TOKENS = 128
"""Tokens per block of the scratch cache: CPU_ATTN's own default."""

platform_builder = CPUAttentionMetadataBuilder
PlatformImpl = CPUAttentionBackendImpl


@dataclass
class DensePrefill:
    """The prefills of one batch, and the scratch cache that their layers share in turn."""

    query_start_loc: Tensor
    """[num_requests + 1] int32, from the first prefill token."""

    seq_lens: Tensor
    """[num_requests] int32, tokens."""

    source_blocks: Tensor
    """[num_source_blocks] int64: every request's blocks, one request after the other."""

    scratch_slots: Tensor
    """[num_source_blocks * block_tokens] int64: where each source token goes; -1 past the end."""

    scratch: Tensor
    """[num_scratch_blocks, num_kv_heads, 2 * SCRATCH_BLOCK_TOKENS, head_size]."""

    scratch_table: Tensor
    """[num_requests, max_scratch_blocks] int32."""

    isa: str
    scheduler_metadata: Tensor


def plan_prefill(
    *,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    block_tokens: int,
    num_heads: int,
    spec: AttentionSpec,
) -> DensePrefill:
    """Lay out the scratch cache for a batch's prefills.

    Args:
        query_start_loc: `[num_requests + 1]` int32, from the first prefill token.
        seq_lens: `[num_requests]` int32, tokens, those of this step included.
        block_table: `[num_requests, max_blocks]` int32.
        block_tokens: tokens per vLLM block.
        num_heads: query heads of a layer.
        spec: the layers' KV cache spec.
    """
    lens = seq_lens.numpy()
    num_requests = len(lens)
    num_source_blocks = -(-lens // block_tokens)
    num_scratch_blocks = -(-lens // SCRATCH_BLOCK_TOKENS)
    first_scratch_block = np.concatenate([[0], np.cumsum(num_scratch_blocks)])

    table = block_table.numpy()
    source_blocks = np.concatenate([table[r, :n] for r, n in enumerate(num_source_blocks)])
    slots = [np.arange(n * block_tokens) for n in num_source_blocks]
    for request, request_slots in enumerate(slots):
        request_slots += first_scratch_block[request] * SCRATCH_BLOCK_TOKENS
        request_slots[lens[request] :] = -1

    max_scratch_blocks = int(num_scratch_blocks.max())
    scratch_table = first_scratch_block[:-1, None] + np.arange(max_scratch_blocks)
    isa = _get_attn_isa(spec.dtype, SCRATCH_BLOCK_TOKENS, spec.head_size)
    scratch_shape = (
        int(first_scratch_block[-1]),
        spec.num_kv_heads,
        2 * SCRATCH_BLOCK_TOKENS,
        spec.head_size,
    )
    return DensePrefill(
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        source_blocks=torch.from_numpy(source_blocks.astype(np.int64)),
        scratch_slots=torch.from_numpy(np.concatenate(slots)),
        # Slots past a request's end stay 0: masked weights are 0, and 0 * NaN would be NaN.
        scratch=torch.zeros(scratch_shape, dtype=spec.dtype),
        scratch_table=torch.from_numpy(scratch_table.astype(np.int32)),
        isa=isa,
        scheduler_metadata=vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=num_requests,
            num_heads=num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            seq_lens=seq_lens,
            dtype=spec.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        ),
    )


def prefill(
    query: Tensor,
    kv_cache: Tensor,
    plan: DensePrefill,
    *,
    block_tokens: int,
    scale: float,
    soft_cap: float,
    output: Tensor,
) -> None:
    """Attend causally and in full.

    Args:
        query: `[num_tokens, num_heads, head_size]`.
        kv_cache: `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`, see `kv_page`.
        plan: the batch's prefills.
        block_tokens: tokens per vLLM block.
        scale: factor of q·k.
        soft_cap: see `ops.sparse_decode`.
        output: `[num_tokens, num_heads, head_size]`.
    """
    key_cache, value_cache = plan.scratch.chunk(2, dim=2)
    head_size = query.shape[-1]
    for head in range(kv_cache.shape[1]):
        # [num_source_blocks * block_tokens, 1, 2 * head_size]
        rows = kv_cache[:, head, :block_tokens].index_select(0, plan.source_blocks)
        key, value = rows.view(-1, 1, 2 * head_size).split(head_size, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(
            key,
            value,
            key_cache[:, head : head + 1],
            value_cache[:, head : head + 1],
            plan.scratch_slots,
            plan.isa,
        )
    vllm_ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=output,
        query_start_loc=plan.query_start_loc,
        seq_lens=plan.seq_lens,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=plan.scratch_table,
        softcap=soft_cap,
        scheduler_metadata=plan.scheduler_metadata,
        s_aux=None,
    )
