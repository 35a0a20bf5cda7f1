"""What vLLM 0.32 does wrongly on CPUs with any attention backend, mended: answers can be compared.

Both faults made greedy answers depend on what shares a batch with their requests.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.sample import rejection_sampler

from engines import ON_GPU

forward_cpu = RotaryEmbedding.forward_cpu


def rotate_every_token(
    rotary: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`RotaryEmbedding.forward_cpu`, also for a query of `[num_tokens, num_heads, head_size]`.

    LFM2 has such (`vllm/model_executor/models/lfm2.py`, line 176), and the operator
    `_C.rotary_embedding` takes each head of it for a token: it rotates the first 1 / num_heads of a
    batch's tokens, so that an answer depends on its tokens' places in their batches.
    """
    forward_cpu(rotary, positions, query.flatten(1), None if key is None else key.flatten(1))
    return query, key


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """`expand_batch_to_tokens` of `vllm/v1/sample/rejection_sampler.py`.

    On CPUs `_expand_kernel_impl` (`vllm/utils/cpu_triton_utils.py`, line 390) writes to a copy of
    the output. Where a request of a batch with drafts is not greedy, all logits are then divided by
    temperatures that nobody wrote.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return x.where(x != replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Mend engines of this process."""
    if ON_GPU:
        yield
        return
    rotary = mock.patch.object(RotaryEmbedding, "forward_cpu", rotate_every_token)
    expand = mock.patch.object(rejection_sampler, "expand_batch_to_tokens", expand_batch_to_tokens)
    with rotary, expand:
        yield
