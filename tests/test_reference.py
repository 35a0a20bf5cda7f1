"""The reference has the properties that the method promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch import Batch, make_batch, run
from vllm_quest import reference
from vllm_quest.config import Score

COVERING = 1000


@st.composite
def batches(draw: st.DrawFn, budgets: st.SearchStrategy[int]) -> Batch:
    page_size = draw(st.sampled_from([8, 16]))
    seq_lens = draw(st.lists(st.integers(0, 5 * page_size), min_size=1, max_size=3))
    return make_batch(
        seq_lens,
        [draw(budgets) for _ in seq_lens],
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        head_size=16,
        num_kv_heads=2,
        group_size=draw(st.integers(1, 3)),
        page_size=page_size,
        block_tokens=page_size * draw(st.integers(1, 3)),
        soft_cap=draw(st.sampled_from([0.0, 2.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=40, deadline=None)
@given(batches(st.just(1)))
def test_no_key_of_a_page_exceeds_its_score(batch: Batch) -> None:
    scores = run(reference, batch).scores
    group_size = batch.query.shape[1] // batch.kv_cache.shape[1]
    for row in range(len(batch.seq_lens)):
        if not batch.over_budget(row):
            continue
        for page in range(batch.num_pages(row)):
            filled = min(batch.page_size, int(batch.seq_lens[row]) - page * batch.page_size)
            keys = reference.page_rows(
                batch.kv_cache, batch.block_table[row], page, batch.page_size
            )[:, :filled, :16]
            query = batch.query[row].double().view(-1, group_size, 16)
            true_max = (query @ keys.double().transpose(1, 2)).amax(dim=(1, 2))
            stored = scores[row, :, page].double()  # rounded to fp32 once
            assert (stored >= true_max - stored.abs() * 2.0**-24).all()


@pytest.mark.parametrize("score", ["mean_std", "mid_dev"])
def test_an_estimate_is_the_center_and_the_spread_seen_by_the_query(score: Score) -> None:
    batch = make_batch(
        [1, 20, 32], [1, 1, 1], dtype=torch.float32, num_kv_heads=1, group_size=1, score=score
    )
    scores = run(reference, batch).scores
    for row, length in ((1, 20), (2, 32)):
        query = batch.query[row, 0].double()
        for page in range(2):
            rows = reference.page_rows(batch.kv_cache, batch.block_table[row], page, 16)
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
    exact = reference.full_attention(
        batch.query,
        batch.kv_cache,
        batch.block_table,
        batch.seq_lens,
        batch.page_size,
        batch.scale,
        batch.soft_cap,
    )
    # Both compute in fp64 and differ by far less than half a unit of any output dtype.
    assert torch.allclose(run(reference, batch).out.double(), exact, rtol=2.0**-7, atol=2.0**-24)


@settings(max_examples=40, deadline=None)
@given(batches(st.integers(1, 4)))
def test_selection_fills_the_budget_with_the_newest_and_the_best(batch: Batch) -> None:
    result = run(reference, batch)
    for row in range(len(batch.seq_lens)):
        if not batch.over_budget(row):
            continue
        newest, budget = batch.num_pages(row) - 1, int(batch.budgets[row])
        for head in range(batch.kv_cache.shape[1]):
            chosen = result.pages[row, head, :budget].tolist()
            assert chosen == sorted(set(chosen))
            assert chosen[-1] == newest
            scores = result.scores[row, head]
            left = [page for page in range(newest) if page not in chosen]
            worst_chosen = min((float(scores[page]) for page in chosen[:-1]), default=None)
            if worst_chosen is not None:
                assert all(float(scores[page]) <= worst_chosen for page in left)


def test_equal_scores_go_to_the_lower_page() -> None:
    scores = torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]]])
    pages = torch.zeros(1, 1, 4, dtype=torch.int32)
    lens, budgets = torch.tensor([[6 * 8], [4]], dtype=torch.int32)
    reference.select(scores, lens, budgets, 8, pages)
    assert pages.tolist() == [[[0, 1, 3, 5]]]


def test_bounds_are_taken_over_the_tokens_up_to_the_last_written() -> None:
    cache = torch.full((2, 1, 9, 32), 9.0)
    key = torch.arange(3.0).view(3, 1, 1).expand(3, 1, 16)
    reference.write_kv(key, key, cache, torch.tensor([8, 9, 10]), 8)
    assert cache[1, 0, 8].tolist() == [0.0] * 16 + [2.0] * 16
    reference.write_kv(-key[1:2], key[1:2], cache, torch.tensor([9]), 8)
    assert cache[1, 0, 8].tolist() == [-1.0] * 16 + [0.0] * 16
    assert (cache[0] == 9).all()
