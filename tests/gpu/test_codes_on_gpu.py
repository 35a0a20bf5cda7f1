"""Keys in 2 bits on a GPU: the reference's bits, and its scores but for the query's rounding."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batch import UNTOUCHED
from test_codes import Batch, attend, make_batch, score, score_error, select
from vllm_quest import config, extension, layout, ops, reference
from vllm_quest.ops import Rows

DEVICE = torch.device("cuda")
GROUP = config.GROUP_TOKENS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not extension.library("cuda").exists(), reason="the CUDA operators are not built"
    ),
]

# dtype, head size, query heads per KV head, page size, tokens of a block
SHAPES = [
    (torch.bfloat16, 128, 4, 16, 128),
    (torch.float16, 128, 8, 16, 256),
    (torch.bfloat16, 128, 16, 8, 128),
    (torch.bfloat16, 64, 1, 32, 384),
    (torch.float16, 64, 7, 64, 128),
    (torch.bfloat16, 96, 3, 16, 128),
    (torch.float16, 96, 9, 128, 128),
    (torch.bfloat16, 256, 5, 16, 128),
    (torch.float16, 256, 16, 16, 128),
]

all_shapes = pytest.mark.parametrize(
    ("dtype", "head_size", "group_size", "page_size", "block_tokens"), SHAPES, ids=str
)


def on(device: torch.device, batch: Batch) -> Batch:
    rows = Rows(*(tensor.to(device) for tensor in vars(batch.rows).values()))
    return replace(
        batch, query=batch.query.to(device), kv_cache=batch.kv_cache.to(device), rows=rows
    )


def run(operator: Callable[..., Tensor], batch: Batch, *more: Tensor) -> Tensor:
    """An operator's output on the GPU, brought here. Outputs are made where the arguments are."""
    with DEVICE:
        return operator(ops, on(DEVICE, batch), *(tensor.to(DEVICE) for tensor in more)).cpu()


def rounding_of_the_query(batch: Batch) -> float:
    """How far the integers that stand for q * step may move a score.

    Each is off by half a part in 2^22 / (3 * head_size) - 1 of the largest, and meets a code of at
    most 3. Exponentials and logarithms are approximate to within 1e-5. A score is a difference of
    two masses.
    """
    head_size = batch.query.shape[-1]
    steps = batch.kv_cache[:, :, -1, head_size:].double().nan_to_num(0.0)
    largest = float(steps.amax() * batch.query.double().abs().amax())
    integers = 2**22 // (3 * head_size) - 1
    return 2 * (1.4427 * batch.scale * 3 * head_size * 0.5 * largest / integers + 1e-5)


def assert_scores_are_the_references(batch: Batch) -> Tensor:
    found, expected = run(score, batch), score(reference, batch)
    has_codes = (expected.abs() < 2.0**100) & (expected != UNTOUCHED)
    assert torch.equal(found[~has_codes], expected[~has_codes])
    error = (found.double() - expected.double()).abs()[has_codes]
    limit = score_error(batch) + rounding_of_the_query(batch)
    assert not has_codes.any() or error.max() <= limit
    return found


@pytest.mark.parametrize("first", [0, 3, 127])
@all_shapes
def test_codes_and_scales_are_the_references_after_any_writes(
    dtype: torch.dtype,
    head_size: int,
    group_size: int,
    page_size: int,
    block_tokens: int,
    first: int,
) -> None:
    """Prefill, decode of many rows at once, drafts written anew, padding."""
    rows = layout.block_rows(block_tokens, page_size, "codes")
    expected = torch.randn(40, 3, rows, 2 * head_size).to(dtype)  # blocks were used before
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
        key, value = (3 + torch.randn(2, len(slots) + 2, 3, head_size)).to(dtype)
        settings = {"page_size": page_size, "score": "codes"}
        ops.write_kv(key.to(DEVICE), value.to(DEVICE), cache, slots.to(DEVICE), **settings)
        reference.write_kv(key, value, expected, slots, **settings)
        assert torch.equal(cache.cpu().view(torch.int16), expected.view(torch.int16))


@all_shapes
def test_scores_selection_and_output_are_the_references(
    dtype: torch.dtype, head_size: int, group_size: int, page_size: int, block_tokens: int
) -> None:
    lengths = [0, 1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP, 9 * GROUP + 7, 1300, 5000]
    batch = make_batch(
        lengths,
        [1, 1, 1, 2, 1, 1, 2, 1, 3],
        dtype=dtype,
        head_size=head_size,
        num_kv_heads=3,
        group_size=group_size,
        page_size=page_size,
        block_tokens=block_tokens,
    )
    scores = assert_scores_are_the_references(batch)
    pages = run(select, batch, scores)
    assert torch.equal(pages, select(reference, batch, scores))
    with DEVICE:
        workspace = ops.decode_workspace(group_size, head_size, DEVICE)
        moved = on(DEVICE, batch)
        out = torch.full_like(moved.query, float("nan"))
        ops.sparse_decode(
            moved.query,
            moved.kv_cache,
            moved.rows,
            pages.to(DEVICE),
            out,
            page_size=page_size,
            scale=batch.scale,
            workspace=workspace,
            score="codes",
        )
    torch.testing.assert_close(out.cpu(), attend(reference, batch, pages), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5, 30.0])
@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_scores_are_the_references_with_a_soft_cap_and_large_keys(
    soft_cap: float, shift: float
) -> None:
    batch = make_batch([1000], [3], soft_cap=soft_cap, shift=shift, head_size=128)
    assert_scores_are_the_references(batch)


def test_scores_do_not_depend_on_the_batch_and_repeat() -> None:
    batch = make_batch([5000, 700, 130], [4, 4, 4], head_size=128)
    together = run(score, batch)
    assert torch.equal(run(score, batch), together)
    for row in range(3):
        one = slice(row, row + 1)
        single = replace(batch, query=batch.query[one], rows=batch.rows[one])
        assert torch.equal(run(score, single)[0], together[row])


def test_a_group_that_becomes_full_is_coded_before_it_is_scored() -> None:
    """write_kv, write_codes and score_codes follow one another without a word from the host."""
    batch = make_batch([4 * GROUP] * 8, [4] * 8, head_size=128)
    expected = run(score, batch)
    with DEVICE:
        moved = on(DEVICE, batch)
        slots = moved.rows.block_table[:, 3].long() * GROUP + GROUP - 1
        newest = moved.kv_cache[moved.rows.block_table[:, 3].long(), :, GROUP - 1].clone()
        key, value = newest.chunk(2, dim=-1)
        for block in moved.rows.block_table[:, 3].tolist():
            moved.kv_cache[block, :, GROUP - 1 :] = float("nan")
        ops.write_kv(key, value, moved.kv_cache, slots, page_size=16, score="codes")
        assert torch.equal(score(ops, moved).cpu(), expected)


def test_clusters_refuse_codes_by_name() -> None:
    moved = on(DEVICE, make_batch([300], [3], head_size=128))
    with pytest.raises(RuntimeError, match=r"score must be made of bounds, got codes"):
        ops.cluster_decode(
            moved.query,
            moved.kv_cache,
            moved.rows,
            torch.empty_like(moved.query),
            page_size=16,
            scale=1.0,
            score="codes",
        )
