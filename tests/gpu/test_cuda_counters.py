"""The CUDA `sparse_decode` counts what the reference counts, replay by replay."""

import pytest
import torch

from batch import CPU, Shape, make_batch
from vllm_quest import extension, ops, reference

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not extension.library("cuda").exists(), reason="the CUDA operators are not built"
    ),
]


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("shape", [Shape(), Shape(num_kv_heads=5, group_size=1)], ids=str)
def test_counters_match(shape: Shape, rows: int) -> None:
    """Rows of padding, within their budget and beyond it; once eagerly, three times in a graph."""
    lengths = [(0, 1, 64, 65, 1500)[(row + 3) % 5] for row in range(rows)]
    budget_pages = [(4, 4, ops.UNLIMITED_PAGES)[row % 3] for row in range(rows)]
    batch = make_batch(shape, lengths, budget_pages, DEVICE)
    batch.score()
    batch.select()
    expected = torch.zeros(5, dtype=torch.int64)
    batch.to(CPU).sparse_decode(reference, counters=expected)
    assert expected.count_nonzero() == 5 or rows == 1

    counters = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    batch.sparse_decode(counters=counters)
    assert torch.equal(counters.cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.sparse_decode(counters=counters)
    for _ in range(3):
        graph.replay()
    assert torch.equal(counters.cpu(), 4 * expected)
