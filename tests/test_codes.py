"""Keys in 2 bits: the score `codes` on the CPU, against the reference and inside vLLM."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from batch import CPU, UNTOUCHED, Batch, Shape, empty_cache, make_batch, score_codes_error
from engines import agree, answers, engine, generate, greedy, random_prompts, write_model
from vllm_quest import config, layout, ops, reference
from vllm_quest.engine_stats import stats

GROUP = config.GROUP_TOKENS
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ISAS = torch.ops.vllm_quest.cpu_isas().split()
CODED = Shape(head_size=64, pages_per_block=8, score="codes", is_strided=True)


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


def assert_scores_are_the_references(batch: Batch) -> Tensor:
    found, expected = batch.score(), batch.fresh().score(reference)
    has_codes = expected.abs() < 2.0**100
    assert torch.equal(
        found.where(~has_codes, found.new_zeros(())),
        expected.where(~has_codes, expected.new_zeros(())),
    )
    difference = (found.double() - expected.double()).abs()
    assert difference[has_codes].max() <= score_codes_error(batch)
    return found


def select(batch: Batch, **kept: int) -> Tensor:
    """The pages chosen by the scores that the batch has, the reference's too."""
    found, expected = (replace(batch.fresh(), scores=batch.scores, kept=kept) for _ in range(2))
    pages = found.select()
    assert torch.equal(pages, expected.select(reference))
    return pages


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
    cache = empty_cache(replace(CODED, dtype=dtype), 1, CPU)
    key = torch.randn(GROUP, 2, 64).to(dtype)
    key[:, :, 3], key[:, :, 5] = 0.0, -2.5
    ops.write_kv(key, key, cache, torch.arange(GROUP), page_size=16, score="codes")
    coded = reference.coded_keys(cache, 0, 0)
    assert (coded[:, :, 3] == 0).all()
    assert (coded[:, :, 5] == -2.5).all()


@every_isa
def test_a_group_is_coded_when_its_last_token_is_written_and_not_before() -> None:
    shape = replace(CODED, pages_per_block=16)
    cache = empty_cache(shape, 1, CPU)
    key = torch.randn(2 * GROUP, 2, 64).bfloat16()
    for token in range(2 * GROUP):
        one = slice(token, token + 1)
        ops.write_kv(key[one], key[one], cache, torch.tensor([token]), page_size=16, score="codes")
        coded = [not reference.group_rows(cache, 0, group)[1].isnan().any() for group in (0, 1)]
        assert coded == [token >= GROUP - 1, token >= 2 * GROUP - 1]
    together = empty_cache(shape, 1, CPU)
    ops.write_kv(key, key, together, torch.arange(2 * GROUP), page_size=16, score="codes")
    assert torch.equal(cache.view(torch.int16), together.view(torch.int16))


@pytest.mark.parametrize("spread", [0.0, 4.0], ids=["Gaussian", "with outliers"])
def test_a_coded_key_is_near_its_key(spread: float) -> None:
    """Four even levels keep a Gaussian key to 0.345 standard deviations (Max, 1960)."""
    generator = torch.Generator().manual_seed(0)
    cache = empty_cache(replace(CODED, dtype=torch.float32), 8, CPU)
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
    shape = replace(
        CODED,
        dtype=dtype,
        head_size=head_size,
        num_kv_heads=3,
        group_size=group_size,
        page_size=page_size,
        pages_per_block=block_tokens // page_size,
    )
    batch = make_batch(shape, lengths, [1, 1, 1, 2, 1, 1, 2, 1])
    assert_scores_are_the_references(batch)
    batch.pages = select(batch)
    expected = replace(batch.fresh(), pages=batch.pages).sparse_decode(reference)
    torch.testing.assert_close(batch.sparse_decode(), expected)


