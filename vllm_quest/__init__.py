"""QUEST attention (query-aware sparsity, arXiv 2406.10774) as a plugin of vLLM."""

__version__ = "0.1.0"
