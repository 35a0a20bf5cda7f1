"""NVIDIA GPUs: lengths stay on the device, and vLLM's FLASH_ATTN attends densely.

A decode batch may be captured in a CUDA graph and replayed with other lengths, tables and
budgets. All that it reads therefore lives in tensors that stay in place: vLLM's own, and those
made here once.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from vllm_quest import ops
from vllm_quest.config import QuestConfig
from vllm_quest.decode_plan import DecodePlan, Decodes
from vllm_quest.support import FP8_CACHE_DTYPES

SCORES_BYTES = 64 << 20
"""Room for one pass's scores; more rows take several passes, each of which fills any GPU."""

DenseMetadataBuilder = FlashAttentionMetadataBuilder


class DenseImpl(FlashAttentionImpl):
    """FLASH_ATTN, for queries in the model's dtype whatever the cache's is.

    With an fp8 cache it wants an fp8 query, which vLLM's layer makes for FLASH_ATTN's own layers.
    """

    def forward(
        self,
        layer: Any,
        query: Tensor,  # [num_tokens, num_heads, head_size]
        *arguments: Any,
    ) -> Tensor:
        if self.kv_cache_dtype in FP8_CACHE_DTYPES and self.supports_quant_query_input:
            rounded, _ = vllm_ops.scaled_fp8_quant(query.flatten(1), layer._q_scale)
            query = rounded.view(query.shape)
        attended: Tensor = super().forward(layer, query, *arguments)
        return attended


