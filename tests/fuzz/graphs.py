"""What layers are given and give in steps that CUDA graphs run: the graphs copy it here."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from batch import FP8
from vllm_quest import ops
from vllm_quest.impl import QuestImpl
from vllm_quest.layers import is_full_attention

ROOM_TOKENS = 1024
"""What is kept of a step; the largest graph has fewer."""


@dataclass
class Tap:
    """A layer, and its last step if a graph ran it."""

    impl: QuestImpl
    layer: Any
    kv_cache: Tensor  # as vLLM has it: fp8 as uint8
    query: Tensor  # [ROOM_TOKENS, num_heads, head_size]
    key: Tensor  # [ROOM_TOKENS, num_kv_heads, head_size]
    value: Tensor  # the same
    out: Tensor  # [ROOM_TOKENS, num_heads, head_size]

    @property
    def scales(self) -> ops.KvScales | None:
        """Of an fp8 cache."""
        if not self.impl.has_fp8_cache:
            return None
        return ops.KvScales(self.layer._k_scale, self.layer._v_scale)

    @property
    def typed_cache(self) -> Tensor:
        """As the operators take it."""
        return self.kv_cache.view(FP8) if self.impl.has_fp8_cache else self.kv_cache


TAPS: dict[str, Tap] = {}
"""By layer, in the order in which they run."""


@contextlib.contextmanager
def tapped() -> Iterator[None]:
    """Let graphs that are captured from now on fill `TAPS`, which is emptied at the end."""
    forward = QuestImpl.forward

    def tapping(
        impl: QuestImpl,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        output: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        out = forward(impl, layer, query, key, value, kv_cache, metadata, output, *rest, **named)
        if is_full_attention(layer):
            given = (query, key, value, output)
            if layer.layer_name not in TAPS:
                # In a run that warms up, so that no graph's pool of memory has them.
                room = [each.new_zeros(ROOM_TOKENS, *each.shape[1:]) for each in given]
                TAPS[layer.layer_name] = Tap(impl, layer, kv_cache, *room)
            if torch.cuda.is_current_stream_capturing():
                tap = TAPS[layer.layer_name]
                tap.kv_cache = kv_cache  # not one that vLLM measured memory with
                for kept, each in zip((tap.query, tap.key, tap.value, tap.out), given, strict=True):
                    kept[: len(each)].copy_(each)
        return out

    try:
        with mock.patch.object(QuestImpl, "forward", tapping):
            yield
    finally:
        TAPS.clear()
