"""Keys in 2 bits: the score `codes` on the CPU, against the reference and inside vLLM."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from batch import FP32_ROUNDOFF, UNTOUCHED
from engines import agree, answers, engine, generate, greedy, random_prompts, write_model
from vllm_quest import config, layout, ops, reference
from vllm_quest.engine_stats import stats
from vllm_quest.ops import Rows

GROUP = config.GROUP_TOKENS
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ISAS = torch.ops.vllm_quest.cpu_isas().split()
FAR_AWAY = 1 << 30
"""A block that no cache has."""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.ops.vllm_quest.use_cpu_isa(request.param)
    yield request.param
    torch.ops.vllm_quest.use_cpu_isa(ISAS[0])


every_isa = pytest.mark.usefixtures("isa")

# Hypothesis may reuse the fixture that sets the instruction set: it stays set.
property_test = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Batch:
    query: Tensor
    kv_cache: Tensor
    rows: Rows
    page_size: int
    soft_cap: float = 0.0

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    @property
    def max_pages(self) -> int:
        tokens = reference.tokens_per_block(self.kv_cache, self.page_size, "codes")
        return self.rows.block_table.shape[1] * tokens // self.page_size


def empty_cache(
    num_blocks: int,
    *,
    block_tokens: int = GROUP,
    num_kv_heads: int = 2,
    head_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
) -> Tensor:
    """A cache of NaN whose blocks lie apart, as a layer's among those of all layers do."""
    rows = layout.block_rows(block_tokens, page_size, "codes")
    shape = (num_blocks, 2, num_kv_heads, rows, 2 * head_size)
    return torch.full(shape, float("nan"), dtype=dtype)[:, 1]