@every_isa
@pytest.mark.parametrize("soft_cap", [0.0, 1.5, 30.0])
@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_scores_equal_the_references_with_a_soft_cap_and_large_keys(
    soft_cap: float, shift: float
) -> None:
    batch = make_batch(CODED, [1000], 3, soft_cap=soft_cap, shift=shift)
    assert_scores_are_the_references(batch)


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
    shape = replace(CODED, page_size=page_size, pages_per_block=GROUP // page_size)
    batch = make_batch(shape, [*seq_lens, 650], [*budgets, 1], seed=seed)
    assert_scores_are_the_references(batch)


@every_isa
def test_a_score_is_a_share_of_the_attention() -> None:
    """The formula, written once more: softmax over codes and the last keys, summed by page."""
    batch = make_batch(replace(CODED, num_kv_heads=1, group_size=3), [5 * GROUP + 21], 1)
    scores = batch.score()
    blocks = batch.rows.block_table[0, :6].tolist()
    of_groups = [reference.coded_keys(batch.kv_cache, block, 0)[0] for block in blocks[:5]]
    keys = torch.cat([*of_groups, batch.kv_cache[blocks[5], 0, :21, :64].double()])
    weights = (batch.query[0].double() @ keys.T * batch.scale).softmax(-1)
    expected = weights[:, : 5 * GROUP].unflatten(1, (40, 16)).sum(2).amax(0).log2()
    assert (scores[0, 0, :40] - expected).abs().max() <= score_codes_error(batch)


@every_isa
def test_a_page_without_codes_outranks_all_others_the_newer_the_more() -> None:
    batch = make_batch(CODED, [6 * GROUP + 50], 3)
    scores = batch.score()
    assert (scores[:, :, 48:52].diff() > 0).all()
    assert scores[:, :, 48:52].min() > scores[:, :, :48].max()
    assert (scores[:, :, 52:] == UNTOUCHED).all()
    assert select(batch).tolist() == [[[49, 50, 51]] * 2]
    assert select(batch, keep_first_pages=1).tolist() == [[[0, 50, 51]] * 2]


@every_isa
@pytest.mark.parametrize("keep_first_pages", [0, 1, 5])
@pytest.mark.parametrize("keep_newest_percent", [0, 25, 100])
@pytest.mark.parametrize("budget", [1, 4, 9, 20])
def test_selection_equals_the_references(
    keep_first_pages: int, keep_newest_percent: int, budget: int
) -> None:
    batch = make_batch(CODED, [5 * GROUP, 6 * GROUP + 70, 100], [budget, budget, 1])
    batch.score()
    kept = {"keep_first_pages": keep_first_pages, "keep_newest_percent": keep_newest_percent}
    pages = select(batch, **kept)
    # As many of the group that is not full as the budget has room for beside the first pages.
    newest = set(range(48, 53))
    room = max(budget - keep_first_pages, 1)
    for head in range(2):
        assert len(newest & set(pages[1, head].tolist())) >= min(room, len(newest))


@every_isa
def test_the_page_of_most_mass_is_ranked_first() -> None:
    """Sixteen keys that each match a little outweigh one that matches more."""
    batch = make_batch(replace(CODED, num_kv_heads=1, group_size=1), [10 * GROUP], 4, seed=3)
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
    assert int(batch.score()[0, 0, :80].argmax()) == 30


@every_isa
def test_a_covering_budget_is_full_attention() -> None:
    shape = replace(CODED, dtype=torch.float32)
    batch = make_batch(shape, [3 * GROUP + 5, 128, 1, 0], ops.UNLIMITED_PAGES).run()
    assert (batch.scores == UNTOUCHED).all()
    exact = batch.full_attention().float()
    torch.testing.assert_close(batch.out, exact, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_threads_or_the_batch() -> None:
    batch = make_batch(CODED, [5000, 700, 130], 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    together = batch.score()
    torch.set_num_threads(1)
    alone = batch.fresh().score()
    torch.set_num_threads(before)
    assert torch.equal(together, alone)
    for row in range(3):
        assert torch.equal(batch.take_row(row).score()[0], together[row])


@pytest.mark.parametrize(
    ("rows", "page_size", "message"),
    [
        (136, 16, r"shape: kv_cache must hold 137 rows per 128 tokens"),
        (137, 24, r"shape: page_size must divide 128, the tokens of a group of codes, got 24"),
    ],
)
def test_the_operators_refuse_other_layouts(rows: int, page_size: int, message: str) -> None:
    shape = replace(CODED, head_size=32, page_size=16, is_strided=False)
    batch = make_batch(shape, [200], 1)
    kv_cache = torch.zeros(2, 2, rows, 64, dtype=shape.dtype)
    batch = replace(batch, shape=replace(shape, page_size=page_size), kv_cache=kv_cache)
    key, slots = batch.query[:, :2], torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=message):
        ops.write_kv(key, key, kv_cache, slots, page_size=page_size, score="codes")
    with pytest.raises(RuntimeError, match=message):
        batch.score()
    with pytest.raises(RuntimeError, match=message):
        batch.sparse_decode()


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
