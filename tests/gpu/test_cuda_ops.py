"""The CUDA operators compute what `vllm_quest/reference.py` says, at any shape, at any time.

pytest tests/gpu    all of it, on a machine with a GPU
make sanitize       all but the tests marked large, under compute-sanitizer's three tools
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batch import (
    CPU,
    SINKS,
    UNIT_ROUNDOFF,
    UNTOUCHED,
    Batch,
    Shape,
    empty_cache,
    kv_scales,
    make_batch,
    rows_to_select,
    score_error,
)
from vllm_quest import extension, ops, reference
from vllm_quest.config import BOUNDS, Score

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not extension.library("cuda").exists(), reason="the CUDA operators are not built"
    ),
]

SHAPES = [
    Shape(),
    Shape(dtype=torch.float16),
    Shape(group_size=1, num_kv_heads=5),
    Shape(group_size=7),
    Shape(group_size=8, pages_per_block=4),
    Shape(group_size=16, dtype=torch.float16),
    Shape(group_size=12, head_size=64, pages_per_block=2),
    Shape(head_size=64),
    Shape(head_size=96, is_strided=True),
    Shape(head_size=96, group_size=9, page_size=32),
    Shape(head_size=256),
    Shape(head_size=256, group_size=16, page_size=32),
    Shape(page_size=32, is_strided=True),
    Shape(page_size=8, pages_per_block=3),
    Shape(page_size=48, num_kv_heads=1),
]


def shape_name(shape: Shape) -> str:
    changed = (f"{k}={v}" for k, v in vars(shape).items() if v != getattr(Shape(), k))
    return " ".join(changed).replace("torch.", "") or "default"


all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_name)


def lengths_around(page: int, budget: int) -> list[int]:
    """Rows of one token, of pages and budgets just reached or passed, and of none (padding)."""
    full = page * budget
    around = [1, page - 1, page, page + 1, full - 1, full, full + 1, full + page, 5 * full + 3]
    return [*around, 0, 37 * page + 5, 0]


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer).cpu(), b.contiguous().view(integer).cpu())


# --- write_kv -----------------------------------------------------------------------------------


def written_alike(
    shape: Shape,
    slots: list[int],
    extra_tokens: int = 0,
    seed: int = 0,
    score: Score = "minmax",
) -> bool:
    """Whether the GPU leaves in every row of the cache what the reference does.

    The same bits, but for bounds that estimate: these are rounded from fp32 and may differ in the
    last of their digits. Of fp8 zeros, a bound may have either sign.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = max([*slots, 0]) // shape.block_tokens + 2
    expected = empty_cache(shape, num_blocks, CPU)
    expected.copy_(torch.randn(expected.shape, generator=generator))
    cache = empty_cache(shape, num_blocks, DEVICE)
    cache.copy_(expected)

    # As in vLLM, keys and values are slices of one projection.
    num_tokens = len(slots) + extra_tokens
    qkv_heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(num_tokens, qkv_heads, shape.head_size, generator=generator).to(shape.dtype)
    slot_mapping = torch.tensor(slots, dtype=torch.int64)

    def write(module, qkv: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        _, key, value = qkv.split([shape.num_heads] + 2 * [shape.num_kv_heads], dim=1)
        settings = {"page_size": shape.page_size, "score": score}
        scales = kv_scales(shape, cache.device)
        module.write_kv(key, value, cache, slot_mapping, scales=scales, **settings)

    write(ops, qkv.to(DEVICE), cache, slot_mapping.to(DEVICE))
    write(reference, qkv, expected, slot_mapping)
    if score == "minmax" and shape.cache is None:
        return same_bits(cache, expected)
    limit = 2 * (UNIT_ROUNDOFF[shape.cache_dtype] + 2.0**-14) * expected.double().abs().max()
    limit *= score != "minmax"
    bounds, right = (x[:, :, shape.block_tokens :].cpu().double() for x in (cache, expected))
    return same_bits(*(x[:, :, : shape.block_tokens].cpu() for x in (cache, expected))) and bool(
        ((bounds - right).abs() <= limit).all()
    )


@all_shapes
def test_prefill_writes_keys_values_and_bounds(shape: Shape) -> None:
    first_page = [shape.block_tokens * 5 + i for i in range(shape.block_tokens)]
    middle = [shape.block_tokens * 2 + i for i in range(3, shape.block_tokens)]
    ends_inside = [shape.block_tokens * 7 + i for i in range(shape.block_tokens - 2)]
    assert written_alike(shape, [*first_page, *middle, *ends_inside])


@all_shapes
def test_decode_writes_one_token_per_row(shape: Shape) -> None:
    slots = [block * shape.block_tokens + block % shape.block_tokens for block in range(11)]
    assert written_alike(shape, slots[::-1])


@pytest.mark.parametrize("score", BOUNDS)
@all_shapes
def test_every_score_has_its_bounds(shape: Shape, score: Score) -> None:
    prefill = [shape.block_tokens * 2 + i for i in range(3, shape.block_tokens)]
    decode = [block * shape.block_tokens + 7 * block % shape.block_tokens for block in range(3, 9)]
    skips = [shape.block_tokens * 9 + i for i in (2, 5, 6)]
    assert written_alike(shape, [*prefill, *decode, *skips, -1], score=score)


def test_padding_slots_are_skipped() -> None:
    assert written_alike(Shape(), [-1, 3, 4, -1, -1, 40, -1, -1], extra_tokens=3)
    assert written_alike(Shape(), [-1, -1])
    assert written_alike(Shape(), [])


def test_a_run_may_skip_slots_of_its_page() -> None:
    assert written_alike(Shape(), [2, 5, 6, 9, 33, 47])


def test_many_slots() -> None:
    shape = Shape(num_kv_heads=3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    prefill = [block * 16 + i for block in order[:200] for i in range(block % 16 + 1)]
    decode = [block * 16 + block % 16 for block in order[200:]]
    slots = [*prefill, *decode, *[-1] * 600]
    assert len(slots) > 2048
    assert written_alike(shape, slots)


@pytest.mark.parametrize("num_slots", [200, 500, 1000, 2000, 5000])
@pytest.mark.parametrize("page_size", [16, 48])
def test_warps_have_any_number_of_slots(page_size: int, num_slots: int) -> None:
    shape = Shape(num_kv_heads=8, head_size=64, page_size=page_size, pages_per_block=2)
    slots: list[int] = []
    while len(slots) < num_slots:  # requests whose chunks begin and end anywhere
        block, length = 3 * len(slots) // shape.block_tokens + 1, 37 * len(slots) % 413 + 1
        first = block * shape.block_tokens + 11 * len(slots) % page_size
        slots += range(first, first + length)
    assert written_alike(shape, slots[:num_slots])


# --- score --------------------------------------------------------------------------------------


@all_shapes
def test_scores_match(shape: Shape) -> None:
    batch = make_batch(shape, lengths_around(shape.page_size, 4), 4, DEVICE)
    expected = batch.to(CPU)
    batch.score()
    expected.score(reference)
    difference = (batch.scores.cpu() - expected.scores).abs().max().item()
    assert difference <= score_error(expected)
    is_written = expected.scores != UNTOUCHED
    assert torch.equal(batch.scores.cpu() != UNTOUCHED, is_written)


def test_scores_bound_every_key() -> None:
    shape = Shape(num_kv_heads=1)
    batch = make_batch(shape, [999], 1, DEVICE)
    scores = batch.score().cpu()[0, 0]
    blocks = batch.rows.block_table.cpu()[0, :63].long()
    keys = batch.kv_cache.cpu()[blocks, 0, :16, :128].double()
    logits = torch.einsum("hd,ptd->pth", batch.query.cpu()[0].double(), keys)
    largest = logits.nan_to_num(-torch.inf).amax(dim=(1, 2))
    assert (scores[:63].double() >= largest - score_error(batch.to(CPU))).all()


# --- select -------------------------------------------------------------------------------------


def selected_alike(
    scores: Tensor,
    num_pages: list[int],
    budget_pages: list[int],
    page_size: int = 16,
    **kept: int,
) -> bool:
    seq_lens = [n * page_size - 3 if n else 0 for n in num_pages]
    max_selected = max(budget for budget in budget_pages if budget != ops.UNLIMITED_PAGES)
    expected = torch.full((*scores.shape[:2], max_selected), UNTOUCHED, dtype=torch.int32)
    pages = expected.to(DEVICE, copy=True)
    rows = rows_to_select(seq_lens, budget_pages, DEVICE)
    ops.select(scores.to(DEVICE), rows, pages, page_size=page_size, **kept)
    rows = rows_to_select(seq_lens, budget_pages)
    reference.select(scores, rows, expected, page_size=page_size, **kept)
    return torch.equal(pages.cpu(), expected)


def random_scores(*sizes: int, seed: int = 0) -> Tensor:
    return 40 + 9 * torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("page_size", [16, 32])
def test_selection_is_exact(page_size: int) -> None:
    num_pages = [1, 2, 3, 31, 32, 33, 100, 511, 512, 513, 514, 1000, 2048, 0, 1025]
    budget_pages = [1, 1, 2, 4, 32, 32, 99, 128, 511, 512, 513, 128, ops.UNLIMITED_PAGES, 7, 512]
    assert selected_alike(random_scores(15, 3, 2048), num_pages, budget_pages, page_size)


@pytest.mark.parametrize("first", [0, 1, 5, 2**40])
@pytest.mark.parametrize("percent", [0, 25, 100])
def test_pages_are_kept_before_others_are_chosen(first: int, percent: int) -> None:
    num_pages = [2, 3, 33, 100, 512, 513, 1000, 2048, 0, 1025]
    budget_pages = [1, 2, 32, 9, 128, 511, 3, 1024, 7, 700]
    kept = {"keep_first_pages": first, "keep_newest_percent": percent}
    assert selected_alike(random_scores(10, 3, 2048).round(), num_pages, budget_pages, **kept)


def test_equal_scores_go_to_lower_pages() -> None:
    scores = random_scores(4, 2, 900).round()
    scores[1] = 5.0
    scores[2] = torch.tensor([0.0, -0.0]).repeat(450)
    assert selected_alike(scores, [900, 900, 900, 300], [128, 77, 300, 128])


def test_scores_of_any_size_are_ordered() -> None:
    scores = random_scores(3, 2, 700) * torch.logspace(-30, 30, 700)
    scores[1] = -scores[1].abs()
    scores[2, :, ::3] = -torch.inf
    scores[2, :, ::7] = torch.inf
    assert selected_alike(scores, [700, 699, 698], [64, 128, 400])


@pytest.mark.parametrize("num_pages", [8192, 8193, 12000, 16385, 16386, 65536])
def test_long_contexts(num_pages: int) -> None:
    scores = random_scores(2, 1, num_pages)
    scores[1] = scores[1].round()
    assert selected_alike(scores, [num_pages, num_pages - 1], [128, 1024])


@pytest.mark.parametrize("num_pages", [600, 5000])
def test_more_pairs_than_multiprocessors_hold(num_pages: int) -> None:
    scores = random_scores(70, 4, num_pages).round(decimals=1)
    lengths = [1 + (num_pages - 1) * row // 69 for row in range(70)]
    assert selected_alike(scores, lengths, [1 + 3 * row for row in range(70)])


def test_many_scores_beside_a_far_one() -> None:
    scores = random_scores(3, 2, 3000)
    scores[0, :, 7] = -torch.inf
    scores[1, :, 7] = 1e30
    scores[2, :, :2900] = scores[2, :, :1]  # all but the last are equal
    assert selected_alike(scores, [3000, 3000, 3000], [128, 1000, 1500])


# --- sparse_decode ------------------------------------------------------------------------------


def is_close(batch: Batch, expected: Batch) -> bool:
    """Whether outputs differ by no more than roundings of weights and outputs allow.

    The kernel rounds weights, so errs by a part of the attention to the values' magnitudes, which
    may be larger than the output, where values cancel out. Kernel and reference round the output.
    A quarter is left for fp32 sums and for `magnitudes`, which is rounded as well. Sinks make
    outputs small, and fp16 rounds the smallest to whole steps.
    """
    head_size = expected.shape.head_size
    magnitudes = expected.to(CPU)
    magnitudes.kv_cache[..., head_size:].abs_()
    magnitudes.out = torch.full_like(expected.out, torch.nan)
    magnitudes.sparse_decode(reference)
    out, right = batch.out.cpu().double(), expected.out.double()
    of_weights, of_outputs = magnitudes.out.double(), 2 * right.abs()
    dtype = expected.shape.dtype
    smallest_step = 2.0**-24 if dtype == torch.float16 else 0.0
    limit = 1.25 * UNIT_ROUNDOFF[dtype] * (of_weights + of_outputs) + smallest_step
    return bool(((out - right).abs() <= limit).all())


def attends_alike(batch: Batch) -> bool:
    """Whether all decode stages give the reference's output; the selection is the GPU's own."""
    batch.run()
    expected = batch.to(CPU)
    expected.sparse_decode(reference)
    assert (batch.out[batch.rows.seq_lens == 0] == 0).all()
    return is_close(batch, expected)


@all_shapes
def test_output_matches(shape: Shape) -> None:
    assert attends_alike(make_batch(shape, lengths_around(shape.page_size, 4), 4, DEVICE))


@all_shapes
def test_dense_rows_match(shape: Shape) -> None:
    lengths = lengths_around(shape.page_size, 4)
    assert attends_alike(make_batch(shape, lengths, ops.UNLIMITED_PAGES, DEVICE))


def test_rows_have_budgets_of_their_own() -> None:
    budget_pages = [1, 2, 16, 64, 100, 101, 128, ops.UNLIMITED_PAGES]
    assert attends_alike(make_batch(Shape(), [1600] * 8, budget_pages, DEVICE))


def test_soft_cap() -> None:
    batch = make_batch(Shape(), [5, 700, 1], 8, DEVICE, soft_cap=3.0)
    assert attends_alike(batch)


@pytest.mark.parametrize("budget_pages", [4, ops.UNLIMITED_PAGES])
@all_shapes
def test_sinks(shape: Shape, budget_pages: int) -> None:
    """Also of rows that several CTAs attend to, and of padding."""
    lengths = [*lengths_around(shape.page_size, 4), 9000]
    assert attends_alike(make_batch(shape, lengths, budget_pages, DEVICE, sinks=SINKS))


def test_sinks_beside_a_soft_cap() -> None:
    batch = make_batch(Shape(), [5, 700, 1], 8, DEVICE, soft_cap=3.0, sinks=SINKS)
    assert attends_alike(batch)


def test_sinks_without_weight_change_no_bit() -> None:
    batch = make_batch(Shape(), [1, 0, 700, 9000], [1, 1, 8, ops.UNLIMITED_PAGES], DEVICE)
    without = batch.run().out
    for sink in (-torch.inf, -200.0):
        sinks = torch.full((8,), sink, dtype=torch.bfloat16, device=DEVICE)
        assert same_bits(replace(batch.fresh(), sinks=sinks).run().out, without)


def test_large_logits() -> None:
    batch = make_batch(Shape(), [900, 2000], 32, DEVICE)
    batch.query *= 30
    assert attends_alike(batch)


def test_strided_query_and_output() -> None:
    batch = make_batch(Shape(), [50, 700], 8, DEVICE)
    wide = torch.zeros(2, 3, *batch.query.shape[1:], dtype=batch.query.dtype, device=DEVICE)
    wide[:, 1] = batch.query
    batch.query = wide[:, 1]
    batch.out = torch.full_like(wide, torch.nan)[:, 2]
    assert attends_alike(batch)


@pytest.mark.large
def test_one_long_dense_row_beside_short_ones() -> None:
    budget_pages = [ops.UNLIMITED_PAGES] + [4] * 30
    assert attends_alike(make_batch(Shape(), [9000] + [100] * 30, budget_pages, DEVICE))


@pytest.mark.large
def test_a_thousand_rows() -> None:
    lengths = [1 + 37 * row % 300 for row in range(1024)]
    assert attends_alike(make_batch(Shape(head_size=64), lengths, 8, DEVICE))


@pytest.mark.large
def test_more_rows_than_a_launch_takes() -> None:
    lengths = [row % 40 for row in range(2100)]
    assert attends_alike(make_batch(Shape(head_size=64, num_kv_heads=1), lengths, 1, DEVICE))


def test_covering_budget_equals_dense_bit_for_bit() -> None:
    lengths = [1, 100, 1024, 777]
    covered = make_batch(Shape(), lengths, 64, DEVICE)
    dense = make_batch(Shape(), lengths, ops.UNLIMITED_PAGES, DEVICE)
    # Room for the whole budget, as beside a longer row.
    covered.pages = covered.pages.expand(-1, -1, 64).contiguous()
    assert same_bits(covered.run().out, dense.run().out)


@pytest.mark.large
@pytest.mark.parametrize("page_size", [8, 16, 48])
def test_long_contexts_attend_alike(page_size: int) -> None:
    shape = Shape(num_kv_heads=2, page_size=page_size)
    lengths = [page_size * 8193, page_size * 9000 + 5, 3, page_size * 4097]
    assert attends_alike(make_batch(shape, lengths, [128, 600, 1, 33], DEVICE))


@pytest.mark.large
def test_many_pairs_attend_alike() -> None:
    shape = Shape(num_kv_heads=8, group_size=1)
    lengths = [1 + 53 * row % 2000 for row in range(40)]
    budget_pages = [1 + 7 * row % 90 for row in range(40)]
    assert attends_alike(make_batch(shape, lengths, budget_pages, DEVICE))


# --- all stages ---------------------------------------------------------------------------------


@pytest.mark.large
def test_results_are_repeatable_bit_for_bit() -> None:
    lengths = [8000, 31, 2500, 0, 640]
    batch = make_batch(Shape(num_kv_heads=8), lengths, 40, DEVICE, sinks=SINKS)
    first = batch.run().out.clone()
    for _ in range(20):
        batch.out.fill_(torch.nan)
        assert same_bits(batch.run().out, first)


@pytest.mark.large
def test_a_captured_graph_serves_other_lengths() -> None:
    shape = Shape(num_kv_heads=4)
    captured = make_batch(shape, [8192] * 4, 40, DEVICE, max_tokens=8192)
    captured.rows.seq_lens.fill_(1)
    captured.run()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run()
    for seed, lengths in enumerate([[5000, 3, 640, 0], [641, 8192, 0, 1], [0, 0, 0, 0]]):
        batch = make_batch(shape, lengths, 40, DEVICE, max_tokens=8192, seed=seed)
        captured.query.copy_(batch.query)
        captured.rows.block_table.copy_(batch.rows.block_table)
        captured.rows.seq_lens.copy_(batch.rows.seq_lens)
        captured.kv_cache[: len(batch.kv_cache)].copy_(batch.kv_cache)
        graph.replay()
        assert same_bits(captured.out, batch.run().out)


def test_small_pipeline() -> None:
    """Each operator once or twice, with little data: the shortest run for a sanitizer."""
    shape = Shape(num_kv_heads=2)
    for score in BOUNDS:
        assert written_alike(shape, [3, 4, 5, 40, -1], score=score)
    assert attends_alike(make_batch(shape, [700, 5, 0], 4, DEVICE))
    dense = make_batch(Shape(num_kv_heads=1), [1500], ops.UNLIMITED_PAGES, DEVICE, sinks=SINKS)
    assert attends_alike(dense)


# --- refusals -----------------------------------------------------------------------------------


def test_refuses_what_it_has_no_kernel_for() -> None:
    with pytest.raises(RuntimeError, match="head_size must be 64, 96, 128 or 256"):
        make_batch(Shape(head_size=80), [40], 1, DEVICE).run()
    with pytest.raises(RuntimeError, match="at most 16 query heads"):
        make_batch(Shape(group_size=17), [40], 1, DEVICE).score()


def test_refuses_a_missing_workspace() -> None:
    batch = make_batch(Shape(), [40], 1, DEVICE)
    batch.workspace = None
    with pytest.raises(RuntimeError, match="decode_workspace"):
        batch.sparse_decode()


def test_refuses_sinks_of_another_dtype_or_number() -> None:
    batch = make_batch(Shape(), [40], 1, DEVICE)
    batch.sinks = torch.zeros(8, device=DEVICE)
    with pytest.raises(RuntimeError, match="sinks must be BFloat16, got Float"):
        batch.sparse_decode()
    batch.sinks = torch.zeros(2, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"sinks must be \[8\]"):
        batch.sparse_decode()


def test_refuses_misaligned_rows() -> None:
    batch = make_batch(Shape(), [40], 1, DEVICE)
    batch.query = torch.zeros(1 + batch.query.numel(), dtype=batch.query.dtype, device=DEVICE)[1:]
    batch.query = batch.query.view(1, 8, 128)
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        batch.score()
