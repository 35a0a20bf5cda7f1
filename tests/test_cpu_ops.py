"""The CPU operators against the reference, in every instruction set that this machine runs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from batch import (
    SINKS,
    UNTOUCHED,
    Batch,
    Shape,
    bounds_error,
    decode_error,
    make_batch,
    rows_to_select,
    score_error,
)
from vllm_quest import ops, reference
from vllm_quest.config import BOUNDS, QuestConfig, Score

SHAPE = Shape(head_size=64, pages_per_block=2)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ISAS = torch.ops.vllm_quest.cpu_isas().split()

# Hypothesis may reuse the fixture that sets the instruction set: it stays set.
property_test = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.ops.vllm_quest.use_cpu_isa(request.param)
    yield request.param
    torch.ops.vllm_quest.use_cpu_isa(ISAS[0])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_equals_reference(batch: Batch) -> None:
    found = batch.fresh().run(ops)
    expected = batch.fresh().run(reference)
    assert (found.scores - expected.scores).abs().max() <= score_error(batch)
    # Selection is exact given the scores; where rounding reorders them, the lists may differ.
    given = replace(batch.fresh(), scores=found.scores)
    assert torch.equal(found.pages, given.select(reference))
    out = given.sparse_decode(reference)
    error = (found.out.double() - out.double()).abs()
    # The reference's own rounding of its output counts once more.
    assert (error <= 2 * decode_error(batch, out)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, group_size=1, page_size=8),
        Shape(80, group_size=3, page_size=16, pages_per_block=8),
        Shape(96, group_size=4, page_size=24, pages_per_block=2),
        Shape(128, group_size=8, page_size=16, pages_per_block=4),
        Shape(128, group_size=4, page_size=64),
        Shape(256, group_size=5, page_size=32),
    ],
    ids=lambda shape: f"{shape.head_size}-{shape.group_size}-{shape.page_size}",
)
def test_equals_the_reference_at_odd_shapes(dtype: torch.dtype, shape: Shape) -> None:
    page = shape.page_size
    lengths = [0, 1, page - 1, page, page + 1, 5 * page + 3, 0]
    shape = replace(shape, num_kv_heads=3, dtype=dtype)
    assert_equals_reference(make_batch(shape, lengths, [1, 1, 1, 1, 1, 3, 1]))


@pytest.mark.parametrize("soft_cap", [0.0, 1.5, 30.0])
@pytest.mark.parametrize("is_strided", [False, True])
def test_equals_the_reference_with_strides_and_soft_cap(is_strided: bool, soft_cap: float) -> None:
    shape = replace(SHAPE, is_strided=is_strided, dtype=torch.float16)
    assert_equals_reference(make_batch(shape, [600, 33], [7, 2], soft_cap=soft_cap))


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("group_size", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference_with_sinks(
    dtype: torch.dtype, group_size: int, soft_cap: float
) -> None:
    """Over and within budgets, in one split and in several, beside padding."""
    shape = replace(SHAPE, group_size=group_size, num_kv_heads=3, dtype=dtype)
    lengths = [0, 1, 15, 16, 17, 600, 600, 3000, 0]
    budgets = [1, 1, 1, 1, 1, 7, 60, ops.UNLIMITED_PAGES, 1]
    assert_equals_reference(make_batch(shape, lengths, budgets, soft_cap=soft_cap, sinks=SINKS))


def test_sinks_without_weight_change_no_bit() -> None:
    batch = make_batch(SHAPE, [0, 1, 17, 600, 3000], [1, 1, 1, 7, ops.UNLIMITED_PAGES]).run()
    for sink in (-torch.inf, -100.0):
        weightless = replace(batch.fresh(), sinks=torch.full((8,), sink, dtype=SHAPE.dtype))
        assert torch.equal(weightless.run().out, batch.out)


@property_test
@given(
    seq_lens=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    budget=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_equals_the_reference_at_any_length(seq_lens: list[int], budget: int, seed: int) -> None:
    shape = replace(SHAPE, page_size=8, pages_per_block=4)
    assert_equals_reference(make_batch(shape, seq_lens, budget, seed=seed))


@property_test
@given(seq_len=st.integers(17, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
def test_no_key_of_a_page_exceeds_its_score(seq_len: int, dtype: torch.dtype, seed: int) -> None:
    batch = make_batch(replace(SHAPE, dtype=dtype), [seq_len], 1, seed=seed)
    scores = batch.run().scores.double()
    query = batch.query[0].double().view(2, 4, 64)
    for page in range(batch.num_pages(0)):
        filled = min(16, seq_len - page * 16)
        keys = reference.page_rows(batch.kv_cache, batch.rows.block_table[0], page, 16)
        products = query @ keys[:, :filled, :64].double().transpose(1, 2)
        assert (scores[0, :, page] >= products.amax(dim=(1, 2)) - score_error(batch)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_covering_budget_is_full_attention(dtype: torch.dtype) -> None:
    # 20,000 tokens are more than 32 splits of 512.
    shape = replace(SHAPE, num_kv_heads=1, pages_per_block=8, dtype=dtype)
    batch = make_batch(shape, [20_000, 513, 512], ops.UNLIMITED_PAGES)
    out = batch.run().out.double()
    exact = batch.full_attention()
    assert ((out - exact).abs() <= decode_error(batch, exact)).all()


def test_a_budget_one_page_short_leaves_out_the_lowest_score() -> None:
    batch = make_batch(replace(SHAPE, num_kv_heads=1), [16 * 9], 8).run()
    left_out = set(range(9)) - set(batch.pages[0, 0].tolist())
    assert left_out == {int(batch.scores[0, 0, :8].argmin())}


# Few distinct scores, so that ties abound; zeros of both signs are equal.
tied_scores = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 3e38, float("-inf"), 0.5])


@property_test
@given(st.data())
def test_selection_equals_the_reference_ties_included(data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(st.lists(tied_scores, min_size=1, max_size=70), min_size=1, max_size=4)
    )
    max_pages = max(map(len, rows))
    scores = torch.full((len(rows), 1, max_pages), float("nan"))
    for row, values in enumerate(rows):
        scores[row, 0, : len(values)] = torch.tensor(values)
    budget = data.draw(st.integers(1, max_pages))
    lengths = [8 * len(values) - 3 for values in rows]
    kept = {
        "keep_first_pages": data.draw(st.sampled_from([0, 1, 3, 2**40])),
        "keep_newest_percent": data.draw(st.sampled_from([0, 13, 25, 50, 100])),
    }
    assert_selects_as_the_reference(scores, lengths, [budget] * len(rows), **kept)


def assert_selects_as_the_reference(
    scores: Tensor, seq_lens: list[int], budget_pages: list[int], **kept: int
) -> None:
    """In pages of 8 tokens."""
    rows = rows_to_select(seq_lens, budget_pages)
    found = torch.full((*scores.shape[:2], max(budget_pages)), UNTOUCHED, dtype=torch.int32)
    expected = found.clone()
    ops.select(scores, rows, found, page_size=8, **kept)
    reference.select(scores, rows, expected, page_size=8, **kept)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"keep_first_pages": -1}, "keep_first_pages must be at least 0, got -1"),
        ({"keep_newest_percent": 101}, "keep_newest_percent must be 0 to 100, got 101"),
    ],
)
def test_select_says_what_cannot_be_kept(kept: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"vllm_quest::select: values: {message}"):
        assert_selects_as_the_reference(torch.zeros(1, 1, 4), [32], [2], **kept)


def test_a_setting_of_any_size_is_kept() -> None:
    kept = QuestConfig(keep_first_pages=2**63, keep_newest_percent=50).kept
    assert_selects_as_the_reference(torch.arange(6.0).view(1, 1, 6), [48], [4], **kept)


def test_zeros_of_both_signs_are_equal_scores() -> None:
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, -1.0, 5.0]]])
    pages = torch.zeros(1, 1, 3, dtype=torch.int32)
    ops.select(scores, rows_to_select([6 * 8], [3]), pages, page_size=8)
    assert pages.tolist() == [[[0, 1, 5]]]


def test_selection_equals_the_reference_over_many_pages() -> None:
    scores = torch.randn(2, 2, 5000).mul(4).round(decimals=1)
    assert_selects_as_the_reference(scores, [8 * 5000, 8 * 4097], [128, 4096])


def test_only_rows_over_their_budget_are_scored_and_selected() -> None:
    batch = make_batch(SHAPE, [100, 64, 0, 17], [3, 4, 1, 1]).run()
    for row in range(4):
        written = batch.num_pages(row) if batch.over_budget(row) else 0
        listed = int(batch.rows.budget_pages[row]) if batch.over_budget(row) else 0
        assert (batch.scores[row, :, written:] == UNTOUCHED).all()
        assert (batch.pages[row, :, listed:] == UNTOUCHED).all()
        assert (batch.pages[row, :, :listed] != UNTOUCHED).all()


def test_padding_rows_give_zeros() -> None:
    assert (make_batch(SHAPE, [0, 5, 0], 1).run().out[::2] == 0).all()


def test_what_lies_outside_a_row_does_not_matter() -> None:
    poisoned = make_batch(SHAPE, [100, 64, 17, 1], [3, 1, 2, 1]).run()
    assert poisoned.out.isfinite().all()
    clean = replace(poisoned.fresh(), kv_cache=poisoned.kv_cache.nan_to_num(3.0))
    assert torch.equal(clean.run().out, poisoned.out)


def test_is_bitwise_repeatable_and_independent_of_threads(two_threads: None) -> None:
    budgets = [40, ops.UNLIMITED_PAGES, 1]
    first = make_batch(SHAPE, [3000, 700, 40], budgets, sinks=SINKS).run()
    again = first.fresh().run()
    torch.set_num_threads(1)
    alone = first.fresh().run()
    for other in (again, alone):
        assert torch.equal(other.scores, first.scores)
        assert torch.equal(other.pages, first.pages)
        assert torch.equal(other.out, first.out)


def test_a_row_does_not_depend_on_its_batch(two_threads: None) -> None:
    together = make_batch(SHAPE, [1500, 0, 700, 16], [40, 1, ops.UNLIMITED_PAGES, 1]).run()
    for row in range(4):
        alone = together.take_row(row).run()
        assert torch.equal(alone.scores[0], together.scores[row])
        assert torch.equal(alone.out[0], together.out[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_comes_through_unchanged(dtype: torch.dtype) -> None:
    # One token has all the weight, so the output is its value: 1024 rows of 64 make every pattern.
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    cache = torch.zeros(1024, 1, 9, 128, dtype=dtype)
    cache[:, 0, 0, 64:] = patterns.view(1024, 64)
    found = decode_tokens(cache, num_tokens=1)
    same = found.view(torch.int16) == cache[:, 0, 0, 64:].view(torch.int16)
    # A zero keeps no sign, a NaN no payload.
    assert (same | (patterns.view(1024, 64) == 0) | found.isnan()).all()
    assert torch.equal(found.isnan(), patterns.view(1024, 64).isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_round_to_nearest_even(dtype: torch.dtype) -> None:
    # Two tokens of equal weight: the output is the mean, exact in fp32 and then rounded.
    bits = torch.randint(0, 1 << 16, (2, 1024, 64), dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).nan_to_num(1.0, 2.0, 2.0) / 4
    cache = torch.zeros(1024, 1, 9, 128, dtype=dtype)
    cache[:, 0, 0, 64:], cache[:, 0, 1, 64:] = values
    mean = ((values[0].double() + values[1].double()) / 2).float()
    assert torch.equal(decode_tokens(cache, num_tokens=2), mean.to(dtype))


def decode_tokens(cache: Tensor, num_tokens: int) -> Tensor:
    """Attend with a query of zeros to each block's first tokens: their values' mean."""
    num_rows = len(cache)
    out = torch.full((num_rows, 1, 64), 5.0, dtype=cache.dtype)
    rows = ops.Rows(
        block_table=torch.arange(num_rows, dtype=torch.int32).view(num_rows, 1),
        seq_lens=torch.full((num_rows,), num_tokens, dtype=torch.int32),
        budget_pages=torch.full((num_rows,), 1, dtype=torch.int32),
    )
    pages = torch.zeros(num_rows, 1, 1, dtype=torch.int32)
    ops.sparse_decode(torch.zeros_like(out), cache, rows, pages, out, page_size=8, scale=1.0)
    return out[:, 0]


@property_test
@given(
    writes=st.lists(
        st.tuples(
            st.integers(0, 2),  # block
            st.integers(0, 47),  # first token in it
            st.integers(1, 48),  # tokens
            st.integers(0, 3),  # padding slots after them
        ),
        min_size=1,
        max_size=6,
    ),
    page_size=st.sampled_from([8, 16, 24, 48]),
    dtype=st.sampled_from(DTYPES),
)
def test_bounds_are_those_of_the_pages_keys_after_any_writes(
    writes: list[tuple[int, int, int, int]], page_size: int, dtype: torch.dtype
) -> None:
    block_tokens = 48
    block_rows = block_tokens + block_tokens // page_size
    cache = torch.randn(3, 2, 2, block_rows, 64)[:, 1].to(dtype)  # pages were used before
    expected = cache.clone()
    for block, first, count, padding in writes:
        tokens = torch.arange(first, min(first + count, block_tokens))
        slots = torch.cat([block * block_tokens + tokens, torch.full((padding,), -1)])
        key, value = torch.randn(2, len(slots) + 1, 2, 32).to(dtype)  # one more than slots
        ops.write_kv(key, value, cache, slots, page_size=page_size)

        expected[block, :, tokens] = torch.cat(
            [key[: len(tokens)], value[: len(tokens)]], dim=-1
        ).transpose(0, 1)
        for page in {int(token) // page_size for token in tokens}:
            last = int(tokens[tokens // page_size == page].max())
            keys = expected[block, :, page * page_size : last + 1, :32]
            expected[block, :, block_tokens + page, :32] = keys.amin(dim=1)
            expected[block, :, block_tokens + page, 32:] = keys.amax(dim=1)
    assert torch.equal(cache, expected)


@property_test
@given(
    slots=st.lists(st.integers(0, 95), min_size=1, max_size=40, unique=True).map(sorted),
    page_size=st.sampled_from([8, 16, 48]),
    head_size=st.sampled_from([16, 48]),
    shift=st.sampled_from([0.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    score=st.sampled_from(BOUNDS),
)
def test_bounds_of_every_score_are_the_references(
    slots: list[int], page_size: int, head_size: int, shift: float, dtype: torch.dtype, score: Score
) -> None:
    cache = torch.randn(2, 2, 48 + 48 // page_size, 2 * head_size).to(dtype)
    expected = cache.clone()
    key, value = (shift + torch.randn(2, len(slots), 2, head_size)).to(dtype)
    for module, written in ((ops, cache), (reference, expected)):
        slot_mapping = torch.tensor(slots)
        module.write_kv(key, value, written, slot_mapping, page_size=page_size, score=score)
    assert torch.equal(cache[:, :, :48], expected[:, :, :48])
    difference = (cache.double() - expected.double()).abs().max()
    assert difference <= (0.0 if score == "minmax" else bounds_error(expected, page_size))


def test_writing_equals_the_reference_across_blocks_and_threads(two_threads: None) -> None:
    slots = torch.cat([torch.arange(5, 90), torch.tensor([-1, -1]), torch.arange(130, 141)])
    packed = torch.randn(len(slots), 6, 64).bfloat16()  # key and value cut out of QKV
    key, value = packed[:, 2:4], packed[:, 4:]
    found = torch.zeros(5, 2, 34, 128, dtype=torch.bfloat16)
    expected = found.clone()
    ops.write_kv(key, value, found, slots, page_size=16)
    reference.write_kv(key, value, expected, slots, page_size=16)
    assert torch.equal(found, expected)


def change(**changes: Any) -> dict[str, Any]:
    return changes


WRITE_ERRORS = [
    (change(key=torch.zeros(2, 2, 32).half()), "dtype: key must be BFloat16, got Half"),
    (change(key=torch.zeros(2, 3, 32).bfloat16()), r"shape: key must be \[-1, 2, 32\]"),
    (change(value=torch.zeros(3, 2, 32).bfloat16()), r"shape: value must be \[2, 2, 32\]"),
    (change(key=torch.zeros(2, 2, 64).bfloat16()[:, :, ::2]), "layout: key must be contiguous"),
    (change(kv_cache=torch.zeros(3, 2, 9, 64)), "dtype: key must be Float, got BFloat16"),
    (
        change(kv_cache=torch.zeros(3, 2, 9, 64, dtype=torch.float64)),
        "dtype: kv_cache must be BFloat16, Half or Float, got Double",
    ),
    (
        change(kv_cache=torch.zeros(3, 2, 10, 64).bfloat16()),
        r"shape: kv_cache must hold 9 rows per 8 tokens",
    ),
    (
        change(kv_cache=torch.zeros(3, 9, 2, 64).bfloat16().transpose(1, 2)),
        r"layout: kv_cache must be contiguous in its two inner dimensions",
    ),
    (change(kv_cache=torch.zeros(3, 2, 9, 48).bfloat16()), "shape: head_size .* multiple of 16"),
    (change(slot_mapping=torch.zeros(2, dtype=torch.int32)), "dtype: slot_mapping must be Long"),
    (change(slot_mapping=torch.zeros(3).long()), "shape: slot_mapping must have at most key's 2"),
    (change(page_size=12), "shape: page_size must be a positive multiple of 8, got 12"),
    (change(score="mean"), "values: score must be minmax, mean_std, mid_dev or codes, got mean"),
]


@pytest.mark.parametrize(("changes", "message"), WRITE_ERRORS)
def test_write_kv_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "key": torch.zeros(2, 2, 32).bfloat16(),
        "value": torch.zeros(2, 2, 32).bfloat16(),
        "kv_cache": torch.zeros(3, 2, 9, 64).bfloat16(),
        "slot_mapping": torch.tensor([0, 1]),
        "page_size": 8,
    }
    with pytest.raises(RuntimeError, match=f"vllm_quest::write_kv: {message}"):
        ops.write_kv(**{**arguments, **changes})


def int32s(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


DECODE_ERRORS = [
    (change(query=torch.zeros(2, 4, 32)), "dtype: query must be BFloat16, got Float"),
    (change(query=torch.zeros(2, 3, 32).bfloat16()), "shape: query's heads must be a multiple"),
    (change(query=torch.zeros(2, 4, 16).bfloat16()), r"shape: query must be \[-1, -1, 32\]"),
    (change(block_table=torch.zeros(2, 4).long()), "dtype: block_table must be Int, got Long"),
    (change(block_table=torch.zeros(1, 4).int()), r"shape: block_table must be \[2, -1\]"),
    (change(block_table=torch.zeros(4, 2).int().t()), "layout: block_table must be contiguous"),
    (change(seq_lens=int32s(1, 1).long()), "dtype: seq_lens must be Int, got Long"),
    (change(seq_lens=int32s(1)), r"shape: seq_lens must be \[2\]"),
    (change(seq_lens=int32s(1, 33)), "values: seq_lens must be 0 to 32 tokens, got 33 in row 1"),
    (change(budget_pages=int32s(1, 1).float()), "dtype: budget_pages must be Int, got Float"),
    (
        change(budget_pages=int32s(0, 1)),
        "values: budget_pages must be at least 1 page, got 0 in row 0",
    ),
    (
        change(seq_lens=int32s(32, 1), budget_pages=int32s(3, 1)),
        "values: budget_pages must be at most max_selected = 2 pages for longer rows, "
        "got 3 in row 0",
    ),
    (change(pages=torch.zeros(2, 1, 2).int()), r"shape: pages must be \[2, 2, -1\]"),
    (change(pages=torch.zeros(2, 2, 2).long()), "dtype: pages must be Int, got Long"),
    (change(out=torch.zeros(2, 4, 32)), "dtype: out must be BFloat16, got Float"),
    (change(out=torch.zeros(2, 2, 32).bfloat16()), r"shape: out must be \[2, 4, 32\]"),
    (change(sinks=torch.zeros(4)), "dtype: sinks must be BFloat16, got Float"),
    (change(sinks=torch.zeros(2).bfloat16()), r"shape: sinks must be \[4\]"),
    (change(sinks=torch.zeros(8).bfloat16()[::2]), "layout: sinks must be contiguous"),
]


@pytest.mark.parametrize(("changes", "message"), DECODE_ERRORS)
def test_sparse_decode_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    rows = {
        "block_table": torch.zeros(2, 4).int(),
        "seq_lens": int32s(1, 1),
        "budget_pages": int32s(1, 1),
    }
    arguments = {
        "query": torch.zeros(2, 4, 32).bfloat16(),
        "kv_cache": torch.zeros(3, 2, 9, 64).bfloat16(),
        "pages": torch.zeros(2, 2, 2).int(),
        "out": torch.zeros(2, 4, 32).bfloat16(),
    }
    changed = {**rows, **arguments, **changes}
    changed["rows"] = ops.Rows(**{name: changed.pop(name) for name in rows})
    with pytest.raises(RuntimeError, match=f"vllm_quest::sparse_decode: {message}"):
        ops.sparse_decode(**changed, page_size=8, scale=1.0)


def test_score_and_select_say_what_is_wrong() -> None:
    query, cache = torch.zeros(2, 4, 32), torch.zeros(3, 2, 9, 64)
    rows = ops.Rows(torch.zeros(2, 4).int(), int32s(1, 1), int32s(1, 1))
    with pytest.raises(RuntimeError, match="score: shape: scores must have room for 4 pages"):
        ops.score(query, cache, rows, torch.zeros(2, 2, 3), page_size=8)
    with pytest.raises(RuntimeError, match="score: dtype: scores must be Float, got Half"):
        ops.score(query, cache, rows, torch.zeros(2, 2, 4).half(), page_size=8)
    with pytest.raises(RuntimeError, match=r"select: shape: pages must be \[2, 2, -1\]"):
        ops.select(torch.zeros(2, 2, 4), rows, torch.zeros(2, 1, 2).int(), page_size=8)
    with pytest.raises(RuntimeError, match=r"use_cpu_isa: values: isa .*, got none"):
        torch.ops.vllm_quest.use_cpu_isa("none")
