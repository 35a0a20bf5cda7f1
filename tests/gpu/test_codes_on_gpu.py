"""Keys in 2 bits on a GPU: the reference's bits, and its scores but for the query's rounding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from batch import (
    CPU,
    UNTOUCHED,
    Batch,
    Shape,
    make_batch,
    rounding_of_the_query,
    score_codes_error,
)
from gpu.test_cluster_decode import decodes_alike, wide_table
from vllm_quest import config, extension, ops, reference

DEVICE = torch.device("cuda")
GROUP = config.GROUP_TOKENS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not extension.library("cuda").exists(), reason="the CUDA operators are not built"
    ),
]

needs_clusters = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="clusters of CTAs begin with sm_90",
)

CODED = Shape(pages_per_block=8, score="codes", is_strided=True)
SHAPES = [
    CODED,
    replace(CODED, dtype=torch.float16, group_size=8, pages_per_block=16),
    replace(CODED, group_size=16, page_size=8, pages_per_block=16),
    replace(CODED, head_size=64, group_size=1, page_size=32, pages_per_block=12),
    replace(
        CODED, dtype=torch.float16, head_size=64, group_size=7, page_size=64, pages_per_block=2
    ),
    replace(CODED, head_size=96, group_size=3),
    replace(
        CODED, dtype=torch.float16, head_size=96, group_size=9, page_size=128, pages_per_block=1
    ),
    replace(CODED, head_size=256, group_size=5),
    replace(CODED, dtype=torch.float16, head_size=256, group_size=16, num_kv_heads=3),
]


def shape_name(shape: Shape) -> str:
    changed = (f"{k}={v}" for k, v in vars(shape).items() if v != getattr(CODED, k))
    return " ".join(changed).replace("torch.", "") or "default"


all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_name)


def assert_scores_are_the_references(batch: Batch) -> None:
    """Score on the GPU, and on the host by the reference."""
    on_host = batch.to(CPU)
    found, expected = batch.score().cpu(), on_host.score(reference)
    has_codes = (expected.abs() < 2.0**100) & (expected != UNTOUCHED)
    assert torch.equal(found[~has_codes], expected[~has_codes])
    error = (found.double() - expected.double()).abs()[has_codes]
    limit = score_codes_error(on_host) + rounding_of_the_query(on_host)
    assert not has_codes.any() or error.max() <= limit


@pytest.mark.parametrize("first", [0, 3, 127])
@all_shapes
def test_codes_and_scales_are_the_references_after_any_writes(shape: Shape, first: int) -> None:
    """Prefill, decode of many rows at once, drafts written anew, padding."""
    block_tokens = shape.block_tokens
    sizes = (40, shape.num_kv_heads, shape.block_rows, 2 * shape.head_size)
    expected = torch.randn(sizes).to(shape.dtype)  # blocks were used before
    cache = expected.to(DEVICE)
    prefill = torch.arange(first, 7 * block_tokens - 5)
    ends = torch.arange(8, 40) * block_tokens + block_tokens - 1
    for slots in (
        prefill,
        torch.cat([prefill[-100:], torch.tensor([-1, -1])]),
        torch.arange(7 * block_tokens - 5, 7 * block_tokens),
        ends,
        torch.cat([ends[:3] - 1, ends[:3], torch.tensor([-1])]).sort().values,
        torch.tensor([5, -1, 8 * block_tokens]),
    ):
        tokens = (2, len(slots) + 2, shape.num_kv_heads, shape.head_size)
        key, value = (3 + torch.randn(tokens)).to(shape.dtype)
        settings = {"page_size": shape.page_size, "score": "codes"}
        ops.write_kv(key.to(DEVICE), value.to(DEVICE), cache, slots.to(DEVICE), **settings)
        reference.write_kv(key, value, expected, slots, **settings)
        assert torch.equal(cache.cpu().view(torch.int16), expected.view(torch.int16))


@all_shapes
def test_scores_selection_and_output_are_the_references(shape: Shape) -> None:
    lengths = [0, 1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP, 9 * GROUP + 7, 1300, 5000]
    batch = make_batch(shape, lengths, [1, 1, 1, 2, 1, 1, 2, 1, 3], DEVICE)
    assert_scores_are_the_references(batch)
    # Selection is exact given the scores.
    expected = batch.to(CPU)
    pages = batch.select()
    assert torch.equal(pages.cpu(), expected.select(reference))
    out = batch.sparse_decode().cpu()
    torch.testing.assert_close(out, expected.sparse_decode(reference), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5, 30.0])
@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_scores_are_the_references_with_a_soft_cap_and_large_keys(
    soft_cap: float, shift: float
) -> None:
    batch = make_batch(CODED, [1000], 3, DEVICE, soft_cap=soft_cap, shift=shift)
    assert_scores_are_the_references(batch)


def test_scores_do_not_depend_on_the_batch_and_repeat() -> None:
    batch = make_batch(CODED, [5000, 700, 130], 4, DEVICE)
    together = batch.score()
    assert torch.equal(batch.fresh().score(), together)
    for row in range(3):
        assert torch.equal(batch.take_row(row).score()[0], together[row])


def test_a_group_that_becomes_full_is_coded_before_it_is_scored() -> None:
    """write_kv, write_codes and score_codes follow one another without a word from the host."""
    batch = make_batch(CODED, [4 * GROUP] * 8, 4, DEVICE)
    expected = batch.fresh().score()
    blocks = batch.rows.block_table[:, 3].long()
    key, value = batch.kv_cache[blocks, :, GROUP - 1].clone().chunk(2, dim=-1)
    for block in blocks.tolist():
        batch.kv_cache[block, :, GROUP - 1 :] = float("nan")
    slots = blocks * GROUP + GROUP - 1
    ops.write_kv(key, value, batch.kv_cache, slots, page_size=16, score="codes")
    assert torch.equal(batch.score(), expected)


@needs_clusters
@all_shapes
def test_clusters_choose_what_select_chooses(shape: Shape) -> None:
    lengths = [0, 1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP, 9 * GROUP + 7, 1300, 5000]
    assert decodes_alike(make_batch(shape, lengths, [1, 1, 1, 2, 1, 1, 2, 1, 3], DEVICE))
    assert decodes_alike(make_batch(shape, lengths, ops.UNLIMITED_PAGES, DEVICE))


@needs_clusters
@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("percent", [0, 25, 100])
@pytest.mark.parametrize("rows", [1, 6, 40])  # clusters of 16 CTAs, of some, and CTAs alone
def test_clusters_keep_pages(rows: int, percent: int, first: int) -> None:
    lengths = [1 + 977 * row % 3000 + 1600 for row in range(rows)]
    budgets = [(1, 2, 40, 17, 100, 1000)[row % 6] for row in range(rows)]
    batch = make_batch(replace(CODED, num_kv_heads=4), lengths, budgets, DEVICE)
    batch.kept = {"keep_first_pages": first, "keep_newest_percent": percent}
    batch.query[1::3] = 0  # pages of as many tokens weigh the same
    assert decodes_alike(batch)


@needs_clusters
@pytest.mark.parametrize("soft_cap", [0.0, 1.5, 30.0])
def test_clusters_cap_logits(soft_cap: float) -> None:
    assert decodes_alike(make_batch(CODED, [1000, 4000], 3, DEVICE, soft_cap=soft_cap))


@needs_clusters
@pytest.mark.large
def test_clusters_take_a_long_row() -> None:
    assert decodes_alike(make_batch(replace(CODED, num_kv_heads=8), [131072 - 5], 128, DEVICE))


@needs_clusters
@pytest.mark.parametrize("percent", [0, 100])
def test_clusters_take_rows_with_far_keys(percent: int) -> None:
    shape = replace(CODED, num_kv_heads=1, page_size=8, pages_per_block=16)
    tokens = wide_table(shape)
    batch = make_batch(shape, [tokens - 3, 0, 30, 5000], 40, DEVICE, max_tokens=tokens)
    batch.kept = {"keep_first_pages": 1, "keep_newest_percent": percent}
    assert decodes_alike(batch)


@needs_clusters
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masses": None}, "masses, from weigh_pages, belong to the score codes alone"),
        ({"score": "minmax"}, "kv_cache must hold"),
        ({"follows_write_kv": True}, "follows_write_kv must be false for the score codes"),
        ({"masses": torch.zeros(1, 8, 4)}, "masses"),
    ],
    ids=["none", "minmax", "beside the write", "narrow"],
)
def test_clusters_refuse_other_masses(change: dict[str, Any], message: str) -> None:
    batch = make_batch(CODED, [300], 3, DEVICE)
    settings = {"page_size": 16, "scale": 1.0, "score": "codes", "masses": batch.masses}
    settings["workspace"] = batch.workspace
    settings |= {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.cluster_decode(batch.query, batch.kv_cache, batch.rows, batch.out, **settings)
