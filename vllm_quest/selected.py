"""What selecting QUEST does to an engine's configuration, in the process that makes it."""

from typing import TYPE_CHECKING

from vllm_quest import connectors, metrics
from vllm_quest.budgets import QuestBudgets
from vllm_quest.config import QuestConfig
from vllm_quest.counters import WORKER_EXTENSION
from vllm_quest.support import refuse_unsupported

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def prepare(vllm_config: "VllmConfig") -> None:
    """Refuse what cannot be served; let requests be checked, and workers be asked and heard.

    Raises:
        ValueError: see `refuse_unsupported`.
    """
    refuse_unsupported(vllm_config)
    QuestConfig.from_vllm(vllm_config).activate()
    connectors.prepare(vllm_config.kv_transfer_config)
    QuestBudgets.note_engine(vllm_config)
    if not vllm_config.parallel_config.worker_extension_cls:
        vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION
    metrics.expose()
