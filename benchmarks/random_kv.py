"""Requests of any context without their prefill: a worker's KV cache is made up, bounds included.

A worker extension (`--worker-extension-cls`) for models that keep their decoder layers as Llama
does. Prefill then runs the first layer alone, without CUDA graphs; decode steps are CUDA graphs of
all layers, captured before.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_quest import layout
from vllm_quest.impl import QuestImpl

CHUNK_BLOCKS = 256
"""Blocks that are made up at a time, which limits the memory that it takes."""

FP8 = torch.float8_e4m3fn
"""Of fp8 caches, which vLLM keeps as uint8. Their scales are 1 where weights are made up."""


class Extension:
    """Methods that `collective_rpc` reaches."""

    model_runner: Any

    def make_up_kv_cache(self) -> None:
        """Fill all blocks with random keys and values, and with the bounds of these keys."""
        for layer in self.model_runner.compilation_config.static_forward_context.values():
            cache = layer.kv_cache
            if cache.dtype == torch.uint8:
                cache = cache.view(FP8)
                for blocks in cache.split(CHUNK_BLOCKS):
                    blocks.copy_(torch.randn(blocks.shape, device=cache.device))
            else:
                cache.normal_()
            if isinstance(layer.impl, QuestImpl):
                quest = layer.impl.quest
                if quest.score != "minmax":
                    raise ValueError(f"bounds are made up for minmax alone, not for {quest.score}")
                for blocks in cache.split(CHUNK_BLOCKS):
                    write_bounds(blocks, quest.page_size)

    def prefill_one_layer(self) -> None:
        """From now on, steps without CUDA graphs run the first layer alone."""
        model = self.model_runner.model.model
        model.end_layer = model.start_layer + 1


def write_bounds(blocks: Tensor, page_size: int) -> None:
    """Write the bounds of minmax; `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`."""
    tokens = layout.block_tokens(blocks.shape[2], page_size, "minmax")
    head_size = blocks.shape[3] // 2
    keys = blocks[:, :, :tokens, :head_size].unflatten(2, (-1, page_size))
    if blocks.dtype == FP8:
        keys = keys.bfloat16()  # which has all numbers of fp8, and a minimum
    blocks[:, :, tokens:, :head_size] = keys.amin(3)
    blocks[:, :, tokens:, head_size:] = keys.amax(3)
