"""QUEST attention (query-aware sparsity, arXiv 2406.10774) as a plugin of vLLM."""

from vllm_quest.counters import Counts, QuestStats
from vllm_quest.engine_stats import stats

__all__ = ["Counts", "QuestStats", "stats"]
__version__ = "0.1.0"
