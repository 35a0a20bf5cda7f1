"""The fuzzer: its reference is the reference, it notices planted faults, and its minute passes."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import ChunkedLocalAttention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.utils import cpu_triton_utils

import batched_reference
from batch import FP8, SINKS, Batch, Shape, decode_error, make_batch
from batched_reference import Blocks
from engines import ON_GPU
from fuzz import checker, mended, run
from fuzz.cases import Case, EngineCase, RequestCase, Wave
from fuzz.dense import DenseToken, as_rows, first_seen_by
from fuzz.draw import draw_engine, draw_wave
from fuzz.graphs import tapped
from fuzz.roundings import spread_of_lead
from fuzz.run import run_wave, running
from fuzz.shrink import shrink
from vllm_quest import ops, reference
from vllm_quest.metadata import QuestMetadataBuilder
from vllm_quest.platforms import this_platform

LENGTHS = [1, 15, 16, 17, 127, 128, 129, 300, 385, 0, 512]


def batches() -> list[Batch]:
    """All that the batched reference has branches for."""
    shapes = [
        Shape(head_size=64, pages_per_block=8, dtype=torch.float32),
        Shape(head_size=64, group_size=1, page_size=8, pages_per_block=3),
        Shape(head_size=64, page_size=32, pages_per_block=4, score="mean_std"),
        Shape(head_size=96, page_size=64, score="mid_dev", dtype=torch.float32),
        Shape(head_size=64, pages_per_block=16, score="codes"),
        Shape(head_size=64, page_size=64, pages_per_block=2, score="codes", dtype=torch.float32),
        Shape(head_size=64, pages_per_block=4, cache=FP8),
        Shape(head_size=64, pages_per_block=2, cache=FP8, score="mid_dev"),
    ]
    budgets = [3, 1, 5, 2, 4, 3, 100, 6, 7, 1, 9]
    made = []
    for seed, shape in enumerate(shapes):
        extras = {"soft_cap": 5.0 * (seed % 2), "sinks": SINKS if seed % 3 else None}
        batch = make_batch(shape, LENGTHS, budgets, seed=seed, **extras)
        kept = {"keep_first_pages": 1 + seed % 2, "keep_newest_percent": 40 * (seed % 3)}
        made.append(replace(batch, kept=kept))
    return made


@pytest.mark.parametrize("batch", batches(), ids=lambda batch: str(batch.shape))
def test_the_batched_reference_is_the_reference(batch):
    shape = batch.shape
    expected = batch.fresh()
    expected = replace(expected, out=expected.out.double(), scores=expected.scores.double())
    expected.run(reference)
    blocks = Blocks.of(batch.kv_cache, batch.rows, shape.page_size, shape.score, batch.scales)
    if shape.score == "codes":
        logits = {"scale": batch.scale, "soft_cap": batch.soft_cap}
        scores = batched_reference.score_codes(batch.query, blocks, **logits)
    else:
        scores = batched_reference.score(batch.query, blocks)
    budget = batch.rows.budget_pages
    chosen, leads = batched_reference.select(
        scores,
        blocks,
        budget.clamp(max=blocks.max_pages),
        keep_first=batch.kept["keep_first_pages"],
        keep_newest=batch.kept["keep_newest_percent"],
    )
    assert (leads >= 0).all()
    over = [row for row in range(len(LENGTHS)) if batch.over_budget(row)]
    for row in over:
        pages = batch.num_pages(row)
        torch.testing.assert_close(scores[row, :, :pages], expected.scores[row, :, :pages])
        for head in range(shape.num_kv_heads):
            listed = expected.pages[row, head, : int(budget[row])].tolist()
            assert chosen[row, head].nonzero().flatten().tolist() == listed
    is_over = torch.tensor([row in over for row in range(len(LENGTHS))])
    attended = chosen | ~is_over[:, None, None]
    out, error = batched_reference.attention(
        batch.query,
        blocks,
        attended,
        scale=batch.scale,
        soft_cap=batch.soft_cap,
        sinks=batch.sinks,
    )
    torch.testing.assert_close(out, expected.out, rtol=1e-12, atol=1e-12)
    assert (error <= decode_error(batch, expected.out)).all()
    if shape.cache == FP8:
        return  # whose operators run on GPUs: tests/gpu/test_fuzz_on_gpu.py
    found = batch.fresh().run()
    same = (found.pages == expected.pages).flatten(1).all(1)
    assert same.sum() >= len(LENGTHS) - 1  # but for a near tie
    assert ((found.out.double() - out).abs() <= error)[same].all()


@pytest.mark.parametrize("batch", batches(), ids=lambda batch: str(batch.shape))
def test_what_is_stored_beside_keys_is_told_from_other_bytes(batch):
    shape = batch.shape
    blocks = Blocks.of(batch.kv_cache, batch.rows, shape.page_size, shape.score)
    filled = torch.zeros(len(blocks.numbers), dtype=torch.int64)
    for row, seq_len in enumerate(LENGTHS):
        for index in range(-(-seq_len // shape.block_tokens)):
            tokens = min(shape.block_tokens, seq_len - index * shape.block_tokens)
            filled[blocks.table[row, index]] = tokens

    def differ() -> torch.Tensor:
        if shape.score == "codes":
            return batched_reference.codes_differ(blocks, filled)
        expected = batched_reference.bounds(blocks, filled)
        found = batched_reference.exact(batched_reference.stored_bounds(blocks))
        close = torch.isclose(found, expected, rtol=1e-2 if shape.score != "minmax" else 0, atol=0)
        return ~close & ~expected.isnan()

    assert not differ().any()
    full = int(filled.argmax())
    key = blocks.cache[full, 0, 5, 3]
    key.copy_(key.float() + 8.0)  # a key that leaves its page's bounds, or changes its codes
    assert differ().any()


def test_windows_of_the_batched_reference():
    """A cache without bounds, as the dense backend has it, in layers with windows of both kinds."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(9, 2, 16, 2 * 64, generator=generator)
    query = torch.randn(3, 4, 64, generator=generator)
    tokens = [DenseToken("", 0, seq_len, [4, 2, 7, 1, 8]) for seq_len in (1, 40, 65)]
    rows = as_rows(tokens, torch.device("cpu"))
    blocks = Blocks.of(cache, rows, 16, "minmax", has_bounds=False)
    chunked = mock.Mock(spec=ChunkedLocalAttention, attention_chunk_size=32)
    for layer, first_seen in ((mock.Mock(sliding_window=20), [0, 20, 45]), (chunked, [0, 32, 64])):
        found = first_seen_by(layer, blocks.seq_lens)
        assert found.tolist() == first_seen
        is_attended = torch.ones(3, 2, blocks.max_pages, dtype=torch.bool)
        out, _ = batched_reference.attention(
            query, blocks, is_attended, scale=0.125, first_seen=found
        )
        for row, (token, first) in enumerate(zip(tokens, first_seen, strict=True)):
            seen = cache[token.blocks].transpose(0, 1).flatten(1, 2)[:, first : token.seq_len]
            key, value = seen.double().repeat_interleave(2, dim=0).chunk(2, dim=-1)
            weights = torch.softmax((key @ query[row, :, :, None].double() * 0.125)[..., 0], -1)
            expected = (weights[:, None] @ value)[:, 0]
            torch.testing.assert_close(out[row], expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_resumed_requests_that_share_a_prefix(folder, monkeypatch):
    """Twins are told to start anew at each step. Where all tokens of one but its newest fill whole
    blocks, it finds them in the cache although the other only now computes them, and has one token
    left: on vLLM's V1 runner it counts as a decode whose pages are of earlier steps.

    Before the fixture `llm`: a process checks one engine at a time.
    """
    v1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    quest = {"token_budget": 32, "dense_layers": 0, "page_size": 8}
    options = {"block_size": 16, "max_model_len": 512, "max_num_batched_tokens": 512}
    options["async_scheduling"] = False
    twins = [RequestCase(name, 0, 0, 0, 177, own=1, num_answer=40) for name in ("a", "b")]
    wave = Wave(tuple(twins), tuple((step, True) for step in range(1, 40)))
    with running(EngineCase("llama", quest, options, environment=v1), folder) as llm:
        found = run_wave(llm, wave, 512)
        assert found.faults == []
        # With the promise that V2 can keep, of which condition 3 is a part.
        monkeypatch.setattr(QuestMetadataBuilder, "_may_begin_beside_write", lambda *_: True)
        faults = run_wave(llm, wave, 512).faults
        assert any("counts as settled" in fault for fault in faults), faults


@pytest.fixture(scope="module")
def llm(folder):
    """A calm engine under the checker."""
    quest = {"token_budget": 64, "dense_layers": 1, "page_size": 16}
    options = {"block_size": 32, "max_model_len": 512, "max_num_batched_tokens": 128}
    case = EngineCase("llama", quest, options | {"enable_prefix_caching": False})
    with running(case, folder) as llm:
        yield llm


def small_wave(**changes) -> Wave:
    """A few requests within and beyond the budget."""
    requests = [
        RequestCase(f"r{own}", 0, 0, 0, length, own, 6, **changes)
        for own, length in enumerate([129, 33, 200, 257])
    ]
    return Wave(tuple(requests))


def later(function, damage):
    """A function, and what a fault in it leaves: `damage(result, *arguments, **named)`."""

    def damaged(*arguments, **named):
        result = function(*arguments, **named)
        changed = damage(result, *arguments, **named)
        return result if changed is None else changed

    return damaged


def one_page_more(pages, *_):
    return pages + 1


def a_token_short(plan, *_):
    plan.rows.seq_lens.sub_(1)


def all_settled(decodes_seq, *_):
    decodes_seq[1][:] = False


def stale_bounds(_, key, value, kv_cache, slots, **named):
    kv_cache[slots.max() // 32, :, 32] += 1.0


def a_key_off(_, key, value, kv_cache, slots, **named):
    kv_cache[slots[:1] // 32, 0, slots[:1] % 32, 0] += 1


def a_neighbour(_, scores, rows, pages, **named):
    pages[:, 0, 1] += 1


def off_by_little(_, query, kv_cache, rows, pages, out, **named):
    out[0, 0, 0] += 0.5


def a_prompt_off(_, impl, layer, query, kv_cache, plan, output):
    output[-1, 0, 0] += 0.5


def one_row_more(_, query, kv_cache, rows, pages, out, *, counters, **named):
    counters[0] += 1


def higher_scores(_, query, kv_cache, rows, scores, **named):
    scores[..., 2] *= 1.001


PLANTED = {
    "a budget": (QuestMetadataBuilder, "_budget_pages", one_page_more, "budget of"),
    "a length": ("planner", "plan_decode", a_token_short, "length"),
    "an end of a prompt": (QuestMetadataBuilder, "_requests", all_settled, "budget of"),
    "bounds": ("operator", "write_kv", stale_bounds, "other bytes"),
    "a score": ("operator", "score", higher_scores, "score ["),
    # On GPUs from sm_90 on it is made within `cluster_decode`.
    **({} if ON_GPU else {"a selection": (ops, "select", a_neighbour, "are wrong")}),
    "an output": ("operator", "sparse_decode", off_by_little, "output is off"),
    "a prefill": (this_platform(), "attend_prefill", a_prompt_off, "output of model.layers"),
    "a counter": ("operator", "sparse_decode", one_row_more, "counters grew"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_seen(llm, what):
    where, name, damage, words = PLANTED[what]
    clean = run_wave(llm, small_wave(), 512)
    assert clean.faults == []
    assert clean.totals.sparse_rows > 0
    assert clean.totals.dense_tokens > 0
    with contextlib.ExitStack() as stack:
        if where == "operator":
            real = checker.REAL
            stack.enter_context(mock.patch.dict(real, {name: later(real[name], damage)}))
        else:
            owner = this_platform().BatchPlanner if where == "planner" else where
            patch = mock.patch.object(owner, name, later(getattr(owner, name), damage))
            stack.enter_context(patch)
        # 129 tokens in chunks of 128: the end of a prompt is one token.
        faults = run_wave(llm, small_wave(), 512).faults
    assert any(words in fault for fault in faults), faults


def test_roundings_move_a_lead_and_leave_nothing_behind(llm):
    prompt = list(range(3, 203))

    def answer():
        greedy = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)
        return llm.generate({"prompt_token_ids": prompt}, greedy, use_tqdm=False)[0].outputs[0]

    before = answer()
    first, second = before.logprobs[0]
    spread = spread_of_lead(llm, prompt, first, second)
    largest = 0.5 if ON_GPU else 1e-4  # of bf16 and of fp32, in a model that is not sharp
    assert 0 < spread < largest
    after = answer()
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)


@pytest.mark.parametrize(
    ("dtype", "spread", "faults"), [("bfloat16", 0.7, 0), ("bfloat16", 0.6, 1), ("float32", 9.0, 1)]
)
def test_a_lead_that_roundings_undo_is_excused(dtype, spread, faults):
    [request, *_] = small_wave().requests
    case = EngineCase("llama", {"token_budget": -1}, {"dtype": dtype, "max_model_len": 512})
    alone = run.Outcome(answers={request.name: [run.Answer((5, 6), (2.0, 0.656))]})
    busy = run.Outcome(answers={request.name: [run.Answer((5, 7))]})
    outcome = run.Outcome()
    with mock.patch.object(run, "spread_of_lead", lambda *_: spread):
        run._compare(case, request, alone, busy, outcome, mock.Mock())
    assert (len(outcome.faults), outcome.excused) == (faults, 1 - faults)


@pytest.fixture
def out_of_sight(llm):
    """Every step is taken for one that a CUDA graph ran, as far as no GPU is needed for that."""

    def unseen(checker, real, layer, *arguments, **named):
        return real(layer, *arguments, **named)

    captures = mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True)
    forward = mock.patch.object(checker.Checker, "forward", unseen)
    with tapped(), captures, forward, mock.patch.multiple(ops, **checker.REAL):
        run_wave(llm, small_wave(), 512)  # makes the taps, as engines do before they serve
        yield llm


@pytest.mark.skipif(ON_GPU, reason="tests/gpu/test_fuzz_on_gpu.py has graphs")
def test_steps_out_of_sight_are_checked(out_of_sight):
    found = run_wave(out_of_sight, small_wave(), 512)
    assert found.faults == []
    assert found.totals.rows_in_graphs == found.totals.rows > found.totals.sparse_rows > 0


@pytest.mark.skipif(ON_GPU, reason="tests/gpu/test_fuzz_on_gpu.py has graphs")
@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("sparse_decode", off_by_little, "output is off"),
        ("sparse_decode", one_row_more, "a graph's counters"),
        ("write_kv", a_key_off, "other keys"),
    ],
)
def test_a_fault_out_of_sight_is_seen(out_of_sight, name, damage, words):
    with mock.patch.object(ops, name, later(getattr(ops, name), damage)):
        faults = run_wave(out_of_sight, small_wave(), 512).faults
    assert any(words in fault for fault in faults), faults


