"""FP8 caches: every operator does with them what the reference does. The scales are never 1."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batch import (
    CPU,
    FP8,
    KV_SCALES,
    SINKS,
    UNTOUCHED,
    Shape,
    empty_cache,
    kv_scales,
    make_batch,
    score_error,
)
from gpu.test_cluster_decode import (
    GROWING_LENGTHS,
    decodes_alike,
    decodes_far_keys_alike,
    decodes_what_is_written_beside_it,
    wide_table,
)
from gpu.test_cluster_decode import pytestmark as needs_clusters
from gpu.test_cuda_ops import (
    DEVICE,
    SHAPES,
    attends_alike,
    lengths_around,
    same_bits,
    shape_name,
    written_alike,
)
from gpu.test_cuda_ops import pytestmark as needs_a_gpu
from vllm_quest import ops, reference
from vllm_quest.config import BOUNDS, Score

pytestmark = needs_a_gpu
on_clusters = needs_clusters[-1]

FP8_SHAPES = [replace(shape, cache=FP8) for shape in SHAPES if shape.dtype == torch.bfloat16]
FP8_SHAPES += [Shape(group_size=16, cache=FP8), Shape(64, group_size=16, cache=FP8)]
PLAIN = Shape(cache=FP8)

all_shapes = pytest.mark.parametrize("shape", FP8_SHAPES, ids=shape_name)

# --- write_kv -----------------------------------------------------------------------------------


def every_bf16() -> Tensor:
    """All bit patterns but those of NaN, shuffled: `[2 * num_tokens, 1, 64]`, zeros at the end."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    values = values[~values.isnan()]
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    padding = torch.zeros(-len(values) % (2 * 16 * 64), dtype=torch.bfloat16)
    return torch.cat([values, padding]).view(-1, 1, 64)


