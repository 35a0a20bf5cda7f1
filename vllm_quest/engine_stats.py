"""`vllm_quest.stats(llm)`: what an offline engine's decode steps have read."""

from typing import TYPE_CHECKING

from vllm_quest.counters import WORKER_EXTENSION, WORKER_METHOD, Counts, QuestStats, total

if TYPE_CHECKING:
    from vllm import LLM


def stats(llm: "LLM") -> QuestStats:
    """What an engine's decode steps have read since it started, summed over its workers.

    Waits for the device. vLLM's own warm-up steps count, but for those of CUDA graph capture.

    Raises:
        ValueError: the engine does not use QUEST, or its workers cannot be asked.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_quest.plugin import is_selected

    vllm_config = llm.llm_engine.vllm_config
    if not is_selected(vllm_config):
        raise ValueError("the engine does not use QUEST: give LLM attention_backend='QUEST'")
    extension = vllm_config.parallel_config.worker_extension_cls
    if not hasattr(resolve_obj_by_qualname(extension), WORKER_METHOD):
        raise ValueError(
            f"worker_extension_cls is {extension}: let it inherit {WORKER_EXTENSION}, which "
            "answers for QUEST's counters"
        )
    workers = llm.collective_rpc(WORKER_METHOD)
    counts = total(Counts(*worker["counts"]) for worker in workers)
    return QuestStats.of(counts, workers[0]["page_size"], workers[0]["score"])
