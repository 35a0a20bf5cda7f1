"""What a batch means to QUEST: which tokens are decode rows, their lengths and their budgets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_quest.budgets import SERVER_DEFAULT, QuestBudgets
from vllm_quest.config import UNLIMITED, QuestConfig
from vllm_quest.dense_cpu import DensePrefill, plan_prefill, platform_builder
from vllm_quest.ops import UNLIMITED_PAGES


@dataclass
class DecodeRows:
    """The batch's decode rows: one query token each, first in the batch."""

    seq_lens: Tensor
    """[num_rows] int32, tokens up to and including the row's own."""

    block_table: Tensor
    """[num_rows, max_blocks] int32."""

    budgets: Tensor
    """[num_rows] int32, pages; UNLIMITED_PAGES for rows that must be dense."""

    unlimited: Tensor
    """[num_rows] int32, all UNLIMITED_PAGES: the budgets in dense layers."""

    any_sparse: bool
    """Whether some row exceeds its budget."""

    scores: Tensor
    """[num_rows, num_kv_heads, max_pages] fp32 scratch."""

    pages: Tensor
    """[num_rows, num_kv_heads, max_selected] int32 scratch."""


@dataclass
class QuestMetadata(AttentionMetadata):
    """One batch, as every layer of a KV cache group sees it.

    The first `num_decode_rows` tokens are decode rows, the rest belongs to prefills.
    """

    num_actual_tokens: int
    """Tokens of the batch, without padding."""

    num_decode_rows: int

    rows: DecodeRows | None = None
    prefill: DensePrefill | None = None

    platform: Any = None
    """The platform backend's metadata, for layers with a sliding window."""


