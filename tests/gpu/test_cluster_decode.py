"""cluster_decode does what score, select and sparse_decode do one after another."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batch import CPU, SINKS, UNTOUCHED, Batch, Shape, make_batch, max_near_pages
from gpu.test_cuda_ops import DEVICE, all_shapes, is_close, lengths_around, same_bits
from gpu.test_cuda_ops import pytestmark as needs_a_gpu
from vllm_quest import ops, reference

pytestmark = [
    *needs_a_gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="clusters of CTAs begin with sm_90",
    ),
]


def decodes_alike(batch: Batch) -> bool:
    """Whether outputs are the reference's for the pages that `select` chooses."""
    batch.score()
    batch.select()
    expected = batch.to(CPU)
    batch.pages.fill_(UNTOUCHED)
    batch.scores.fill_(torch.nan)
    batch.cluster_decode()
    expected.sparse_decode(reference)
    assert (batch.out[batch.rows.seq_lens == 0] == 0).all()
    return is_close(batch, expected)


@all_shapes
def test_small_batches(shape: Shape) -> None:
    assert decodes_alike(make_batch(shape, lengths_around(shape.page_size, 4), 4, DEVICE))


@all_shapes
def test_dense_rows(shape: Shape) -> None:
    lengths = lengths_around(shape.page_size, 4)
    assert decodes_alike(make_batch(shape, lengths, ops.UNLIMITED_PAGES, DEVICE))


@pytest.mark.parametrize("first", [0, 1, 5, 2**40])
@pytest.mark.parametrize("percent", [0, 25, 100])
@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("rows", [1, 6, 40])  # clusters of 16 CTAs, of some, and CTAs alone
def test_pages_are_kept_before_others_are_chosen(
    rows: int, page_size: int, percent: int, first: int
) -> None:
    lengths = [1 + 977 * row % 3000 + 100 * page_size for row in range(rows)]
    budgets = [(1, 2, 40, 17, 100, 1000)[row % 6] for row in range(rows)]
    batch = make_batch(Shape(num_kv_heads=4, page_size=page_size), lengths, budgets, DEVICE)
    batch.kept = {"keep_first_pages": first, "keep_newest_percent": percent}
    batch.query[1::3] = 0  # equal scores
    assert decodes_alike(batch)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 17, 33])
def test_clusters_of_every_size(rows: int) -> None:
    lengths = [1000 + 977 * row % 3000 for row in range(rows)]
    assert decodes_alike(make_batch(Shape(num_kv_heads=8), lengths, 40, DEVICE))


@pytest.mark.parametrize("shape", [Shape(num_kv_heads=1), Shape(64, 1, 1)], ids=str)
@pytest.mark.parametrize("rows", [7, 9, 11, 13, 14, 18, 20, 25, 30, 43, 65])
def test_elements_that_clusters_cannot_deal_evenly(rows: int, shape: Shape) -> None:
    """Rows for clusters of many sizes; of which, depends on the GPU."""
    lengths = [1000 + 977 * row % 3000 for row in range(rows)]
    assert decodes_alike(make_batch(shape, lengths, 40, DEVICE))


@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("budget_pages", [1, 2, 9, 40])
def test_many_rows(budget_pages: int, page_size: int) -> None:
    """A CTA has a row and KV head to itself, and its warps copy their best pages early."""
    lengths = [1 + 211 * row % 4000 for row in range(40)]
    batch = make_batch(Shape(num_kv_heads=4, page_size=page_size), lengths, budget_pages, DEVICE)
    batch.query[10:20] = 0  # of equal scores, most warps' best are not chosen
    assert decodes_alike(batch)


@pytest.mark.large
def test_one_long_row() -> None:
    assert decodes_alike(make_batch(Shape(num_kv_heads=8), [131072], 128, DEVICE))


