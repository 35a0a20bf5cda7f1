"""The CUDA `sparse_decode` counts what the reference counts, replay by replay."""

import pytest
import torch

from gpu.batches import Batch, Shape, make_batch
from vllm_quest import extension, ops, reference

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not extension.library("cuda").exists(), reason="the CUDA operators are not built"
    ),
]


def decode(batch: Batch, operators, counters: torch.Tensor) -> None:
    operators.sparse_decode(
        batch.query,
        batch.kv_cache,
        batch.block_table,
        batch.seq_lens,
        batch.budgets,
        batch.pages,
        batch.shape.page_size,
        batch.scale,
        batch.soft_cap,
        batch.out,
        batch.workspace,
        counters,
    )


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("shape", [Shape(), Shape(num_kv_heads=5, group_size=1)], ids=str)
def test_counters_match(shape: Shape, rows: int) -> None:
    """Rows of padding, within their budget and beyond it; once eagerly, three times in a graph."""
    lengths = [(0, 1, 64, 65, 1500)[(row + 3) % 5] for row in range(rows)]
    budgets = [(4, 4, ops.UNLIMITED_PAGES)[row % 3] for row in range(rows)]
    batch = make_batch(shape, lengths, budgets, DEVICE)
    batch.score()
    batch.select()
    expected = torch.zeros(5, dtype=torch.int64)
    decode(batch.to("cpu"), reference, expected)
    assert expected.count_nonzero() == 5 or rows == 1

    counters = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    decode(batch, ops, counters)
    assert torch.equal(counters.cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(batch, ops, counters)
    for _ in range(3):
        graph.replay()
    assert torch.equal(counters.cpu(), 4 * expected)