def make_batch(
    seq_lens: Sequence[int],
    budgets: Sequence[int],
    *,
    block_tokens: int = GROUP,
    num_kv_heads: int = 2,
    group_size: int = 4,
    head_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
    soft_cap: float = 0.0,
    shift: float = 0.0,
    seed: int = 0,
) -> Batch:
    """Rows in scattered blocks; NaN wherever no key, value, code or scale of a row lies."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(seq_lens)
    blocks_of = [-(-n // block_tokens) for n in seq_lens]
    free = torch.randperm(sum(blocks_of) + 1, generator=generator).int()
    cache = empty_cache(
        len(free),
        block_tokens=block_tokens,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        page_size=page_size,
    )
    table = torch.full((num_rows, max(blocks_of) + 1), FAR_AWAY, dtype=torch.int32)
    for row, seq_len in enumerate(seq_lens):
        table[row, : blocks_of[row]], free = free[: blocks_of[row]], free[blocks_of[row] :]
        tokens = torch.arange(seq_len)
        slots = table[row, tokens // block_tokens].long() * block_tokens + tokens % block_tokens
        key, value = torch.randn(2, seq_len, num_kv_heads, head_size, generator=generator)
        key = (key + shift).to(dtype)
        reference.write_kv(key, value.to(dtype), cache, slots, page_size=page_size, score="codes")
    query = torch.randn(num_rows, num_kv_heads * group_size, head_size, generator=generator)
    return Batch(
        query=query.to(dtype),
        kv_cache=cache,
        rows=Rows(
            table,
            torch.tensor(seq_lens, dtype=torch.int32),
            torch.tensor(budgets, dtype=torch.int32),
        ),
        page_size=page_size,
        soft_cap=soft_cap,
    )


def score(operators: ModuleType, batch: Batch) -> Tensor:
    shape = (len(batch.rows), batch.kv_cache.shape[1], batch.max_pages)
    scores = torch.full(shape, float(UNTOUCHED))
    operators.score_codes(
        batch.query,
        batch.kv_cache,
        batch.rows,
        torch.full((*batch.query.shape[:2], batch.max_pages), float("nan")),
        scores,
        page_size=batch.page_size,
        scale=batch.scale,
        soft_cap=batch.soft_cap,
    )
    return scores


def select(operators: ModuleType, batch: Batch, scores: Tensor, **kept: int) -> Tensor:
    budgets = [int(b) for b in batch.rows.budget_pages if b < batch.max_pages]
    shape = (*scores.shape[:2], max(budgets, default=1))
    pages = torch.full(shape, UNTOUCHED, dtype=torch.int32)
    operators.select(scores, batch.rows, pages, page_size=batch.page_size, **kept)
    return pages


def attend(operators: ModuleType, batch: Batch, pages: Tensor) -> Tensor:
    out = torch.full_like(batch.query, float("nan"))
    operators.sparse_decode(
        batch.query,
        batch.kv_cache,
        batch.rows,
        pages,
        out,
        page_size=batch.page_size,
        scale=batch.scale,
        soft_cap=batch.soft_cap,
        score="codes",
    )
    return out


def score_error(batch: Batch) -> float:
    """How far a score computed in fp32 may be from the exact one.

    A logit sums head_size products of three and head_size of four factors, in any order: it is off
    by (head_size + 4) roundings of Σ |q_d| (|offset_d| + 3 |step_d|); a key is no larger. A page's
    mass is off by no more than its logits, and by 2e-7 relative for each exponential and sum: less
    than 1e-6 + 16 roundings of its own size. The mass of all pages is off by as much again.
    """
    head_size = batch.query.shape[-1]
    scales = batch.kv_cache[:, :, -1].double().nan_to_num(0.0)
    coded = (scales[..., :head_size].abs() + 3 * scales[..., head_size:]).amax()
    keys = batch.kv_cache[:, :, :GROUP, :head_size].double().nan_to_num(0.0).abs().amax()
    largest = max(coded, keys)
    logit = float(batch.query.double().abs().sum(-1).amax() * largest * batch.scale)
    return 2 * (1.4427 * (head_size + 24) * FP32_ROUNDOFF * (logit + batch.soft_cap) + 3e-6)


def assert_scores_are_the_references(batch: Batch) -> Tensor:
    found, expected = score(ops, batch), score(reference, batch)
    has_codes = expected.abs() < 2.0**100
    assert torch.equal(
        found.where(~has_codes, found.new_zeros(())),
        expected.where(~has_codes, expected.new_zeros(())),
    )
    difference = (found.double() - expected.double()).abs()
    assert difference[has_codes].max() <= score_error(batch)
    return found


# --- layout and settings --------------------------------------------------------------------------


def test_python_and_the_operators_agree_on_the_layout() -> None:
    contract = torch.ops.vllm_quest.contract
    assert (contract("group_tokens"), contract("group_rows")) == layout.unit(16, "codes")
    assert layout.block_rows(256, 16, "codes") == 274
    assert layout.block_tokens(274, 16, "codes") == 256
    with pytest.raises(ValueError, match=r"272 rows; expected a multiple of 137"):
        layout.block_tokens(272, 16, "codes")


def test_packing_is_undone_by_unpacking() -> None:
    codes = torch.randint(0, 4, (2, GROUP, 80), dtype=torch.int32)
    assert torch.equal(reference.unpack(reference.pack(codes)), codes)
    # Channel 16 w + 4 j + b is in bits 8 b + 2 j: here w = 1, j = 2, b = 3.
    one = torch.zeros(1, GROUP, 32, dtype=torch.int32)
    one[0, 5, 16 + 11] = 1
    words = reference.pack(one)
    assert words[0, 1, 5] == 1 << 28
    assert words.count_nonzero() == 1


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_page_sizes_that_divide_a_group_are_allowed(page_size: int) -> None:
    config.QuestConfig(score="codes", page_size=page_size)


# --- write_kv -------------------------------------------------------------------------------------


@every_isa
@property_test
@given(
    writes=st.lists(
        st.tuples(
            st.integers(0, 1),  # block
            st.integers(0, 255),  # first token in it
            st.sampled_from([1, 2, 100, 128, 256]),  # tokens
            st.integers(0, 2),  # padding slots after them
        ),
        min_size=1,
        max_size=6,
    ),
    head_size=st.sampled_from([16, 48, 80]),
    shift=st.sampled_from([0.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_codes_and_scales_are_the_references_after_any_writes(
    writes: list[tuple[int, int, int, int]], head_size: int, shift: float, dtype: torch.dtype
) -> None:
    """The same bits, whatever was there before: drafts overwritten, prefill in chunks, decode."""
    shape = (2, 2, layout.block_rows(256, 16, "codes"), 2 * head_size)
    cache = (torch.randn(shape) + shift).to(dtype)  # blocks were used before
    expected = cache.clone()
    for block, first, count, padding in writes:
        tokens = torch.arange(first, min(first + count, 256))
        slots = torch.cat([block * 256 + tokens, torch.full((padding,), -1)])
        key, value = (torch.randn(2, len(slots) + 1, 2, head_size) + shift).to(dtype)
        for module, written in ((ops, cache), (reference, expected)):
            module.write_kv(key, value, written, slots, page_size=16, score="codes")
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(cache.view(integer), expected.view(integer))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_channel_without_spread_is_its_offset(dtype: torch.dtype) -> None:
    cache = empty_cache(1, dtype=dtype)
    key = torch.randn(GROUP, 2, 64).to(dtype)
    key[:, :, 3], key[:, :, 5] = 0.0, -2.5
    ops.write_kv(key, key, cache, torch.arange(GROUP), page_size=16, score="codes")
    coded = reference.coded_keys(cache, 0, 0)
    assert (coded[:, :, 3] == 0).all()
    assert (coded[:, :, 5] == -2.5).all()


@every_isa
def test_a_group_is_coded_when_its_last_token_is_written_and_not_before() -> None:
    cache = empty_cache(1, block_tokens=2 * GROUP)
    key = torch.randn(2 * GROUP, 2, 64).bfloat16()
    for token in range(2 * GROUP):
        one = slice(token, token + 1)
        ops.write_kv(key[one], key[one], cache, torch.tensor([token]), page_size=16, score="codes")
        coded = [not reference.group_rows(cache, 0, group)[1].isnan().any() for group in (0, 1)]
        assert coded == [token >= GROUP - 1, token >= 2 * GROUP - 1]
    together = empty_cache(1, block_tokens=2 * GROUP)
    ops.write_kv(key, key, together, torch.arange(2 * GROUP), page_size=16, score="codes")
    assert torch.equal(cache.view(torch.int16), together.view(torch.int16))


@pytest.mark.parametrize("spread", [0.0, 4.0], ids=["Gaussian", "with outliers"])
def test_a_coded_key_is_near_its_key(spread: float) -> None:
    """Four even levels keep a Gaussian key to 0.345 standard deviations (Max, 1960)."""
    generator = torch.Generator().manual_seed(0)
    cache = empty_cache(8, head_size=64, dtype=torch.float32)
    size = 1 + spread * torch.rand(64, generator=generator)  # of each channel
    key = torch.randn(8 * GROUP, 2, 64, generator=generator) * size + 3 * size
    ops.write_kv(key, key, cache, torch.arange(8 * GROUP), page_size=16, score="codes")
    coded = torch.stack([reference.coded_keys(cache, block, 0) for block in range(8)])
    true = cache[:, :, :GROUP, :64].double()
    error = ((coded - true) / size).square().mean().sqrt()
    assert 0.33 < error < 0.36


# --- score_codes ----------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_size", "group_size", "page_size", "block_tokens"),
    [
        (64, 1, 8, 128),
        (80, 3, 16, 256),
        (96, 4, 32, 384),
        (128, 8, 64, 128),
        (256, 5, 128, 128),
        (64, 16, 16, 128),
    ],
)
def test_scores_equal_the_references_at_odd_shapes(
    dtype: torch.dtype, head_size: int, group_size: int, page_size: int, block_tokens: int
) -> None:
    lengths = [0, 1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP, 9 * GROUP + 7, 1300]
    batch = make_batch(
        lengths,
        [1, 1, 1, 2, 1, 1, 2, 1],
        dtype=dtype,
        head_size=head_size,
        num_kv_heads=3,
        group_size=group_size,
        page_size=page_size,
        block_tokens=block_tokens,
    )
    found = assert_scores_are_the_references(batch)
    pages = select(ops, batch, found)
    assert torch.equal(pages, select(reference, batch, found))
    out, expected = attend(ops, batch, pages), attend(reference, batch, pages)
    torch.testing.assert_close(out, expected)


@every_isa
@pytest.mark.parametrize("soft_cap", [0.0, 1.5, 30.0])
@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_scores_equal_the_references_with_a_soft_cap_and_large_keys(
    soft_cap: float, shift: float
) -> None:
    assert_scores_are_the_references(make_batch([1000], [3], soft_cap=soft_cap, shift=shift))


@every_isa
@property_test
@given(
    seq_lens=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    budget=st.integers(1, 6),
    page_size=st.sampled_from([8, 16, 64]),
    seed=st.integers(0, 2**16),
)
def test_scores_equal_the_references_at_any_length(
    seq_lens: list[int], budget: int, page_size: int, seed: int
) -> None:
    budgets = [budget] * len(seq_lens)
    batch = make_batch([*seq_lens, 650], [*budgets, 1], page_size=page_size, seed=seed)
    assert_scores_are_the_references(batch)


@every_isa
def test_a_score_is_a_share_of_the_attention() -> None:
    """The formula, written once more: softmax over codes and the last keys, summed by page."""
    batch = make_batch([5 * GROUP + 21], [1], num_kv_heads=1, group_size=3)
    scores = score(ops, batch)
    blocks = batch.rows.block_table[0, :6].tolist()
    coded = [reference.coded_keys(batch.kv_cache, block, 0)[0] for block in blocks[:5]]
    keys = torch.cat([*coded, batch.kv_cache[blocks[5], 0, :21, :64].double()])
    weights = (batch.query[0].double() @ keys.T * batch.scale).softmax(-1)
    expected = weights[:, : 5 * GROUP].unflatten(1, (40, 16)).sum(2).amax(0).log2()
    assert (scores[0, 0, :40] - expected).abs().max() <= score_error(batch)


@every_isa
def test_a_page_without_codes_outranks_all_others_the_newer_the_more() -> None:
    batch = make_batch([6 * GROUP + 50], [3])
    scores = score(ops, batch)
    assert (scores[:, :, 48:52].diff() > 0).all()
    assert scores[:, :, 48:52].min() > scores[:, :, :48].max()
    assert (scores[:, :, 52:] == UNTOUCHED).all()
    assert select(ops, batch, scores).tolist() == [[[49, 50, 51]] * 2]
    kept = select(ops, batch, scores, keep_first_pages=1)
    assert kept.tolist() == [[[0, 50, 51]] * 2]


@every_isa
@pytest.mark.parametrize("keep_first_pages", [0, 1, 5])
@pytest.mark.parametrize("keep_newest_percent", [0, 25, 100])
@pytest.mark.parametrize("budget", [1, 4, 9, 20])
def test_selection_equals_the_references(
    keep_first_pages: int, keep_newest_percent: int, budget: int
) -> None:
    batch = make_batch([5 * GROUP, 6 * GROUP + 70, 100], [budget, budget, 1])
    scores = score(ops, batch)
    kept = {"keep_first_pages": keep_first_pages, "keep_newest_percent": keep_newest_percent}
    pages = select(ops, batch, scores, **kept)
    assert torch.equal(pages, select(reference, batch, scores, **kept))
    # As many of the group that is not full as the budget has room for beside the first pages.
    newest = set(range(48, 53))
    room = max(budget - keep_first_pages, 1)
    for head in range(2):
        assert len(newest & set(pages[1, head].tolist())) >= min(room, len(newest))


@every_isa
def test_the_page_of_most_mass_is_ranked_first() -> None:
    """Sixteen keys that each match a little outweigh one that matches more."""
    batch = make_batch([10 * GROUP], [4], num_kv_heads=1, group_size=1, seed=3)
    direction = batch.query[0, 0].float() / batch.query[0, 0].float().norm()
    keys = torch.randn(10 * GROUP, 1, 64) * 0.3
    logit = keys[:, 0] @ direction * float(batch.query[0, 0].float().norm()) * batch.scale
    keys[:, 0] -= logit[:, None] * direction / float(batch.query.float().norm()) / batch.scale
    raised = direction / float(batch.query.float().norm()) / batch.scale
    keys[16 * 30 : 16 * 31, 0] += 4.0 * raised  # each of page 30: e^4
    keys[16 * 60, 0] += 5.0 * raised  # one of page 60: e^5
    slots = batch.rows.block_table[0, torch.arange(10 * GROUP) // GROUP].long() * GROUP
    slots += torch.arange(10 * GROUP) % GROUP
    keys = keys.bfloat16()
    ops.write_kv(keys, keys, batch.kv_cache, slots, page_size=16, score="codes")
    assert int(score(ops, batch)[0, 0, :80].argmax()) == 30


@every_isa
def test_a_covering_budget_is_full_attention() -> None:
    batch = make_batch([3 * GROUP + 5, 128, 1, 0], [ops.UNLIMITED_PAGES] * 4, dtype=torch.float32)
    scores = score(ops, batch)
    assert (scores == UNTOUCHED).all()
    out = attend(ops, batch, select(ops, batch, scores))
    exact = reference.full_attention(
        batch.query,
        batch.kv_cache,
        batch.rows,
        page_size=16,
        scale=batch.scale,
        score="codes",
    )
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_threads_or_the_batch() -> None:
    batch = make_batch([5000, 700, 130], [4, 4, 4])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = score(ops, batch)
    torch.set_num_threads(1)
    alone = score(ops, batch)
    torch.set_num_threads(before)
    assert torch.equal(together, alone)
    for row in range(3):
        one = slice(row, row + 1)
        single = Batch(batch.query[one], batch.kv_cache, batch.rows[one], 16)
        assert torch.equal(score(ops, single)[0], together[row])


@pytest.mark.parametrize(
    ("rows", "page_size", "message"),
    [
        (136, 16, r"shape: kv_cache must hold 137 rows per 128 tokens"),
        (137, 24, r"shape: page_size must divide 128, the tokens of a group of codes, got 24"),
    ],
)
def test_the_operators_refuse_other_layouts(rows: int, page_size: int, message: str) -> None:
    cache = torch.zeros(2, 2, rows, 64)
    batch = Batch(
        torch.zeros(1, 2, 32),
        cache,
        Rows(*(torch.ones(shape, dtype=torch.int32) for shape in ((1, 1), (1,), (1,)))),
        page_size,
    )
    scores, masses = torch.zeros(1, 2, 16), torch.zeros(1, 2, 16)
    pages = torch.zeros(1, 2, 1, dtype=torch.int32)
    key = torch.zeros(1, 2, 32)
    slots = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=message):
        ops.write_kv(key, key, cache, slots, page_size=page_size, score="codes")
    with pytest.raises(RuntimeError, match=message):
        ops.score_codes(
            batch.query, cache, batch.rows, masses, scores, page_size=page_size, scale=1.0
        )
    with pytest.raises(RuntimeError, match=message):
        attend(ops, batch, pages)


def test_a_head_that_the_rows_cannot_hold_is_refused() -> None:
    cache, key = torch.zeros(2, 2, 137, 48), torch.zeros(1, 2, 24)
    with pytest.raises(RuntimeError, match=r"head_size .* must be a multiple of 16"):
        ops.write_kv(
            key, key, cache, torch.zeros(1, dtype=torch.int64), page_size=16, score="codes"
        )


# --- inside vLLM ----------------------------------------------------------------------------------

CODES = {"score": "codes", "dense_layers": 0}


def test_a_covering_budget_gives_cpu_attns_tokens(tmp_path):
    """With prefixes from the cache and prompts read in chunks, over several groups."""
    model = write_model(tmp_path)
    prefix = random_prompts([300])[0]["prompt_token_ids"]
    prompts = [{"prompt_token_ids": [*prefix, 5 + i]} for i in range(2)] + random_prompts(
        [120, 700]
    )
    options = {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 160,
        "max_model_len": 1024,
    }
    runs = []
    for more in ({"backend": "CPU_ATTN"}, {"quest": {"token_budget": -1, **CODES}}):
        with engine(model, **options, **more) as llm:
            first = answers(llm, prompts, greedy(20))
            again = answers(llm, prompts, greedy(20))  # from the cache
            assert agree(first, again)
            runs.append(first)
    assert agree(*runs)


def test_a_small_budget_reads_few_pages(tmp_path):
    model = write_model(tmp_path)
    kept = {"keep_first_pages": 1, "keep_newest_percent": 25}
    with engine(model, quest={"token_budget": 192, **CODES, **kept}) as llm:
        answers(llm, random_prompts([500, 90]), greedy(10))
        found = stats(llm)
    # Nine steps after the prompt's own, three layers of two KV heads: the longer request is over
    # its budget of 12 pages.
    assert found.sparse_rows == 9 * 3 * 2
    assert found.pages_scored == 3 * 2 * sum(-(-length // 16) for length in range(501, 510))
    assert found.pages_read < found.pages_full / 2


def test_a_block_that_holds_no_whole_groups_is_refused_with_a_cure(tmp_path):
    with pytest.raises(Exception) as error:
        generate(write_model(tmp_path), [], greedy(1), quest=CODES, block_size=64)
    message = str(error.value)
    for word in ("'score'", "'codes'", "block size is 64", "--block-size 128"):
        assert word in message


def test_a_page_size_that_does_not_divide_a_group_is_refused():
    with pytest.raises(ValueError, match=r"\['page_size'\] is 24; allowed: a divisor of 128"):
        config.QuestConfig(score="codes", page_size=24)
