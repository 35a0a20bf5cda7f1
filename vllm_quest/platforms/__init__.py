"""What differs between CPUs and GPUs: who attends densely, and where a batch's rows are made.

Each platform's module has two classes. `BatchPlanner` works once per batch and KV cache group,
`DenseAttention` once per batch and layer. Dense attention is the platform's own backend's work
(CPU_ATTN, FLASH_ATTN), over QUEST's pages.
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