class PrefillMetadataBuilder(FlashAttentionMetadataBuilder):
    """FLASH_ATTN's metadata for a batch's prefills, which no CUDA graph holds."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.use_full_cuda_graph = False


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
        self.prefill_builder = PrefillMetadataBuilder(spec, layer_names, vllm_config, device)
        scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
        speculation = vllm_config.speculative_config
        tokens_per_decode = 1 + (speculation.num_speculative_tokens if speculation else 0)
        num_rows = max(
            scheduler.max_num_seqs * tokens_per_decode, compilation.max_cudagraph_capture_size or 0
        )
        self.max_blocks = -(-vllm_config.model_config.max_model_len // spec.block_size)
        pages = self.max_blocks * spec.block_size // quest.page_size
        pages = -(-pages // 4) * 4  # fp32, so that each row begins at a multiple of 16 bytes
        # Codes weigh pages by query head.
        num_heads = (
            self.prefill_builder.num_heads_q if quest.score == "codes" else spec.num_kv_heads
        )
        rows_per_pass = SCORES_BYTES // (4 * num_heads * pages)
        rows_per_pass = max(1, min(rows_per_pass, num_rows))
        scratch_shape = (rows_per_pass, spec.num_kv_heads, pages)
        self.budget_pages = torch.ones(num_rows, dtype=torch.int32, device=device)
        self.budget_pages_on_host = np.ones(num_rows, dtype=np.int32)
        """What `budget_pages` holds, so that equal budgets are not copied again."""
        self.unlimited = torch.full_like(self.budget_pages, ops.UNLIMITED_PAGES)
        self.scores = torch.empty(scratch_shape, device=device)
        self.pages = torch.empty(scratch_shape, dtype=torch.int32, device=device)
        group_size = self.prefill_builder.num_heads_q // spec.num_kv_heads
        self.workspace = ops.decode_workspace(group_size, spec.head_size, device)
        is_fp8 = spec.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR
        shape = (group_size, spec.head_size, device)
        self.in_clusters = (
            pages <= ops.max_cluster_pages(*shape, far_keys=True, is_fp8=is_fp8)
            and tokens_per_decode <= (ops.GROWING_PAGES - 1) * quest.page_size
        )
        # A layer decodes in clusters or scores pages, never both: one scratch serves.
        keys_are_far = pages > ops.max_cluster_pages(*shape, is_fp8=is_fp8)
        self.far_keys = self.scores.view(torch.int32) if keys_are_far else None
        if tokens_per_decode > 1:
            self.row_seq_lens = torch.zeros_like(self.budget_pages)
            table_shape = (num_rows, self.max_blocks)
            self.row_tables = torch.zeros(table_shape, dtype=torch.int32, device=device)

    def plan_decode(self, batch: CommonAttentionMetadata, decodes: Decodes) -> DecodePlan:
        """Lay out the rows of the batch's decodes."""
        num_requests = len(decodes.query_lens)
        seq_lens = batch.seq_lens[:num_requests]
        # vLLM rounds its tables up.
        block_table = batch.block_table_tensor[:num_requests, : self.max_blocks]
        budget_pages = decodes.budget_pages_of_row()
        if not decodes.one_row_each:
            seq_lens, block_table = self._expand(
                seq_lens, block_table, decodes.request_of_row(), decodes.tokens_after_row()
            )
        num_rows = len(budget_pages)
        if not np.array_equal(self.budget_pages_on_host[:num_rows], budget_pages):
            self.budget_pages_on_host[:num_rows] = budget_pages
            async_tensor_h2d(budget_pages, out=self.budget_pages[:num_rows])
        return DecodePlan(
            rows=ops.Rows(block_table, seq_lens, self.budget_pages[:num_rows]),
            unlimited=self.unlimited[:num_rows],
            any_sparse=True,
            in_clusters=self.in_clusters,
            far_keys=self.far_keys,
            scores=self.scores,
            pages=self.pages,
            workspace=self.workspace,
        )

    def _expand(
        self, seq_lens: Tensor, block_table: Tensor, request: np.ndarray, tokens_after: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Give every row of a request its own length and table row, in tensors that stay."""
        num_rows, width = len(request), block_table.shape[1]
        device = seq_lens.device
        request_of_row = async_tensor_h2d(request, device=device)
        row_seq_lens, row_tables = self.row_seq_lens[:num_rows], self.row_tables[:num_rows, :width]
        tokens_after_row = async_tensor_h2d(tokens_after, device=device)
        torch.sub(seq_lens[request_of_row], tokens_after_row, out=row_seq_lens).clamp_(min=0)
        row_tables.copy_(block_table[request_of_row])
        # A graph captured for more rows takes the rest for padding.
        self.row_seq_lens[num_rows:].zero_()
        return row_seq_lens, row_tables

    def plan_prefill(self, batch: CommonAttentionMetadata, first: int) -> FlashAttentionMetadata:
        """FLASH_ATTN's metadata for the prefills of a batch: its requests from `first` on."""
        if first > 0:
            start = int(batch.query_start_loc_cpu[first])
            upper_bound = batch.seq_lens_cpu_upper_bound
            batch = batch.replace(
                query_start_loc=batch.query_start_loc[first:] - start,
                query_start_loc_cpu=batch.query_start_loc_cpu[first:] - start,
                seq_lens=batch.seq_lens[first:],
                num_reqs=batch.num_reqs - first,
                num_actual_tokens=batch.num_actual_tokens - start,
                block_table_tensor=batch.block_table_tensor[first:],
                slot_mapping=batch.slot_mapping[start:],
                seq_lens_cpu_upper_bound=None if upper_bound is None else upper_bound[first:],
            )
        return self.prefill_builder.build(0, batch)


def attend_prefill(
    impl: DenseImpl,
    layer: Any,
    query: Tensor,
    kv_cache: Tensor,
    plan: FlashAttentionMetadata,
    output: Tensor,
) -> None:
    """Attend causally and in full.

    Args:
        impl: FLASH_ATTN's implementation for the layer.
        layer: the vLLM layer.
        query: `[num_tokens, num_heads, head_size]`.
        kv_cache: `[num_blocks, num_kv_heads, block_tokens, 2 * head_size]`, without bounds.
        plan: the batch's prefills.
        output: `[num_tokens, num_heads, head_size]`.
    """
    impl.forward(layer, query, query, query, kv_cache, plan, output)