def write(module, values: Tensor, scales: ops.KvScales) -> Tensor:
    """The cache after one half of the values was written as keys and the other as values."""
    key, value = values.chunk(2)
    shape = Shape(64, num_kv_heads=1, cache=FP8)
    cache = empty_cache(shape, len(key) // 16, values.device)
    slots = torch.arange(len(key), device=values.device)
    module.write_kv(key, value, cache, slots, page_size=16, scales=scales)
    return cache


@pytest.mark.parametrize("key_scale", [0.0123, 1.0, 0.37, 700.0])
def test_every_number_is_rounded_as_by_the_reference(key_scale: float) -> None:
    """Denormal, largest and infinite ones too."""
    scales = ops.KvScales(torch.tensor(key_scale), torch.tensor(3 * key_scale))
    on_gpu = ops.KvScales(scales.key.to(DEVICE), scales.value.to(DEVICE))
    values = every_bf16()
    found, expected = write(ops, values.to(DEVICE), on_gpu), write(reference, values, scales)
    assert same_bits(found[:, :, :16], expected[:, :, :16])
    assert torch.equal(found[:, :, 16:].cpu().double(), expected[:, :, 16:].double())


@pytest.mark.parametrize("exponent", [-149, -130, -100, -65, -64, -9, 0, 63, 64, 110, 127])
def test_scales_of_every_size_round_as_divisors(exponent: int) -> None:
    """The kernel multiplies by a reciprocal instead, and corrects the product."""
    values = every_bf16()
    key, value = values.chunk(2)
    mantissas = 1 + torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in torch.ldexp(mantissas, torch.tensor(exponent)).float():
        cache = write(ops, values.to(DEVICE), ops.KvScales(*[scale.to(DEVICE)] * 2))
        expected = [reference.quantised(x, scale).view(-1, 1, 16, 64) for x in (key, value)]
        assert same_bits(cache[:, :, :16].cpu(), torch.cat(expected, dim=-1))


@pytest.mark.parametrize("key_scale", [0.0123, 1.0, 0.37])
def test_stored_bits_are_those_of_vllms_own_write(key_scale: float) -> None:
    vllm_ops = pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        pytest.skip("this vLLM was built without CUDA")
    scales = ops.KvScales(*(torch.tensor(x, device=DEVICE) for x in (key_scale, 3 * key_scale)))
    values = every_bf16().to(DEVICE)
    found = write(ops, values, scales)
    theirs = torch.zeros_like(found[:, :, :16]).transpose(1, 2)
    key_cache, value_cache = theirs.view(torch.uint8).split(64, dim=-1)
    key, value = values.chunk(2)
    slots = torch.arange(len(key), device=DEVICE)
    vllm_ops.reshape_and_cache_flash(
        key, value, key_cache, value_cache, slots, "fp8", scales.key, scales.value
    )
    assert same_bits(found[:, :, :16], theirs.transpose(1, 2))


def test_nan_stays_nan_in_the_cache_and_in_its_bounds() -> None:
    values = torch.ones(32, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    values[5, 0, 7] = torch.nan
    cache = write(ops, values, kv_scales(PLAIN, DEVICE)).cpu().double()
    assert cache[0, 0, 5, 7].isnan()
    assert cache[0, 0, 16, [7, 64 + 7]].isnan().all()
    assert cache.isnan().sum() == 3


@all_shapes
def test_prefill_and_decode_write_what_the_reference_does(shape: Shape) -> None:
    first_page = [shape.block_tokens * 5 + i for i in range(shape.block_tokens)]
    middle = [shape.block_tokens * 2 + i for i in range(3, shape.block_tokens)]
    ends_inside = [shape.block_tokens * 7 + i for i in range(shape.block_tokens - 2)]
    assert written_alike(shape, [*first_page, *middle, *ends_inside])
    decode = [block * shape.block_tokens + block % shape.block_tokens for block in range(11)]
    assert written_alike(shape, decode[::-1])


@pytest.mark.parametrize("score", BOUNDS)
def test_every_score_has_its_bounds(score: Score) -> None:
    prefill = list(range(35, 48))
    decode = [block * 16 + 7 * block % 16 for block in range(4, 9)]
    skips = [16 * 9 + i for i in (2, 5, 6)]
    assert written_alike(PLAIN, [*prefill, *decode, *skips, -1], score=score)


# --- score --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
@all_shapes
def test_scores_match(shape: Shape, factor: float) -> None:
    """Queries become fp16 numbers without losing their range."""
    batch = make_batch(shape, lengths_around(shape.page_size, 4), 4, DEVICE)
    batch.query *= factor
    batch.query[:, -1] *= 1000  # The heads of a group are compared.
    expected = batch.to(CPU)
    batch.score()
    expected.score(reference)
    is_written = expected.scores != UNTOUCHED
    assert torch.equal(batch.scores.cpu() != UNTOUCHED, is_written)
    difference = (batch.scores.cpu() - expected.scores).abs().max().item()
    assert difference <= score_error(expected)


def test_scores_bound_every_key() -> None:
    batch = make_batch(replace(PLAIN, num_kv_heads=1), [999], 1, DEVICE)
    scores = batch.score().cpu()[0, 0]
    blocks = batch.rows.block_table.cpu()[0, :63].long()
    keys = batch.kv_cache.cpu()[blocks, 0, :16, :128].double()
    logits = torch.einsum("hd,ptd->pth", batch.query.cpu()[0].double(), keys)
    largest = logits.nan_to_num(-torch.inf).amax(dim=(1, 2))
    assert (scores[:63].double() >= largest - score_error(batch.to(CPU))).all()


# --- sparse_decode ------------------------------------------------------------------------------


@pytest.mark.parametrize("budget_pages", [4, ops.UNLIMITED_PAGES])
@all_shapes
def test_split_decode_matches(shape: Shape, budget_pages: int) -> None:
    lengths = lengths_around(shape.page_size, 4)
    assert attends_alike(make_batch(shape, lengths, budget_pages, DEVICE))


def test_split_decode_of_rows_that_many_ctas_attend_to() -> None:
    budgets = [ops.UNLIMITED_PAGES, 4, 100, ops.UNLIMITED_PAGES]
    lengths = [9000, 700, 5000, 20]
    assert attends_alike(make_batch(PLAIN, lengths, budgets, DEVICE, sinks=SINKS, soft_cap=3.0))


def test_split_decode_with_large_logits() -> None:
    batch = make_batch(PLAIN, [900, 2000], 32, DEVICE)
    batch.query *= 30
    assert attends_alike(batch)


def test_scales_are_read_when_a_graph_is_replayed() -> None:
    batch = make_batch(PLAIN, [700, 9000], 8, DEVICE)
    assert batch.scales is not None
    batch.run()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.run()
    batch.scales.key.fill_(0.9)
    batch.scales.value.fill_(0.01)
    graph.replay()
    replayed = batch.out.clone()
    assert attends_alike(batch)
    assert same_bits(batch.out, replayed)


def test_nan_is_seen() -> None:
    batch = make_batch(PLAIN, [700], ops.UNLIMITED_PAGES, DEVICE)
    block = int(batch.rows.block_table[0, 3])
    batch.kv_cache[block, 0, 5, 128 + 9] = torch.nan
    out = batch.sparse_decode()
    assert out[0, :4, 9].isnan().all()
    assert out.isnan().sum() == 4


# --- cluster_decode -----------------------------------------------------------------------------


@on_clusters
@pytest.mark.parametrize("budget_pages", [4, ops.UNLIMITED_PAGES])
@all_shapes
def test_clusters_match(shape: Shape, budget_pages: int) -> None:
    lengths = lengths_around(shape.page_size, 4)
    assert decodes_alike(make_batch(shape, lengths, budget_pages, DEVICE))


@on_clusters
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 17, 33])
def test_clusters_of_every_size(rows: int) -> None:
    lengths = [1000 + 977 * row % 3000 for row in range(rows)]
    shape = Shape(num_kv_heads=8, pages_per_block=8, cache=FP8)
    assert decodes_alike(make_batch(shape, lengths, 40, DEVICE, sinks=SINKS))