def test_many_rows_with_wide_tables() -> None:
    """Scores for which half of a multiprocessor's shared memory has no room: a CTA has all."""
    pages = ops.max_cluster_pages(4, 128, DEVICE)
    lengths = [20_000] + [1 + 211 * row % 4000 for row in range(149)]
    shape = Shape(num_kv_heads=1, pages_per_block=8)
    assert decodes_alike(make_batch(shape, lengths, 40, DEVICE, max_tokens=pages // 8 * 128))


@pytest.mark.large
def test_a_row_as_long_as_shared_memory_has_room_for() -> None:
    shape = Shape(num_kv_heads=8, pages_per_block=8)
    tokens = ops.max_cluster_pages(4, 128, DEVICE) // 8 * 128
    assert tokens >= 262_144
    assert decodes_alike(make_batch(shape, [tokens - 3], 128, DEVICE, max_tokens=tokens))


def wide_table(shape: Shape) -> int:
    """Tokens of more pages than shared memory has room for."""
    pages = max_near_pages(shape, DEVICE)
    return (pages // shape.pages_per_block + 9) // 4 * 4 * shape.block_tokens


def decodes_far_keys_alike(
    budget_pages: int,
    page_size: int,
    sinks: list[float] | None = None,
    cache: torch.dtype | None = None,
    **kept: int,
) -> bool:
    shape = Shape(num_kv_heads=1, page_size=page_size, cache=cache)
    tokens = wide_table(shape)
    lengths = [tokens - 3, 0, 30, 5000, tokens - 17 * page_size]
    batch = make_batch(shape, lengths, budget_pages, DEVICE, max_tokens=tokens, sinks=sinks)
    batch.kept = kept
    batch.query[4] = 0  # equal scores
    return decodes_alike(batch)


def test_rows_with_far_keys() -> None:
    assert decodes_far_keys_alike(40, page_size=8)


@pytest.mark.parametrize("percent", [0, 25, 100])
def test_rows_with_far_keys_keep_pages(percent: int) -> None:
    kept = {"keep_first_pages": 1, "keep_newest_percent": percent}
    assert decodes_far_keys_alike(40, page_size=8, **kept)


@pytest.mark.large
@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("budget_pages", [1, 2, 40, 20_000, ops.UNLIMITED_PAGES])
def test_far_keys_under_every_budget(budget_pages: int, page_size: int) -> None:
    assert decodes_far_keys_alike(budget_pages, page_size)


@pytest.mark.large
def test_many_rows_with_far_keys() -> None:
    shape = Shape(num_kv_heads=1, page_size=8)
    tokens = wide_table(shape)
    lengths = [1 + 211 * row % 4000 for row in range(148)] + [tokens, tokens - 1]
    assert decodes_alike(make_batch(shape, lengths, 40, DEVICE, max_tokens=tokens))


@pytest.mark.large
@pytest.mark.parametrize("shape", [Shape(64, 2, 7), Shape(96, 1, 16), Shape(256, 2, 1)], ids=str)
def test_far_keys_of_other_shapes(shape: Shape) -> None:
    tokens = wide_table(shape)
    assert decodes_alike(make_batch(shape, [tokens - 5, 70], 9, DEVICE, max_tokens=tokens))


@pytest.mark.large
def test_a_row_of_a_million_tokens() -> None:
    shape = Shape(num_kv_heads=8, pages_per_block=8)
    tokens = 1 << 20
    assert decodes_alike(make_batch(shape, [tokens - 3], 128, DEVICE, max_tokens=tokens))


def test_wide_tables_need_far_keys() -> None:
    pages = ops.max_cluster_pages(4, 128, DEVICE)
    assert pages >= (1 << 18) // 16
    batch = make_batch(Shape(), [20], 4, DEVICE, max_tokens=16 * pages + 64)

    def decode(far_keys: Tensor | None) -> None:
        ops.cluster_decode(
            batch.query,
            batch.kv_cache,
            batch.rows,
            batch.out,
            page_size=batch.shape.page_size,
            scale=batch.scale,
            workspace=batch.workspace,
            far_keys=far_keys,
        )

    far_keys = batch.scores.view(torch.int32)
    with pytest.raises(RuntimeError, match=f"block_table may hold {pages} pages a row without"):
        decode(None)
    with pytest.raises(RuntimeError, match="far_keys must be Int, got Float"):
        decode(batch.scores)
    with pytest.raises(RuntimeError, match="far_keys must have room for"):
        decode(far_keys[..., :-1])
    with pytest.raises(RuntimeError, match="far_keys's rows must begin at multiples of 16 bytes"):
        decode(torch.zeros(1, 2, pages + 5, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("pages_per_block", [2, 3, 4, 8])
def test_blocks_of_several_pages(pages_per_block: int) -> None:
    shape = Shape(num_kv_heads=4, pages_per_block=pages_per_block)
    lengths = [1, 15, 16, 17, 300, 2047, 2048, 2049, 5000]
    assert decodes_alike(make_batch(shape, lengths, 20, DEVICE))


def test_tables_longer_than_shared_memory_keeps() -> None:
    assert decodes_alike(make_batch(Shape(page_size=8), [20_000, 300], 40, DEVICE))


def decodes_what_is_written_beside_it(shape: Shape, lengths: list[int], budget_pages: int) -> None:
    """In a graph, as in a model: each step's new keys and values are in its result."""
    batch = make_batch(shape, lengths, budget_pages, DEVICE)
    last = batch.rows.seq_lens.long() - 1
    row = torch.arange(len(lengths), device=DEVICE)
    slots = batch.rows.block_table[row, last // shape.block_tokens].long() * shape.block_tokens
    slots += last % shape.block_tokens
    sizes = (2, len(lengths), shape.num_kv_heads, shape.head_size)
    new = torch.randn(sizes, device=DEVICE).to(shape.dtype)
    settings = {"page_size": shape.page_size, "scales": batch.scales}

    def step() -> None:
        ops.write_kv(*new, batch.kv_cache, slots, **settings)
        batch.cluster_decode(follows_write_kv=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            step()
    for _ in range(5):
        new.normal_()
        batch.query.normal_()
        batch.out.fill_(torch.nan)
        graph.replay()
        beside = batch.out.clone()
        assert same_bits(batch.cluster_decode(), beside)


GROWING_LENGTHS = [1, 16, 17, 700, 4097, 9000, 2048, 650]


@pytest.mark.parametrize("pages_per_block", [1, 8])
@pytest.mark.parametrize("budget_pages", [4, 40, ops.UNLIMITED_PAGES, ops.UNSETTLED_PAGES])
@pytest.mark.parametrize("times", [1, 3])  # so many rows that each has a CTA alone
def test_decoding_beside_the_write_reads_what_is_written(
    times: int, budget_pages: int, pages_per_block: int
) -> None:
    shape = Shape(num_kv_heads=4, pages_per_block=pages_per_block)
    decodes_what_is_written_beside_it(shape, GROWING_LENGTHS * times, budget_pages)


def test_rows_have_budgets_of_their_own() -> None:
    budget_pages = [1, 2, 16, 64, 100, 101, 128, ops.UNLIMITED_PAGES]
    assert decodes_alike(make_batch(Shape(), [1600] * 8, budget_pages, DEVICE))


def test_long_dense_rows_beside_others() -> None:
    budget_pages = [ops.UNLIMITED_PAGES] + [4] * 20 + [ops.UNLIMITED_PAGES] * 10
    lengths = [9000] + [100] * 20 + [8192, 8193, 0, 1, 12000, 50, 60, 70, 80, 90]
    assert decodes_alike(make_batch(Shape(), lengths, budget_pages, DEVICE))


def test_equal_scores_go_to_lower_pages() -> None:
    batch = make_batch(Shape(num_kv_heads=8), [20000, 700, 9000], 77, DEVICE)
    batch.query[:2] = 0
    assert decodes_alike(batch)


def test_many_equal_scores_beside_a_far_one() -> None:
    batch = make_batch(Shape(num_kv_heads=8), [20000, 9000], 77, DEVICE)
    bounds = batch.kv_cache[:, :, batch.shape.block_tokens :]
    for row in range(2):
        blocks = batch.rows.block_table[row, : 9000 // 16].long()
        bounds[blocks] = bounds[blocks[:1]]
        bounds[blocks[17]] = -1e30 if row else 1e30
    assert decodes_alike(batch)


def test_soft_cap() -> None:
    assert decodes_alike(make_batch(Shape(), [5, 700, 1], 8, DEVICE, soft_cap=3.0))


@pytest.mark.parametrize("budget_pages", [4, ops.UNLIMITED_PAGES])
@all_shapes
def test_sinks(shape: Shape, budget_pages: int) -> None:
    """Also of a row that all CTAs attend to, and of padding."""
    lengths = [*lengths_around(shape.page_size, 4), 9000]
    assert decodes_alike(make_batch(shape, lengths, budget_pages, DEVICE, sinks=SINKS))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 17, 33])
def test_sinks_in_clusters_of_every_size(rows: int) -> None:
    """In gpt-oss's shape."""
    lengths = [1000 + 977 * row % 3000 for row in range(rows)]
    shape = Shape(head_size=64, num_kv_heads=8, group_size=8, pages_per_block=8)
    assert decodes_alike(make_batch(shape, lengths, 40, DEVICE, sinks=SINKS))


def test_sinks_of_rows_with_far_keys() -> None:
    assert decodes_far_keys_alike(40, 8, SINKS)


def test_sinks_without_weight_change_no_bit() -> None:
    budgets = [1, 1, 8, ops.UNLIMITED_PAGES]
    batch = make_batch(Shape(), [1, 0, 700, 9000], budgets, DEVICE)
    without = batch.cluster_decode()
    for sink in (-torch.inf, -200.0):
        sinks = torch.full((8,), sink, dtype=torch.bfloat16, device=DEVICE)
        assert same_bits(replace(batch.fresh(), sinks=sinks).cluster_decode(), without)


def test_strided_query_and_output() -> None:
    batch = make_batch(Shape(), [50, 700], 8, DEVICE)
    wide = torch.zeros(2, 3, *batch.query.shape[1:], dtype=batch.query.dtype, device=DEVICE)
    wide[:, 1] = batch.query
    batch.query = wide[:, 1]
    batch.out = torch.full_like(wide, torch.nan)[:, 2]
    assert decodes_alike(batch)


@pytest.mark.large
def test_a_thousand_rows() -> None:
    lengths = [1 + 37 * row % 300 for row in range(1024)]
    assert decodes_alike(make_batch(Shape(head_size=64), lengths, 8, DEVICE))


def test_results_are_repeatable_bit_for_bit() -> None:
    lengths = [8000, 31, 2500, 0, 640]
    batch = make_batch(Shape(num_kv_heads=8), lengths, 40, DEVICE, sinks=SINKS)
    first = batch.cluster_decode().clone()
    for _ in range(20):
        batch.out.fill_(torch.nan)
        assert same_bits(batch.cluster_decode(), first)


def test_a_captured_graph_serves_other_lengths() -> None:
    shape = Shape(num_kv_heads=4)
    captured = make_batch(shape, [8192] * 4, 40, DEVICE, max_tokens=8192)
    captured.rows.seq_lens.fill_(1)
    captured.cluster_decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.cluster_decode()
    for seed, lengths in enumerate([[5000, 3, 640, 0], [641, 8192, 0, 1], [0, 0, 0, 0]]):
        batch = make_batch(shape, lengths, 40, DEVICE, max_tokens=8192, seed=seed)
        captured.kv_cache[: len(batch.kv_cache)] = batch.kv_cache
        captured.query.copy_(batch.query)
        captured.rows.block_table.copy_(batch.rows.block_table)
        captured.rows.seq_lens.copy_(batch.rows.seq_lens)
        captured.out.fill_(torch.nan)
        graph.replay()
        assert same_bits(captured.out, batch.cluster_decode())


@pytest.mark.large
def test_budgets_longer_than_shared_memory_lists() -> None:
    shape = Shape(num_kv_heads=4)
    lengths = [20_000] + [50] * 40  # so many rows that each has a CTA alone
    assert decodes_alike(make_batch(shape, lengths, 1030, DEVICE))


def test_small_clusters() -> None:
    """For compute-sanitizer: selection and attention by clusters of several CTAs, little data."""
    assert decodes_alike(make_batch(Shape(), [700, 5, 0, 900], 4, DEVICE, sinks=SINKS))
    assert decodes_alike(make_batch(Shape(num_kv_heads=1), [1500], ops.UNLIMITED_PAGES, DEVICE))
