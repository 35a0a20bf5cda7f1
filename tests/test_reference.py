"""The reference has the properties that the method promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch import FP8, SINKS, Batch, Shape, make_batch, rows_to_select
from vllm_quest import ops, reference
from vllm_quest.config import Score

COVERING = 1000
DTYPES = [
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16, "cache": FP8},
]


@st.composite
def batches(draw: st.DrawFn, budget_pages: st.SearchStrategy[int]) -> Batch:
    page_size = draw(st.sampled_from([8, 16]))
    seq_lens = draw(st.lists(st.integers(0, 5 * page_size), min_size=1, max_size=3))
    shape = Shape(
        head_size=16,
        group_size=draw(st.integers(1, 3)),
        page_size=page_size,
        pages_per_block=draw(st.integers(1, 3)),
        **draw(st.sampled_from(DTYPES)),
    )
    return make_batch(
        shape,
        seq_lens,
        [draw(budget_pages) for _ in seq_lens],
        soft_cap=draw(st.sampled_from([0.0, 2.0])),
        sinks=draw(st.sampled_from([None, SINKS])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=40, deadline=None)
@given(batches(st.just(1)))
def test_no_key_of_a_page_exceeds_its_score(batch: Batch) -> None:
    scores = batch.run(reference).scores
    page_size = batch.shape.page_size
    for row in range(len(batch.rows)):
        if not batch.over_budget(row):
            continue
        block_table, seq_len = batch.rows.block_table[row], int(batch.rows.seq_lens[row])
        for page in range(batch.num_pages(row)):
            filled = min(page_size, seq_len - page * page_size)
            keys = reference.page_rows(batch.kv_cache, block_table, page, page_size)
            keys = keys[:, :filled, :16]
            query = batch.query[row].double().view(-1, batch.shape.group_size, 16)
            true_max = (query @ keys.double().transpose(1, 2)).amax(dim=(1, 2))
            stored = scores[row, :, page].double()  # rounded to fp32 once
            assert (stored >= true_max - stored.abs() * 2.0**-24).all()


@pytest.mark.parametrize("score", ["mean_std", "mid_dev"])
def test_an_estimate_is_the_center_and_the_spread_seen_by_the_query(score: Score) -> None:
    shape = Shape(
        64, num_kv_heads=1, group_size=1, pages_per_block=2, dtype=torch.float32, score=score
    )
    batch = make_batch(shape, [1, 20, 32], 1)
    scores = batch.run(reference).scores
    for row, length in ((1, 20), (2, 32)):
        query = batch.query[row, 0].double()
        for page in range(2):
            rows = reference.page_rows(batch.kv_cache, batch.rows.block_table[row], page, 16)
            keys = rows[0, : min(16, length - 16 * page), :64].double()
            middle = (keys.amin(0) + keys.amax(0)) / 2
            center, spread = {
                "mean_std": (keys.mean(0), keys.var(0, correction=0).sqrt()),
                "mid_dev": (middle, (keys - middle).abs().mean(0)),
            }[score]
            exact = query @ center + query.abs() @ spread
            # The bounds and the score are rounded to fp32.
            assert (scores[row, 0, page] - exact).abs() <= 8 * 2.0**-24 * (query.abs().sum() * 8)


@settings(max_examples=40, deadline=None)
@given(batches(st.just(COVERING)))
def test_a_covering_budget_is_full_attention(batch: Batch) -> None:
    exact = batch.full_attention()
    # Both compute in fp64 and differ by far less than half a unit of any output dtype.
    assert torch.allclose(batch.run(reference).out.double(), exact, rtol=2.0**-7, atol=2.0**-24)


@settings(max_examples=40, deadline=None)
@given(batches(st.integers(1, COVERING)))
def test_a_sink_weighs_as_its_logit_says(batch: Batch) -> None:
    """Beside n tokens with logits of 0 it leaves them n / (n + e^sink) of the attention."""
    batch.query.zero_()
    batch.sinks = torch.arange(batch.shape.num_heads) - 1.0
    out = batch.run(reference).out.double()
    batch = batch.fresh()
    batch.sinks = None
    mean = batch.run(reference).out.double()
    for row, seq_len in enumerate(batch.rows.seq_lens.tolist()):
        page_size, budget = batch.shape.page_size, int(batch.rows.budget_pages[row])
        tokens = seq_len - max(0, batch.num_pages(row) - budget) * page_size
        for head in range(batch.shape.num_heads):
            exact = mean[row, head] * tokens / (tokens + math.exp(head - 1.0))
            # Both outputs are rounded.
            assert torch.allclose(out[row, head], exact, rtol=2.0**-7, atol=2.0**-24)


@settings(max_examples=40, deadline=None)
@given(batches(st.integers(1, 4)))
def test_selection_fills_the_budget_with_the_newest_and_the_best(batch: Batch) -> None:
    batch.run(reference)
    for row in range(len(batch.rows)):
        if not batch.over_budget(row):
            continue
        newest, budget = batch.num_pages(row) - 1, int(batch.rows.budget_pages[row])
        for head in range(batch.shape.num_kv_heads):
            chosen = batch.pages[row, head, :budget].tolist()
            assert chosen == sorted(set(chosen))
            assert chosen[-1] == newest
            scores = batch.scores[row, head]
            left = [page for page in range(newest) if page not in chosen]
            worst_chosen = min((float(scores[page]) for page in chosen[:-1]), default=None)
            if worst_chosen is not None:
                assert all(float(scores[page]) <= worst_chosen for page in left)


def test_equal_scores_go_to_the_lower_page() -> None:
    scores = torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]]])
    pages = torch.zeros(1, 1, 4, dtype=torch.int32)
    reference.select(scores, rows_to_select([6 * 8], [4]), pages, page_size=8)
    assert pages.tolist() == [[[0, 1, 3, 5]]]


@pytest.mark.parametrize(
    ("budget", "first", "percent", "chosen"),
    [
        (1, 1, 0, [5]),
        (2, 1, 0, [0, 5]),
        (3, 1, 0, [0, 3, 5]),
        (3, 4, 0, [0, 1, 5]),
        (4, 1, 50, [0, 3, 4, 5]),
        (3, 1, 100, [3, 4, 5]),
    ],
)
def test_what_is_kept_stays_within_the_budget(
    budget: int, first: int, percent: int, chosen: list[int]
) -> None:
    """The newest page comes before those at the front."""
    pages = torch.zeros(1, 1, budget, dtype=torch.int32)
    scores = torch.tensor([[[0.0, 1.0, 2.0, 5.0, 0.0, 0.0]]])
    kept = {"keep_first_pages": first, "keep_newest_percent": percent}
    reference.select(scores, rows_to_select([6 * 8], [budget]), pages, page_size=8, **kept)
    assert pages.tolist() == [[chosen]]


def test_bounds_are_taken_over_the_tokens_up_to_the_last_written() -> None:
    cache = torch.full((2, 1, 9, 32), 9.0)
    key = torch.arange(3.0).view(3, 1, 1).expand(3, 1, 16)
    reference.write_kv(key, key, cache, torch.tensor([8, 9, 10]), page_size=8)
    assert cache[1, 0, 8].tolist() == [0.0] * 16 + [2.0] * 16
    reference.write_kv(-key[1:2], key[1:2], cache, torch.tensor([9]), page_size=8)
    assert cache[1, 0, 8].tolist() == [-1.0] * 16 + [0.0] * 16
    assert (cache[0] == 9).all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.7])
def test_fp8_caches_hold_the_nearest_numbers_and_bounds_that_no_key_exceeds(scale: float) -> None:
    numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).double()
    numbers = numbers[~numbers.isnan()]
    key = 40 * torch.randn(16, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = torch.full((1, 2, 17, 32), torch.nan).to(FP8)
    scales = ops.KvScales(torch.tensor(scale), torch.tensor(2.0))
    reference.write_kv(key, -key, cache, torch.arange(16), page_size=16, scales=scales)
    keys, values = cache[0, :, :16].double().transpose(0, 1).chunk(2, dim=-1)
    for stored, exact in ((keys, key.float() / scale), (values, -key.float() / 2)):
        nearest = (exact.double()[..., None] - numbers).abs().amin(dim=-1)
        assert torch.equal((exact.double() - stored).abs(), nearest)
    low, high = cache[0, :, 16].double().chunk(2, dim=-1)
    assert torch.equal(low, keys.amin(dim=0)) and torch.equal(high, keys.amax(dim=0))