@on_clusters
@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("budget_pages", [1, 9, 40])
def test_many_rows(budget_pages: int, page_size: int) -> None:
    lengths = [1 + 211 * row % 4000 for row in range(40)]
    shape = Shape(num_kv_heads=4, page_size=page_size, cache=FP8)
    batch = make_batch(shape, lengths, budget_pages, DEVICE)
    batch.query[10:20] = 0  # of equal scores, most warps' best are not chosen
    assert decodes_alike(batch)


@on_clusters
@pytest.mark.parametrize("head_size", [64, 96, 256])
def test_many_rows_of_other_heads(head_size: int) -> None:
    lengths = [1 + 211 * row % 4000 for row in range(40)]
    shape = Shape(head_size, num_kv_heads=4, group_size=9, cache=FP8)
    assert decodes_alike(make_batch(shape, lengths, 9, DEVICE))


@on_clusters
def test_pages_are_kept_in_clusters() -> None:
    batch = make_batch(PLAIN, [3000, 700, 5, 2000], [40, 9, 1, 100], DEVICE)
    batch.kept = {"keep_first_pages": 2, "keep_newest_percent": 25}
    assert decodes_alike(batch)


@on_clusters
def test_rows_with_far_keys() -> None:
    assert decodes_far_keys_alike(40, page_size=8, cache=FP8)


@on_clusters
@pytest.mark.large
@pytest.mark.parametrize("head_size", [64, 96, 256])
def test_far_keys_of_other_heads(head_size: int) -> None:
    shape = Shape(head_size, num_kv_heads=1, group_size=9, cache=FP8)
    tokens = wide_table(shape)
    assert decodes_alike(make_batch(shape, [tokens - 5, 70], 9, DEVICE, max_tokens=tokens))


