"""What differs between CPUs and GPUs: who attends densely, and where a batch's rows are made.

A platform's module has four names:

    DenseImpl, DenseMetadataBuilder   the platform's own backend, CPU_ATTN or FLASH_ATTN; serves
                                      layers with a sliding window by itself
    BatchPlanner                      makes decode rows and prefill plans, once per batch and group
    attend_prefill                    dense attention over QUEST's pages, once per layer
"""

from types import ModuleType

from vllm.platforms import current_platform


def this_platform() -> ModuleType:
    """The module for the device that vLLM runs on."""
    if current_platform.is_cpu():
        from vllm_quest.platforms import cpu

        return cpu
    from vllm_quest.platforms import cuda

    return cuda
