"""What QUEST tells vLLM of itself: the capabilities of the backend, each of them explicit."""

import math
from typing import Any, ClassVar

import torch
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, MultipleOf
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_quest import kv_page, layout, plugin
from vllm_quest.config import QuestConfig
from vllm_quest.support import DTYPES, FP8_CACHE_DTYPES, KV_CACHE_DTYPES, layer_reasons


class QuestBackend(AttentionBackend):
    """The attention backend QUEST (`vllm/v1/attention/backend.py`)."""

    # Decoding begins beside the write, and may do so only directly behind it.
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = list(DTYPES["cpu"])
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [*KV_CACHE_DTYPES, *FP8_CACHE_DTYPES]

    @staticmethod
    def get_name() -> str:
        return plugin.NAME

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        from vllm_quest.impl import QuestImpl

        return QuestImpl

    @staticmethod
    def get_builder_cls() -> type:
        from vllm_quest.metadata import QuestMetadataBuilder

        return QuestMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # Never a fixed size: vLLM would split a block, and leave its bounds with the last part.
        quest = QuestConfig.active()
        return [MultipleOf(layout.unit(quest.page_size, quest.score)[0])]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        # The bounds of 8 pages then lie side by side, and a table has an eighth of the entries.
        quest = QuestConfig.active()
        tokens, _ = layout.unit(quest.page_size, quest.score)
        return max(math.lcm(default_block_size, tokens), 8 * quest.page_size)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        quest = QuestConfig.active()
        return kv_page.with_bounds(spec, quest.page_size, quest.score)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A (block, head) page must be contiguous.
        if current_platform.is_cpu():
            return (KVCacheLayout.LBHNC,)
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True  # dense, by the platform's own backend

    @classmethod
    def supports_sink(cls) -> bool:
        return True  # where the platform's own backend does, see `support.layer_reasons`

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # those that carry whole blocks, see `connectors`

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def validate_configuration(cls, *, device_capability: Any, **layer: Any) -> list[str]:
        """Reasons against a layer (called by the CUDA platform; our wrap does so on the CPU)."""
        return list(layer_reasons(AttentionSelectorConfig(**layer)))
