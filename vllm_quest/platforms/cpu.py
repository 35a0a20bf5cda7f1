"""CPUs: lengths are known to the host, and vLLM's CPU_ATTN kernels attend densely.

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
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_quest.config import QuestConfig
from vllm_quest.decode_plan import DecodePlan, Decodes
from vllm_quest.layers import is_full_attention
from vllm_quest.ops import UNLIMITED_PAGES, Rows

SCRATCH_BLOCK_TOKENS = 128
"""Tokens per block of the scratch cache: CPU_ATTN's own default."""

DenseImpl = CPUAttentionBackendImpl


class DenseMetadataBuilder(CPUAttentionMetadataBuilder):
    """CPU_ATTN's metadata for the layers of a group that QUEST leaves to it."""

    def _group_sliding_window(self) -> int:
        """The window that these layers share, else -1.

        CPU_ATTN's own looks for its implementation in the layers, and finds QUEST's. A context is
        then split without regard to the window, and vLLM 0.32 weighs sinks wrongly where a split
        lies outside of it.
        """
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        windows = {
            impl.sliding_window
            for layer in layers.values()
            if not is_full_attention(layer)
            for impl in layer.impl.get_impl_variants()
            if isinstance(impl, DenseImpl)
        }
        return windows.pop() if len(windows) == 1 else -1


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


class BatchPlanner:
    """Makes decode rows and prefill plans from vLLM's batches."""

    def __init__(
        self,
        spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        quest: QuestConfig,
    ) -> None:
        self.spec = spec
        self.num_heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        self.quest = quest

    def plan_decode(self, batch: CommonAttentionMetadata, decodes: Decodes) -> DecodePlan:
        """Lay out the rows of the batch's decodes."""
        num_requests = len(decodes.query_lens)
        seq_lens = batch.seq_lens[:num_requests]
        block_table = batch.block_table_tensor[:num_requests]
        budget_pages = decodes.budget_pages_of_row()
        if not decodes.one_row_each:
            request = decodes.request_of_row()
            seq_lens = seq_lens[request] - torch.from_numpy(decodes.tokens_after_row())
            block_table = block_table[request]
        is_sparse = self.quest.pages(seq_lens.numpy()) > budget_pages
        num_rows, num_kv_heads = len(budget_pages), self.spec.num_kv_heads
        max_pages = block_table.shape[1] * self.spec.block_size // self.quest.page_size
        max_selected = int(budget_pages[is_sparse].max(initial=0))
        return DecodePlan(
            rows=Rows(block_table, seq_lens, torch.from_numpy(budget_pages)),
            unlimited=torch.full((num_rows,), UNLIMITED_PAGES, dtype=torch.int32),
            any_sparse=bool(is_sparse.any()),
            scores=torch.empty(num_rows, num_kv_heads, max_pages),
            pages=torch.empty(num_rows, num_kv_heads, max_selected, dtype=torch.int32),
            workspace=None,
        )

    def plan_prefill(self, batch: CommonAttentionMetadata, first: int) -> DensePrefill:
        """Lay out the scratch cache for the prefills of a batch: its requests from `first` on."""
        spec, block_tokens = self.spec, self.spec.block_size
        query_start_loc = batch.query_start_loc[first:] - batch.query_start_loc[first]
        seq_lens = batch.seq_lens[first:]
        table = batch.block_table_tensor[first:].numpy()
        lens = seq_lens.numpy()
        num_requests = len(lens)
        num_source_blocks = -(-lens // block_tokens)
        num_scratch_blocks = -(-lens // SCRATCH_BLOCK_TOKENS)
        first_scratch_block = np.concatenate([[0], np.cumsum(num_scratch_blocks)])

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
                num_heads=self.num_heads,
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


def attend_prefill(
    impl: CPUAttentionBackendImpl,
    layer: Any,
    query: Tensor,
    kv_cache: Tensor,
    plan: DensePrefill,
    output: Tensor,
) -> None:
    """Attend causally and in full.

    Args:
        impl: CPU_ATTN's implementation for the layer.
        layer: the vLLM layer.
        query: `[num_tokens, num_heads, head_size]`.
        kv_cache: `[num_blocks, num_kv_heads, block_tokens, 2 * head_size]`, without bounds.
        plan: the batch's prefills.
        output: `[num_tokens, num_heads, head_size]`.
    """
    key_cache, value_cache = plan.scratch.chunk(2, dim=2)
    head_size = query.shape[-1]
    for head in range(kv_cache.shape[1]):
        # [num_source_blocks * block_tokens, 1, 2 * head_size]
        rows = kv_cache[:, head].index_select(0, plan.source_blocks)
        key, value = rows.view(-1, 1, 2 * head_size).chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(
            key,
            value,
            key_cache[:, head : head + 1],
            value_cache[:, head : head + 1],
            plan.scratch_slots,
            plan.isa,
        )
    sinks = impl.sinks
    if sinks is not None and sinks.dtype == torch.float16:
        sinks = sinks.float()  # the kernel takes bf16 and fp32
    vllm_ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=output,
        query_start_loc=plan.query_start_loc,
        seq_lens=plan.seq_lens,
        scale=impl.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=plan.scratch_table,
        softcap=impl.logits_soft_cap,
        scheduler_metadata=plan.scheduler_metadata,
        s_aux=sinks,
    )
