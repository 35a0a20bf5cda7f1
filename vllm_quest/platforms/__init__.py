"""What differs between CPUs and GPUs: who attends densely, and where a batch's rows are made."""

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_quest.config import QuestConfig
from vllm_quest.decode_plan import DecodePlan, Decodes

PrefillPlan: TypeAlias = Any
"""What a platform's planner tells its `attend_prefill` of a batch; nobody else looks inside."""


class BatchPlanner(Protocol):
    """Makes the plans of a batch's decodes and prefills, once per batch and KV cache group."""

    def __init__(
        self,
        spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        quest: QuestConfig,
    ) -> None: ...

    def plan_decode(self, batch: CommonAttentionMetadata, decodes: Decodes) -> DecodePlan:
        """Lay out the rows of the decodes at the batch's front."""

    def plan_prefill(self, batch: CommonAttentionMetadata, first: int) -> PrefillPlan:
        """Lay out the prefills of a batch: its requests from `first` on."""


class Platform(Protocol):
    """The names that a platform's module has."""

    @property
    def DenseImpl(self) -> type[AttentionImpl[Any]]:
        """The platform's own backend, CPU_ATTN or FLASH_ATTN: it serves layers with a sliding
        window by itself."""

    @property
    def DenseMetadataBuilder(self) -> type[AttentionMetadataBuilder[AttentionMetadata]]:
        """That backend's builder."""

    @property
    def BatchPlanner(self) -> type[BatchPlanner]:
        """See `BatchPlanner`."""

    def attend_prefill(
        self,
        impl: Any,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        plan: PrefillPlan,
        output: Tensor,
    ) -> None:
        """Dense causal attention over QUEST's pages, once per layer.

        Args:
            impl: the layer's `DenseImpl`.
            layer: the vLLM layer.
            query: `[num_tokens, num_heads, head_size]`.
            kv_cache: `[num_blocks, num_kv_heads, block_tokens, 2 * head_size]`, without bounds.
            plan: the batch's prefills.
            output: `[num_tokens, num_heads, head_size]`.
        """


def this_platform() -> Platform:
    """The module for the device that vLLM runs on."""
    if current_platform.is_cpu():
        from vllm_quest.platforms import cpu

        return cpu
    from vllm_quest.platforms import cuda

    return cuda
