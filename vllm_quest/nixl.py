"""NIXL's connectors, which also compare what QUEST's blocks hold before they hand over any.

Two engines compare a hash of their model, dtype and attention backend, and later the sizes of their
blocks. That leaves two differences unseen. Scores made of bounds take blocks of one size. And vLLM
cuts a block of 256 tokens into two of 128 by rows, which puts bounds between keys. So the settings
that decide what a block holds stand behind the hash, where the message of a mismatch shows them.

vLLM takes the classes from here because `connectors.prepare` names this module in its configuration
(`kv_connector_module_path`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector

from vllm_quest.config import QuestConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def block_contents(vllm_config: "VllmConfig") -> str:
    """What two engines must agree on, in words."""
    quest = QuestConfig.from_vllm(vllm_config)
    return (
        f"QUEST with blocks of {vllm_config.cache_config.block_size} tokens, pages of "
        f"{quest.page_size}, score {quest.score}"
    )


class NixlPullConnector(connector.NixlPullConnector):
    """The engine that decodes reads blocks from the one that prefilled them."""

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        worker = self.connector_worker
        worker.compat_hash = f"{worker.compat_hash} ({block_contents(self._vllm_config)})"
        worker.xfer_handshake_metadata = replace(
            worker.xfer_handshake_metadata, compatibility_hash=worker.compat_hash
        )


NixlConnector = NixlPullConnector
