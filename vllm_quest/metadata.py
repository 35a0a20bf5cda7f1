"""What a batch means to QUEST: which tokens are decode rows, their lengths and their budgets."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_quest import layout
from vllm_quest.budgets import SERVER_DEFAULT, QuestBudgets
from vllm_quest.config import UNLIMITED, QuestConfig
from vllm_quest.decode_plan import DecodePlan, Decodes
from vllm_quest.layers import dense_layer_names, is_full_attention, why_nothing_is_sparse
from vllm_quest.monitor import Monitor
from vllm_quest.ops import UNLIMITED_PAGES
from vllm_quest.platforms import BatchPlanner, PrefillPlan, this_platform
from vllm_quest.support import OTHER_BACKEND

# A name below vLLM's, so that its handlers and levels apply.
logger = init_logger("vllm.quest")


@dataclass
class QuestMetadata(AttentionMetadata):
    """One batch, as every layer of a KV cache group sees it.

    The first `num_decode_rows` tokens are decode rows, the rest belongs to prefills.
    """

    num_actual_tokens: int
    """Tokens of the batch, without padding."""

    num_decode_rows: int

    slot_mapping: torch.Tensor
    """[>= num_actual_tokens] int64: where keys and values are stored; -1 in padding."""

    dense_layers: frozenset[str] = frozenset()
    """Names of the layers whose decode rows attend in full."""

    decode: DecodePlan | None = None

    prefill: PrefillPlan | None = None

    windowed: AttentionMetadata | None = None
    """The platform backend's own metadata, for layers that see part of their context."""


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
        self.is_v2_runner = vllm_config.use_v2_model_runner
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()
        is_full = [is_full_attention(layer) for layer in layers]
        if (reason := why_nothing_is_sparse(vllm_config, self.quest.dense_layers)) is not None:
            logger.warning_once("QUEST: no decode step is sparse: %s", reason)
        self.planner: BatchPlanner | None = None
        if any(is_full):
            self._check_spec(kv_cache_spec)
            self.dense_layers = dense_layer_names(vllm_config, self.quest.dense_layers)
            planner = this_platform().BatchPlanner
            self.planner = planner(kv_cache_spec, layer_names, vllm_config, device, self.quest)
            self.monitor = Monitor.of(vllm_config, device)
            if vllm_config.cache_config.num_gpu_blocks is not None:
                logger.info_once("%s", self._describe())
        self.windowed_builder: AttentionMetadataBuilder[AttentionMetadata] | None = None
        if not all(is_full):
            builder = this_platform().DenseMetadataBuilder
            self.windowed_builder = builder(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Decode batches may be captured, also with several tokens per request."""
        return AttentionCGSupport.UNIFORM_BATCH

    def _describe(self) -> str:
        quest = self.quest
        budget = (
            "no token budget (full attention unless a request asks for less)"
            if quest.token_budget == UNLIMITED
            else f"{quest.token_budget} tokens per KV head and decode step"
        )
        return (
            f"QUEST attends to {budget}, in pages of {quest.page_size}; the first "
            f"{quest.dense_layers} full-attention layers are dense. {self._describe_cache()}"
        )

    def _describe_cache(self) -> str:
        """What bounds or codes cost: tokens that would fit in their place."""
        unit_tokens, unit_rows = layout.unit(self.quest.page_size, self.quest.score)
        tokens = self.vllm_config.cache_config.num_gpu_blocks * self.kv_cache_spec.block_size
        tokens_of_bounds = tokens // unit_tokens * unit_rows
        share = tokens_of_bounds / (tokens + tokens_of_bounds)
        name = "codes" if self.quest.score == "codes" else "bounds"
        return (
            f"The KV cache holds up to {tokens:,} tokens; {name} take the room of "
            f"{tokens_of_bounds:,} more ({share:.1%} of it)."
        )

    def _check_spec(self, spec: AttentionSpec) -> None:
        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"QUEST expected full attention in layers {self.layer_names[0]}..., got "
                f"{type(spec).__name__}; {OTHER_BACKEND}"
            )
        tokens, _ = layout.unit(self.quest.page_size, self.quest.score)
        if spec.block_size % tokens != 0:
            raise ValueError(
                f"vLLM's block size is {spec.block_size}; expected a multiple of {tokens} with "
                f"QUEST's page_size {self.quest.page_size} and score {self.quest.score}: set "
                "--block-size or one of them"
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> QuestMetadata:
        batch = common_attn_metadata
        metadata = QuestMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            num_decode_rows=0,
            slot_mapping=batch.slot_mapping,
        )
        if self.windowed_builder is not None:
            metadata.windowed = self.windowed_builder.build(common_prefix_len, batch, fast_build)
        if self.planner is None:
            return metadata
        if batch.causal is not True:
            raise ValueError(f"QUEST attends causally, and this batch does not; {OTHER_BACKEND}")
        self.monitor.before_step()

        query_lens, is_prefilling = self._requests(batch)
        # On the V1 runner, batches of a draft head say nothing of it.
        is_told = self.is_v2_runner or batch.is_prefilling is not None
        num_decodes = self._num_decodes(query_lens, is_prefilling, is_told)
        metadata.num_decode_rows = int(query_lens[:num_decodes].sum())
        if num_decodes > 0:
            decodes = Decodes(
                query_lens=query_lens[:num_decodes],
                budget_pages=self._budget_pages(self._token_budgets(batch, num_decodes)),
                is_unsettled=is_prefilling[:num_decodes],
            )
            metadata.dense_layers = self.dense_layers
            metadata.decode = self.planner.plan_decode(batch, decodes)
            metadata.decode.counters = self.monitor.counters
            may_begin = self._may_begin_beside_write(query_lens, num_decodes)
            metadata.decode.beside_write = is_told and may_begin
        if num_decodes < len(query_lens):
            metadata.prefill = self.planner.plan_prefill(batch, num_decodes)
        return metadata

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> QuestMetadata:
        metadata: QuestMetadata = super().build_for_cudagraph_capture(common_attn_metadata)
        if self.planner is not None:
            self.monitor.before_capture()
        return metadata

    def _requests(self, batch: CommonAttentionMetadata) -> tuple[np.ndarray, np.ndarray]:
        """Query lengths and whether a prompt is being read, `[num_requests]` int32 and bool.

        The empty requests that fill up a batch for a CUDA graph are left out.
        """
        query_lens = np.diff(batch.query_start_loc_cpu.numpy())
        query_lens = query_lens[: np.count_nonzero(query_lens)]
        is_prefilling = np.zeros(len(query_lens), dtype=bool)
        if batch.is_prefilling is not None:
            known = batch.is_prefilling.numpy()[: len(query_lens)]
            is_prefilling[: len(known)] = known
        return query_lens, is_prefilling

    def _num_decodes(self, query_lens: np.ndarray, is_prefilling: np.ndarray, is_told: bool) -> int:
        """Count the requests at the front that are handled row by row.

        They are decodes (with the drafts to be verified, if any) and one-token ends of prompts.
        Unless the batch tells which requests read prompts, what looks like a decode behind a
        prefill is the end of one, and is attended in full, as ends of prompts are.

        Raises:
            RuntimeError: vLLM put a decode behind a prefill, where it would be attended in full.
        """
        is_decode = ~is_prefilling & (query_lens <= self.reorder_batch_threshold)
        in_rows = is_decode | (query_lens == 1)
        num_decodes = len(in_rows) if in_rows.all() else int(in_rows.argmin())
        if is_told and is_decode[num_decodes:].any():
            raise RuntimeError(
                f"vLLM's batch has decodes behind prefills (query lengths {query_lens.tolist()}, "
                f"prefilling {is_prefilling.tolist()}); QUEST needs decodes first"
            )
        return num_decodes

    def _may_begin_beside_write(self, query_lens: np.ndarray, num_decodes: int) -> bool:
        """Whether no row's pages but its last are written in this step (`DecodePlan.beside_write`).

        To the V1 runner, a request that starts anew after preemption reads a prompt only up to the
        prompt's end. If it finds all tokens but its newest in the prefix cache, it looks like any
        decode, while another request of the batch may only now be computing them: as a prefill,
        since it is more than the few tokens of a decode.
        """
        return self.is_v2_runner or num_decodes == len(query_lens)

    def _token_budgets(self, batch: CommonAttentionMetadata, num_requests: int) -> np.ndarray:
        """Each request's budget, its own or the server's: `[num_requests]` int64, tokens."""
        # No context is longer, and settings of any size fit the array.
        server_default = min(self.quest.token_budget, self.vllm_config.model_config.max_model_len)
        tokens = np.full(num_requests, server_default, dtype=np.int64)
        table = QuestBudgets.table(self.vllm_config)
        if table is not None:
            # The V1 runner has its slots in batch order; V2 says which row is which, though not for
            # a draft model's batches, whose rows then get the server's budget.
            if batch.req_idx is not None:
                own = table[batch.req_idx[:num_requests]]
            else:
                own = table[: 0 if self.is_v2_runner else num_requests]
            tokens[: len(own)] = np.where(own == SERVER_DEFAULT, tokens[: len(own)], own)
        return tokens

    def _budget_pages(self, tokens: np.ndarray) -> np.ndarray:
        """Budgets in tokens, UNLIMITED among them, as pages: `[num_requests]` int32."""
        pages = np.where(tokens == UNLIMITED, UNLIMITED_PAGES, self.quest.pages(tokens))
        return pages.astype(np.int32)