class QuestMetadataBuilder(AttentionMetadataBuilder[QuestMetadata]):
    """Makes `QuestMetadata` from vLLM's `CommonAttentionMetadata`, once per batch and group."""

    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.quest = QuestConfig.from_vllm(vllm_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        self.has_quest_layers = any(layer.sliding_window is None for layer in layers)
        has_windows = any(layer.sliding_window is not None for layer in layers)
        self.platform_builder = (
            platform_builder(kv_cache_spec, layer_names, vllm_config, device)
            if has_windows
            else None
        )
        if self.has_quest_layers:
            if type(kv_cache_spec) is not FullAttentionSpec:
                raise ValueError(
                    f"QUEST expected full attention in layers {layer_names[0]}..., got "
                    f"{type(kv_cache_spec).__name__}; choose another --attention-backend"
                )
            if kv_cache_spec.block_size % self.quest.page_size != 0:
                raise ValueError(
                    f"vLLM's block size is {kv_cache_spec.block_size}; expected a multiple of "
                    f"QUEST's page_size, {self.quest.page_size}: set one of them"
                )
            self.block_tokens = kv_cache_spec.block_size

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> QuestMetadata:
        batch = common_attn_metadata
        metadata = QuestMetadata(num_actual_tokens=batch.num_actual_tokens, num_decode_rows=0)
        if self.platform_builder is not None:
            metadata.platform = self.platform_builder.build(common_prefix_len, batch, fast_build)
        if not self.has_quest_layers:
            return metadata
        if batch.causal is not True:
            raise ValueError("QUEST attends causally; this batch does not")

        num_decodes = self._num_decode_requests(batch)
        query_start = batch.query_start_loc_cpu.numpy()
        metadata.num_decode_rows = int(query_start[num_decodes])
        if metadata.num_decode_rows > 0:
            metadata.rows = self._decode_rows(batch, num_decodes)
        if metadata.num_decode_rows < batch.num_actual_tokens:
            metadata.prefill = plan_prefill(
                query_start_loc=batch.query_start_loc[num_decodes:] - query_start[num_decodes],
                seq_lens=batch.seq_lens[num_decodes:],
                block_table=batch.block_table_tensor[num_decodes:],
                block_tokens=self.block_tokens,
                num_heads=self._num_heads(),
                spec=self.kv_cache_spec,
            )
        return metadata

    def _num_heads(self) -> int:
        config = self.vllm_config
        return config.model_config.get_num_attention_heads(config.parallel_config)

    def _num_decode_requests(self, batch: CommonAttentionMetadata) -> int:
        """Count the requests at the front that are handled token by token.

        They are decodes (with the drafts to be verified, if any), and one-token ends of prompts.

        Raises:
            RuntimeError: vLLM put a decode behind a prefill, where it would be attended in full.
        """
        assert batch.is_prefilling is not None
        query_lens = np.diff(batch.query_start_loc_cpu.numpy())
        prefilling = batch.is_prefilling.numpy()[: len(query_lens)]
        is_decode = ~prefilling & (query_lens <= self.reorder_batch_threshold)
        in_rows = is_decode | (query_lens <= 1)
        num_decodes = len(in_rows) if in_rows.all() else int(in_rows.argmin())
        if is_decode[num_decodes:].any():
            raise RuntimeError(
                f"vLLM's batch has decodes behind prefills (query lengths {query_lens.tolist()}, "
                f"prefilling {prefilling.tolist()}); QUEST needs decodes first"
            )
        return num_decodes

    def _decode_rows(self, batch: CommonAttentionMetadata, num_decodes: int) -> DecodeRows:
        query_lens = np.diff(batch.query_start_loc_cpu.numpy()[: num_decodes + 1])
        seq_lens = batch.seq_lens[:num_decodes]
        block_table = batch.block_table_tensor[:num_decodes]
        budgets = self._budget_pages(batch, num_decodes)
        if (query_lens != 1).any():
            # Several tokens of one request: a row each, which sees the tokens up to itself.
            request = torch.from_numpy(np.repeat(np.arange(num_decodes), query_lens))
            tokens_after = np.concatenate([np.arange(n)[::-1] for n in query_lens])
            seq_lens = seq_lens[request] - torch.from_numpy(tokens_after.astype(np.int32))
            block_table = block_table[request]
            budgets = np.repeat(budgets, query_lens)

        num_pages = -(-seq_lens.numpy() // self.quest.page_size)
        is_sparse = num_pages > budgets
        max_pages = block_table.shape[1] * self.block_tokens // self.quest.page_size
        max_selected = int(budgets[is_sparse].max(initial=0))
        num_rows, num_kv_heads = len(budgets), self.kv_cache_spec.num_kv_heads
        return DecodeRows(
            seq_lens=seq_lens,
            block_table=block_table,
            budgets=torch.from_numpy(budgets),
            unlimited=torch.full((num_rows,), UNLIMITED_PAGES, dtype=torch.int32),
            any_sparse=bool(is_sparse.any()),
            scores=torch.empty(num_rows, num_kv_heads, max_pages),
            pages=torch.empty(num_rows, num_kv_heads, max_selected, dtype=torch.int32),
        )

    def _budget_pages(self, batch: CommonAttentionMetadata, num_decodes: int) -> np.ndarray:
        """Each request's budget in pages, `[num_decodes]` int32: its own, or the server's."""
        tokens = np.full(num_decodes, self.quest.token_budget, dtype=np.int64)
        table = QuestBudgets.table(self.vllm_config)
        if table is not None:
            # The V1 runner has its slots in batch order; V2 says which row is which.
            slots = slice(num_decodes) if batch.req_idx is None else batch.req_idx[:num_decodes]
            own = table[slots]
            tokens = np.where(own == SERVER_DEFAULT, tokens, own)
        pages = self.quest.pages(tokens)
        assert batch.is_prefilling is not None
        is_dense = (tokens == UNLIMITED) | batch.is_prefilling.numpy()[:num_decodes]
        return np.where(is_dense, UNLIMITED_PAGES, pages).astype(np.int32)
