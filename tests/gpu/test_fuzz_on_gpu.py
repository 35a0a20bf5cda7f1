"""The fuzzer's checks on GPUs: its reference there, and the steps that CUDA graphs run."""

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
import torch

import batched_reference
from batch import FP8, SINKS, UNTOUCHED, Shape, make_batch
from batched_reference import Blocks
from fuzz.cases import EngineCase, RequestCase, Wave
from fuzz.run import run_wave, running
from gpu.test_cuda_ops import DEVICE, SHAPES, lengths_around, shape_name
from gpu.test_cuda_ops import pytestmark as needs_a_gpu
from vllm_quest import ops

pytestmark = needs_a_gpu

BLOCK_TOKENS = 128
HAS_CLUSTERS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)

MORE_SHAPES = [
    *SHAPES,
    *(replace(shape, cache=FP8) for shape in SHAPES if shape.dtype == torch.bfloat16),
    Shape(head_size=64, pages_per_block=8, score="codes"),
    Shape(page_size=64, pages_per_block=2, group_size=7, dtype=torch.float16, score="codes"),
]


@pytest.mark.parametrize("shape", MORE_SHAPES, ids=shape_name)
def test_operators_are_within_what_the_batched_reference_allows(shape):
    lengths = lengths_around(shape.page_size, 4)
    extras = {"sinks": SINKS, "soft_cap": 20.0}
    batch = make_batch(shape, lengths, 4, DEVICE, **extras)
    batch.kept = {"keep_first_pages": 1, "keep_newest_percent": 25}
    blocks = Blocks.of(batch.kv_cache, batch.rows, shape.page_size, shape.score, batch.scales)
    logits = {"scale": batch.scale, "soft_cap": batch.soft_cap}
    chosen, _ = batched_reference.select(
        batch.score(), blocks, batch.rows.budget_pages, keep_first=1, keep_newest=25
    )
    is_over = blocks.num_pages > batch.rows.budget_pages
    attended = chosen | ~is_over[:, None, None]
    exact, limit = batched_reference.attention(
        batch.query, blocks, attended, sinks=batch.sinks, **logits
    )
    batch.select()
    for row in is_over.nonzero().flatten().tolist():
        for head in range(shape.num_kv_heads):
            listed = batch.pages[row, head, :4].tolist()
            assert chosen[row, head].nonzero().flatten().tolist() == listed
    assert ((batch.sparse_decode().double() - exact).abs() <= limit).all()
    if HAS_CLUSTERS:
        batch.pages.fill_(UNTOUCHED)
        batch.out.fill_(torch.nan)
        assert ((batch.cluster_decode().double() - exact).abs() <= limit).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def engine_case(runner: str, cache: str, score: str = "minmax", speculation="") -> EngineCase:
    quest = {"token_budget": 64, "dense_layers": 1, "score": score}
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [8, 32]}
    options = {
        "block_size": BLOCK_TOKENS,
        "max_model_len": 512,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        "dtype": "bfloat16",
        "enforce_eager": False,
        "compilation_config": graphs,
    }
    if cache == "fp8":
        options["kv_cache_dtype"] = "auto"  # the checkpoint says so
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0"}
    return EngineCase("guessable", quest, options, speculation, environment)


def small_wave() -> Wave:
    """Requests within and beyond the budget, of which some share their prompt."""
    lengths = [129, 33, 200, 257, 129, 400, 1]
    return Wave(
        tuple(
            RequestCase(f"r{number}", number % 3, 0, 0, length, own=length, num_answer=40)
            for number, length in enumerate(lengths)
        )
    )


@pytest.mark.parametrize("speculation", ["", "ngram"])
@pytest.mark.parametrize("runner", ["V2", "V1"])
@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_rows_in_graphs_are_checked(folder, runner, cache, speculation):
    with running(engine_case(runner, cache, speculation=speculation), folder) as llm:
        outcome = run_wave(llm, small_wave(), 512)
    assert outcome.faults == []
    # Graphs verify drafts where all requests have as many.
    assert speculation or outcome.totals.rows_in_graphs > outcome.totals.rows / 2
    assert outcome.totals.sparse_rows > 100


@pytest.mark.parametrize("runner", ["V2", "V1"])
def test_codes_in_graphs_are_checked(folder, runner):
    with running(engine_case(runner, "bf16", "codes"), folder) as llm:
        outcome = run_wave(llm, small_wave(), 512)
    assert outcome.faults == [] and outcome.totals.rows_in_graphs > outcome.totals.rows / 2


def test_rows_after_sleeping_are_checked(folder):
    """The only engine of this process that sleeps: vLLM's memory that can serves one."""
    case = engine_case("V2", "bf16")
    case = replace(case, options=case.options | {"enable_sleep_mode": True})
    with running(case, folder) as llm:
        before, *after = (
            run_wave(llm, replace(small_wave(), sleeps=level), 512) for level in (0, 1, 2, 1)
        )
    for outcome in after:
        assert outcome.faults == [] and outcome.totals.rows == before.totals.rows
        assert outcome.answers == before.answers


def off_by_little(query, kv_cache, rows, *arguments, **named):
    arguments[-1][0, 0, 0] += 0.5


def a_key_off(key, value, kv_cache, slots, **named):
    block, token = slots[:1] // BLOCK_TOKENS, slots[:1] % BLOCK_TOKENS
    kv_cache[block, 0, token, 0] += 1


def one_page_less(query, kv_cache, rows, *arguments, counters, **named):
    counters[3] -= 1


PLANTED = {
    "an output": ("sparse_decode", off_by_little, "output is off"),
    "a key": ("write_kv", a_key_off, "other keys"),
    "a counter": ("sparse_decode", one_page_less, "a graph's counters"),
}
if HAS_CLUSTERS:
    PLANTED["an output of clusters"] = ("cluster_decode", off_by_little, "output is off")


@pytest.mark.parametrize("what", PLANTED)
def test_a_fault_planted_in_graphs_is_seen(folder, what):
    name, damage, words = PLANTED[what]
    real = getattr(ops, name)

    def damaged(*arguments, **named):
        real(*arguments, **named)
        if torch.cuda.is_current_stream_capturing():
            damage(*arguments, **named)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ops, name, damaged))
        llm = stack.enter_context(running(engine_case("V2", "bf16"), folder))
        faults = run_wave(llm, small_wave(), 512).faults
    assert any(words in fault for fault in faults), faults