def test_a_failing_case_becomes_small():
    engine = draw_engine(0, 0)
    waves = tuple(draw_wave(0, 0, number, engine) for number in range(3))
    culprit = next(each for each in waves[1].requests if each.num_answer > 3)

    def fails(case: Case) -> bool:
        names = {each.name: each for wave in case.waves for each in wave.requests}
        return culprit.name in names and names[culprit.name].num_answer > 1

    small = shrink(Case(engine, waves), fails, seconds=30)
    [request] = [each for wave in small.waves for each in wave.requests]
    assert (request.name, request.num_answer <= 3) == (culprit.name, True)
    assert not request.more and not small.engine.speculation


def test_a_case_survives_its_file(tmp_path):
    engine = draw_engine(5, 1)
    case = Case(engine, (draw_wave(5, 1, 0, engine),))
    case.write(tmp_path / "case.json")
    assert Case.read(tmp_path / "case.json") == case


def test_two_fixed_minutes(tmp_path):
    """Other seeds, and longer: `python -m tests.fuzz --seed N --minutes M`."""
    arguments = ["--seed", "1", "--minutes", "2", "--engine-seconds", "20"]
    totals = tmp_path / "totals.json"
    command = [sys.executable, "-m", "tests.fuzz", *arguments, "--json", str(totals)]
    root = Path(__file__).parents[1]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    result = json.loads(totals.read_text())
    assert result["engines_with_faults"] == 0
    assert result["sparse_rows"] > 1000


@pytest.mark.skipif(ON_GPU, reason="faults of vLLM on CPUs")
def test_what_is_mended_in_vllm_is_wrong_there():
    """When this fails, a newer vLLM needs no `fuzz.mended`."""
    rope = {"max_position": 64, "rope_parameters": {"rope_theta": 1e4}, "dtype": torch.float32}
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(64, **rope)
    positions, query = torch.arange(40), torch.randn(40, 4, 64)
    right, _ = rotary.forward_native(positions, query.clone(), query.clone())
    found, _ = mended.forward_cpu(rotary, positions, query.clone(), query.clone())
    assert not torch.allclose(found, right, atol=1e-5)
    found, _ = mended.rotate_every_token(rotary, positions, query.clone(), query.clone())
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)

    temperatures, ends = torch.tensor([0.0, 0.75]), torch.tensor([2, 5], dtype=torch.int32)
    untouched = torch.full((5,), -1.0)
    cpu_triton_utils._expand_kernel_impl(untouched, temperatures, ends, 0, 1)
    assert (untouched == -1).all()
    tokens = mended.expand_batch_to_tokens(temperatures, ends, 5, 0, 1)
    assert tokens.tolist() == [1.0, 1.0, 0.75, 0.75, 0.75]
