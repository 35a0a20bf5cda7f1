"""Caches that `benchmarks/gpu_serving.py --random-kv` makes up have the bounds of their keys."""

import pytest
import torch

from benchmarks.random_kv import write_bounds
from checked_bounds import check_row
from vllm_quest import layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("block_tokens", "page_size"), [(128, 16), (16, 16), (64, 8)])
def test_bounds_are_those_of_the_keys(block_tokens, page_size, dtype):
    block_rows = layout.block_rows(block_tokens, page_size, "minmax")
    cache = torch.randn(5, 2, block_rows, 2 * 64).to(dtype)
    before = cache.clone()
    write_bounds(cache, page_size)
    cache, before = cache.bfloat16(), before.bfloat16()
    assert torch.equal(cache[:, :, :block_tokens], before[:, :, :block_tokens])
    block_table = torch.tensor([3, 0, 4, 1, 2])
    assert (
        check_row(cache, block_table, 5 * block_tokens, page_size) == 5 * block_tokens // page_size
    )