@on_clusters
def test_long_dense_rows_beside_others() -> None:
    budget_pages = [ops.UNLIMITED_PAGES] + [4] * 20 + [ops.UNLIMITED_PAGES] * 10
    lengths = [9000] + [100] * 20 + [8192, 8193, 0, 1, 12000, 50, 60, 70, 80, 90]
    assert decodes_alike(make_batch(PLAIN, lengths, budget_pages, DEVICE))


@on_clusters
@pytest.mark.parametrize("pages_per_block", [1, 8])
@pytest.mark.parametrize("budget_pages", [4, 40, ops.UNLIMITED_PAGES, ops.UNSETTLED_PAGES])
def test_decoding_beside_the_write_reads_what_is_written(
    budget_pages: int, pages_per_block: int
) -> None:
    shape = Shape(num_kv_heads=4, pages_per_block=pages_per_block, cache=FP8)
    decodes_what_is_written_beside_it(shape, GROWING_LENGTHS, budget_pages)


@on_clusters
def test_results_are_repeatable_bit_for_bit() -> None:
    lengths = [8000, 31, 2500, 0, 640]
    batch = make_batch(replace(PLAIN, num_kv_heads=8), lengths, 40, DEVICE, sinks=SINKS)
    in_clusters, split = batch.cluster_decode().clone(), batch.run().out.clone()
    for _ in range(20):
        batch.out.fill_(torch.nan)
        assert same_bits(batch.cluster_decode(), in_clusters)
        assert same_bits(batch.run().out, split)


def test_small_pipeline() -> None:
    """Each operator once or twice, with little data: the shortest run for a sanitizer."""
    assert written_alike(replace(PLAIN, head_size=96), [3, 4, 5, 40, -1])
    assert attends_alike(make_batch(PLAIN, [700, 5, 0], 4, DEVICE))
    assert attends_alike(make_batch(replace(PLAIN, num_kv_heads=1), [1500], 2000, DEVICE))


@on_clusters
def test_small_clusters() -> None:
    """For a sanitizer: clusters of several CTAs, CTAs alone, and a row that all attend to."""
    assert decodes_alike(make_batch(PLAIN, [700, 5, 0, 900], 4, DEVICE, sinks=SINKS))
    assert decodes_alike(make_batch(Shape(96, 1, 9, cache=FP8), [300] * 140, 4, DEVICE))
    budgets = [ops.UNLIMITED_PAGES, 2]
    assert decodes_alike(make_batch(replace(PLAIN, num_kv_heads=1), [8200, 40], budgets, DEVICE))


# --- refusals -----------------------------------------------------------------------------------


def test_scales_belong_to_fp8() -> None:
    batch = make_batch(PLAIN, [40], 1, DEVICE)
    with pytest.raises(RuntimeError, match="needs both; got none and a kv_cache of Float8"):
        replace(batch, scales=None).sparse_decode()
    plain = make_batch(Shape(), [40], 1, DEVICE)
    plain.scales = batch.scales
    with pytest.raises(RuntimeError, match="got both and a kv_cache of BFloat16"):
        plain.sparse_decode()
    batch.scales = ops.KvScales(torch.tensor(KV_SCALES[0]), torch.tensor(KV_SCALES[1]))
    with pytest.raises(RuntimeError, match="key_scale must be on the GPU"):
        batch.sparse_decode()


def test_queries_are_bf16() -> None:
    batch = make_batch(PLAIN, [40], 1, DEVICE)
    batch.query = batch.query.half()
    with pytest.raises(RuntimeError, match="query must be BFloat16, got Half"):
        batch.score()


def test_codes_have_no_fp8() -> None:
    batch = make_batch(PLAIN, [40], 1, DEVICE)
    cache = torch.zeros(2, 2, 137, 256, device=DEVICE).to(FP8)
    with pytest.raises(RuntimeError, match="16 bits or more for the score codes"):
        ops.write_kv(
            batch.query[:, :2],
            batch.query[:, :2],
            cache,
            torch.zeros(1, dtype=torch.int64, device=DEVICE),
            page_size=16,
            score="codes",
            scales=batch.scales,
        )
