"""Why LMCache is refused: it takes the rows of a block for its tokens."""

import pytest
import torch

from vllm_quest import layout

utils = pytest.importorskip("lmcache.v1.gpu_connector.utils", reason="needs the package lmcache")


def block_tokens(block_rows: int) -> int:
    """What LMCache says of caches of two layers, as vLLM hands them over."""
    from lmcache.utils import EngineType

    caches = [torch.zeros(5, 2, block_rows, 2 * 64) for _ in range(2)]
    hints = {"kv_layout": "HND"}
    kv_format, caches = utils.normalize_kv_and_discover_format(caches, EngineType.VLLM, hints)
    return utils.get_block_size(caches, kv_format)


def test_rows_of_bounds_pass_for_tokens():
    assert block_tokens(128) == 128
    assert block_tokens(layout.block_rows(128, 16, "minmax")) == 136
