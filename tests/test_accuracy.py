"""The accuracy harness: forced decoding is what it says, methods differ as they should."""

import dataclasses
import json
import logging
import os
import random
import signal
import string
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.accuracy import report, selections, side_by_side
from benchmarks.accuracy.cells import FULL, Cell, Result, Store
from benchmarks.accuracy.cli import main, parser
from benchmarks.accuracy.interface import Answer, Prompt, ignore, num_tokens
from benchmarks.accuracy.intervals import bootstrap, share_right
from benchmarks.accuracy.measure import Measurement
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.tasks import ALL, Request, Sample
from benchmarks.accuracy.tasks.passkey import KEY, MAX_KEY
from benchmarks.accuracy.tokens import Tokens
from benchmarks.accuracy.vllm_engine import VllmEngine
from engines import DENSE, ON_GPU, engine, greedy
from vllm_quest import ops
from vllm_quest.pass_keys import make_haystack

CONTEXT_TOKENS = 2048
TOLERANCE = 0.5 if ON_GPU else 1e-3
"""Of log-probabilities: bf16 on GPUs, fp32 on CPUs."""

ENGLISH_TASKS = ("passkey", "key_value", "multi_query", "variable_tracking")


@pytest.fixture(scope="module")
def haystack():
    return make_haystack(CONTEXT_TOKENS, 16, seed=5)


@pytest.fixture(scope="module")
def prompts(demo_model, haystack):
    tokens = Tokens(demo_model)
    return [Prompt(*tokens.split(haystack.text, f" {fact.question}"), 6) for fact in haystack.facts]


@pytest.fixture(scope="module")
def dense(demo_model, prompts):
    """The platform's own backend over the whole prompt: its answers and log-probabilities."""
    whole = [{"prompt_token_ids": [*p.material, *p.question]} for p in prompts]
    dtype = "auto" if ON_GPU else "float32"
    with engine(demo_model, DENSE, dtype=dtype, max_model_len=2 * CONTEXT_TOKENS) as llm:
        params = greedy(5, prompt_logprobs=0)
        results = llm.generate(whole, params, use_tqdm=False)
    answers = []
    for prompt, result in zip(prompts, results, strict=True):
        of_question = [
            position[token]
            for position, token in zip(
                result.prompt_logprobs[len(prompt.material) :], prompt.question, strict=True
            )
        ]
        answers.append(
            Answer(
                tuple(result.outputs[0].token_ids),
                tuple(found.logprob for found in of_question),
                tuple(found.rank == 1 for found in of_question),
            )
        )
    return answers


@pytest.fixture(scope="module")
def quest(demo_model, dense):
    """One engine for all tests, with fewer slots than prompts; `dense`'s has ended by then."""
    options = {"max_num_seqs": 5, "gpu_memory_utilization": 0.3}
    with VllmEngine(
        demo_model, dense_layers=0, max_model_len=2 * CONTEXT_TOKENS, options=options
    ) as running:
        yield running


def test_codes_are_measured_with_the_plugins_operators(demo_model, dense, prompts, monkeypatch):
    """Before `quest` starts: two engines would share the memory."""
    calls = []
    score_codes = ops.score_codes

    def count(*arguments, **settings):
        calls.append(len(arguments[2]))
        score_codes(*arguments, **settings)

    monkeypatch.setattr(ops, "score_codes", count)
    monkeypatch.setattr(ops, "score", None)
    options = {"gpu_memory_utilization": 0.3}
    size = 2 * CONTEXT_TOKENS
    with VllmEngine(
        demo_model, dense_layers=0, score="codes", max_model_len=size, options=options
    ) as coded:
        covered = coded.run(prompts, "quest", [size] * len(prompts))
        assert not calls
        sparse = coded.run(prompts, "quest", [256] * len(prompts))
        assert calls
    for ours, theirs in zip(covered, dense, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.question_logprobs == pytest.approx(theirs.question_logprobs, abs=TOLERANCE)
    right = [ours.tokens == theirs.tokens for ours, theirs in zip(sparse, dense, strict=True)]
    assert sum(right) >= len(prompts) - 2


@pytest.mark.parametrize(("method", "budget"), [("full", FULL), ("quest", 2 * CONTEXT_TOKENS)])
def test_forced_decoding_under_a_covering_budget_is_full_attention(
    quest, dense, prompts, method, budget
):
    answers = quest.run(prompts, method, [budget] * len(prompts))
    for ours, theirs in zip(answers, dense, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.question_logprobs == pytest.approx(theirs.question_logprobs, abs=TOLERANCE)
        assert ours.question_hits == theirs.question_hits
    for prompt, answer in zip(prompts, answers, strict=True):
        same = [a == b for a, b in zip(answer.question_most_probable, prompt.question, strict=True)]
        assert tuple(same) == answer.question_hits


def test_the_floor_is_full_attention_and_progress_counts_every_token(quest, prompts):
    computed, finished = [], {}
    floor = quest.run(
        prompts, "floor", [FULL] * len(prompts), computed.append, finished.__setitem__
    )
    full = quest.run(prompts, "full", [FULL] * len(prompts))
    assert [finished[number] for number in range(len(prompts))] == floor
    for ours, theirs in zip(floor, full, strict=True):
        assert ours.question_logprobs == pytest.approx(theirs.question_logprobs, abs=TOLERANCE)
    assert sum(computed) == num_tokens(prompts)
    assert all(tokens >= 0 for tokens in computed)


def test_budgets_may_share_a_batch(quest, prompts):
    budgets = [64, FULL, 256, 128] * (len(prompts) // 4)
    together = quest.run(prompts, "quest", budgets)
    for budget in set(budgets):
        alone = [i for i, own in enumerate(budgets) if own == budget]
        answers = quest.run([prompts[i] for i in alone], "quest", [budget] * len(alone))
        for i, answer in zip(alone, answers, strict=True):
            assert together[i].question_logprobs == pytest.approx(
                answer.question_logprobs, abs=TOLERANCE
            )


def test_sparse_steps_leave_nothing_for_later_prompts(quest, prompts):
    """A prompt that another one's forced tokens have spelt out is still read densely."""
    short = prompts[0].material[:512]
    rest = prompts[0].material[512:1024]
    longer = Prompt(short + rest, prompts[0].material[1024:1032], 0)
    (before,) = quest.run([longer], "full", [FULL])
    quest.run([Prompt(short, rest, 0)], "streaming", [16])
    (after,) = quest.run([longer], "full", [FULL])
    assert after.question_logprobs == pytest.approx(before.question_logprobs, abs=TOLERANCE)


def test_methods_rank_as_they_should(quest, prompts, haystack, demo_model):
    tokens = Tokens(demo_model)
    right = {}
    for method in ("oracle", "quest", "streaming"):
        answers = quest.run(prompts, method, [128] * len(prompts))
        texts = [tokens.text(answer.tokens).strip() for answer in answers]
        right[method] = sum(
            text == fact.code for text, fact in zip(texts, haystack.facts, strict=True)
        )
    assert right["oracle"] == len(prompts)
    assert right["oracle"] >= right["quest"] > right["streaming"]


def make_layer(page_size, num_rows=3, num_kv_heads=2, group_size=2, head_size=64):
    """A cache of scattered blocks with NaN where nothing was written, and what goes with it."""
    torch.manual_seed(0)
    seq_lens = torch.tensor([1, 200, 333][:num_rows], dtype=torch.int32)
    blocks = 16
    cache = torch.full((64, num_kv_heads, 32 + 32 // page_size, 2 * head_size), torch.nan)
    table = torch.randperm(64)[: num_rows * blocks].view(num_rows, blocks).int()
    keys = [torch.randn(n, num_kv_heads, head_size) for n in seq_lens.tolist()]
    for row, own in enumerate(keys):
        for token, key in enumerate(own):
            cache[table[row, token // 32], :, token % 32, :head_size] = key
    query = torch.randn(num_rows, num_kv_heads * group_size, head_size)
    budgets = torch.tensor([4, 4, 6][:num_rows], dtype=torch.int32)
    pages = torch.full((num_rows, num_kv_heads, 6), -1, dtype=torch.int32)
    scores = torch.full((num_rows, num_kv_heads, blocks * 32 // page_size), torch.nan)
    return keys, (query, cache, ops.Rows(table, seq_lens, budgets), scores, pages)


class Layer:
    """What a choice of pages reads of `QuestImpl`."""

    scale = 0.25
    soft_cap = 0.0
    has_fp8_cache = False

    def __init__(self, page_size):
        self.quest = type("Quest", (), {"page_size": page_size, "score": "minmax", "kept": {}})


def test_the_oracle_takes_the_pages_with_the_largest_product(monkeypatch):
    monkeypatch.setattr(selections, "GATHERED_BYTES", 1)  # one row at a time
    keys, arguments = make_layer(page_size=16)
    query, _, rows, _, pages = arguments
    budgets = rows.budget_pages
    selections.choose_oracle(Layer(16), None, *arguments)
    for row in (1, 2):
        for head in range(2):
            products = query[row, 2 * head : 2 * head + 2] @ keys[row][:, head].T
            best = [part.max().item() for part in products.split(16, dim=1)]
            newest, budget = len(best) - 1, int(budgets[row])
            others = sorted(range(newest), key=lambda page: -best[page])[: budget - 1]
            assert pages[row, head, :budget].tolist() == sorted([*others, newest])


def test_the_mass_oracle_takes_the_pages_with_the_most_attention(monkeypatch):
    monkeypatch.setattr(selections, "GATHERED_BYTES", 1)  # one row at a time
    keys, arguments = make_layer(page_size=16)
    query, _, rows, _, pages = arguments
    budgets = rows.budget_pages
    selections.choose_oracle_mass(Layer(16), None, *arguments)
    by_maximum = torch.full_like(pages, -1)
    selections.choose_oracle(Layer(16), None, *arguments[:-1], by_maximum)
    assert not torch.equal(pages, by_maximum)
    for row in (1, 2):
        for head in range(2):
            products = query[row, 2 * head : 2 * head + 2] @ keys[row][:, head].T
            weights = (Layer.scale * products).softmax(dim=1)
            mass = [part.sum(1).max().item() for part in weights.split(16, dim=1)]
            newest, budget = len(mass) - 1, int(budgets[row])
            others = sorted(range(newest), key=lambda page: -mass[page])[: budget - 1]
            assert pages[row, head, :budget].tolist() == sorted([*others, newest])


def test_streaming_takes_the_first_page_and_the_newest():
    _, arguments = make_layer(page_size=16)
    selections.choose_streaming(Layer(16), None, *arguments)
    pages = arguments[-1]
    assert pages[1].tolist() == [[0, 10, 11, 12, -1, -1]] * 2
    assert pages[2].tolist() == [[0, 16, 17, 18, 19, 20]] * 2
    assert (pages[0] == -1).all()  # it fits the budget


@pytest.fixture(scope="module")
def byte_tokens(tmp_path_factory):
    """A tokenizer of bytes, which knows any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return Tokens(str(folder))


@pytest.mark.parametrize("name", ENGLISH_TASKS)
def test_english_samples_fit_hold_their_answers_and_are_graded(byte_tokens, name):
    task = ALL[name]
    request = Request(byte_tokens, "english", context_tokens=8000, num_samples=3, seed=1)
    assert task.refusal(request) is None
    samples = task.samples(request)
    assert samples == task.samples(request)
    for sample in samples:
        prompt = sample.prompt
        assert 7000 < len(prompt.material) + len(prompt.question) <= 8000
        material = byte_tokens.text(prompt.material)
        assert all(target in material for target in sample.targets)
        nothing, everything = Answer((), ()), " ".join(sample.targets)
        assert task.grade(sample, nothing, f" {everything}.") == 1
        assert task.grade(sample, nothing, "I do not know") == 0


def test_pass_keys_lie_at_all_depths_and_the_question_is_400_characters(byte_tokens):
    request = Request(byte_tokens, "english", context_tokens=8000, num_samples=10, seed=1)
    for number, sample in enumerate(ALL["passkey"].samples(request)):
        text = byte_tokens.text(sample.prompt.material + sample.prompt.question)
        key = KEY.format(key=sample.targets[0])
        assert sample.depth == pytest.approx((number + 0.5) / 10)
        assert text.index(key) / len(text) == pytest.approx(sample.depth, abs=0.06)
        assert len(sample.prompt.question) == 400
        assert 1 <= int(sample.targets[0]) <= MAX_KEY


def test_tasks_say_why_they_cannot_be(demo_model, tmp_path):
    foreign = tmp_path / "english.txt"
    foreign.write_text("Nobody taught the demonstration network this vocabulary. " * 500)
    demo = Request(Tokens(demo_model), "demo", context_tokens=1024, num_samples=1, seed=0)
    english = dataclasses.replace(demo, language="english", data_folder=tmp_path)
    assert "several facts" in ALL["multi_query"].refusal(demo)
    assert "variables" in ALL["variable_tracking"].refusal(demo)
    assert "English" in ALL["longbench_qasper"].refusal(demo)
    with_text = dataclasses.replace(demo, text_file=foreign)
    assert "does not know" in ALL["perplexity"].refusal(with_text)
    assert "--text" in ALL["perplexity"].refusal(english)
    missing = ALL["longbench_qasper"].refusal(english)
    assert "not installed" in missing or "no data" in missing


def test_longbench_documents_lose_their_middle_and_are_graded(byte_tokens, tmp_path):
    for module in ("lm_eval", "rouge", "jieba", "fuzzywuzzy"):
        pytest.importorskip(module, reason=f"{module} is not installed (extra 'eval')")
    row = {"input": "Who?", "context": "first " + "x " * 4000 + "last", "answers": ["Ada Lovelace"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row))
    task = ALL["longbench_qasper"]
    request = Request(
        byte_tokens, "english", context_tokens=3000, num_samples=1, seed=0, data_folder=tmp_path
    )
    assert task.refusal(request) is None
    (sample,) = task.samples(request)
    assert 2900 < sample.prompt.num_tokens <= 3000
    material = byte_tokens.text(sample.prompt.material)
    assert "first" in material and material.endswith("last")
    assert "Who?" in byte_tokens.text(sample.prompt.question)
    nothing = Answer((), ())
    assert task.grade(sample, nothing, "Ada Lovelace") == 1
    assert 0 < task.grade(sample, nothing, "It was Ada") < 1


def test_perplexity_windows_end_with_the_scored_tokens(byte_tokens, tmp_path):
    file = tmp_path / "text.txt"
    rng = random.Random(0)
    file.write_text("abc" + "".join(rng.choices(string.ascii_lowercase, k=5000)))
    request = Request(
        byte_tokens, "english", 1000, num_samples=2, seed=0, text_file=file, scored_tokens=100
    )
    first, second = ALL["perplexity"].samples(request)
    assert byte_tokens.text(first.prompt.material + first.prompt.question).startswith("abc")
    assert first != second
    assert len(first.prompt.question) == 100 and len(first.prompt.material) == 900
    every = dataclasses.replace(request, scored_tokens=-1)
    assert len(ALL["perplexity"].samples(every)[0].prompt.material) == 1
    logprobs = Answer((), tuple(-0.01 * i for i in range(100)))
    assert ALL["perplexity"].grade(first, logprobs, "") == pytest.approx(0.495)


def test_tokens_are_counted_one_by_one_in_their_places():
    sample = Sample(Prompt((), (), 6), ("11 22 33 44 55",), code=("11", "22", "33", "44", "55"))
    for text, right in {
        " 11 22 33 44 55": 5,
        "11 22 34 44": 3,
        "22 33 44 55": 0,
        "none": 0,
    }.items():
        assert sample.token_share(Answer((), ()), text) == right / 5
    scored = Sample(Prompt((), (1, 2, 3, 4), 0), scored=(1, 2, 3))
    hits = Answer((), (-9.0, -0.1, -0.1, -9.0), (False, True, True, False))
    assert scored.token_share(hits, "") == 2 / 3
    assert Sample(Prompt((), (), 6), ("the answer",)).token_share(Answer((), ()), "") is None


def test_a_code_of_one_token_per_digit_fits_an_answer_that_names_the_key(byte_tokens):
    request = Request(byte_tokens, "english", context_tokens=4000, num_samples=2, seed=1)
    for sample in ALL["key_value"].samples(request):
        (code,) = sample.targets
        assert sample.prompt.max_answer_tokens >= byte_tokens.count(f" The code is {code}.")
        (fact,) = (f for f in make_haystack(4000, 1, seed=0).facts)
        assert ALL["key_value"].grade(sample, Answer((), ()), f"The code of {fact.key} is {code}")


def test_a_text_longer_than_the_model_takes_is_no_warning(byte_tokens, caplog):
    byte_tokens._tokenizer.model_max_length = 16
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        byte_tokens.ids("a text that has many more bytes than sixteen")
    finally:
        logger.removeHandler(caplog.handler)
    assert "longer than" not in caplog.text


def test_agreement_is_with_full_attention_of_the_same_seed():
    def perplexity(method, budget, seed, most_probable):
        cell = Cell("perplexity", 1024, 0, method, "", budget, seed)
        return Result(cell, [1.0], [None], "a machine", most_probable=[most_probable])

    results = [
        perplexity("full", FULL, 0, [1, 2, 3, 4]),
        perplexity("full", FULL, 1, [5, 6, 7, 8]),
        perplexity("quest", 64, 0, [1, 2, 3, 9]),
        perplexity("quest", 64, 1, [5, 0, 7, 0]),
    ]
    full, quest = report.rows(results, ["minmax"])
    assert full.agreement is None
    assert quest.agreement.mean == (3 / 4 + 2 / 4) / 2
    (alone,) = report.rows(results[2:3], ["minmax"])
    assert alone.agreement is None


def test_agreement_may_be_with_another_runs_full_attention(tmp_path):
    def perplexity(method, budget, most_probable):
        cell = Cell("perplexity", 1024, 0, method, "", budget, 0)
        return Result(cell, [1.0], [None], "a machine", most_probable=[most_probable])

    other = Store(tmp_path / "cells.jsonl", {"kv_cache_dtype": "bfloat16"})
    other.add(perplexity("full", FULL, [1, 2, 3, 4]))
    other.add(perplexity("quest", 64, [0, 0, 0, 0]))
    own = [perplexity("full", FULL, [1, 2, 3, 9]), perplexity("quest", 64, [1, 2, 9, 9])]
    report.write(
        tmp_path,
        results=own,
        scores=["minmax"],
        skipped={},
        command="",
        settings={},
        agree_with=tmp_path,
    )
    full, quest = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (full["agreement"]["mean"], quest["agreement"]["mean"]) == (0.75, 0.5)
    assert f"of the run in `{tmp_path}`" in (tmp_path / "report.md").read_text()


def test_wilson_intervals():
    # Textbook values: 0 of 10 gives 0 to 27.8 %, 15 of 20 gives 53.1 to 88.8 %.
    none, most = share_right([0.0] * 10), share_right([1.0] * 15 + [0.0] * 5)
    assert (none.low, none.high) == pytest.approx((0, 0.2775), abs=1e-3)
    assert (most.low, most.high) == pytest.approx((0.5313, 0.8881), abs=1e-3)
    shares = bootstrap([0.0, 0.25, 0.5, 1.0] * 10)
    assert shares.low < shares.mean < shares.high


def test_the_store_goes_on_after_a_broken_line(tmp_path):
    path, settings = tmp_path / "cells.jsonl", {"model": "a"}
    cell = Cell("passkey", 1024, 0, "quest", "minmax", 64, 0)
    Store(path, settings).add(Result(cell, [1.0, 0.0], [0.25, 0.75], "a machine"))
    with path.open("a") as file:
        file.write('{"task": "pass')
    store = Store(path, settings)
    assert cell in store and store.results([cell])[0].grades == [1.0, 0.0]
    assert cell not in Store(path, {"model": "b"})
    other_seed = dataclasses.replace(cell, seed=1)
    assert store.results([cell, other_seed]) == []


class Interrupted(Exception):
    """A run is stopped."""


class CountingEngine:
    """Answers nothing to anything, and is stopped after so many answers."""

    def __init__(self, max_answers):
        self.left = max_answers
        self.asked = []

    def run(self, prompts, method, token_budgets, progress, answered):
        for number, budget in enumerate(token_budgets):
            if self.left == 0:
                raise Interrupted
            self.left -= 1
            self.asked.append(budget)
            answered(number, Answer((), ()))


def test_a_stopped_run_keeps_its_answers_and_goes_on(demo_model, tmp_path):
    tokens = Tokens(demo_model)
    plan = Plan(
        model=demo_model,
        tasks=("passkey",),
        methods=("quest",),
        budgets=(64, 128),
        contexts=(512,),
        dense_layers=(0,),
        scores=("minmax",),
        seeds=1,
        samples=3,
        language="demo",
    )

    def measurement():
        store = Store(tmp_path / "cells.jsonl", plan.sample_settings())
        made = Measurement(plan, store, tokens, "a machine")
        made.make_samples()
        return made

    first = measurement()
    (job,) = first._together(first.unfinished())
    whole = first.num_tokens(job)
    with pytest.raises(Interrupted):  # the first budget is finished, the second is not
        first._run_job(CountingEngine(5), job, ignore)
    second = measurement()
    assert [cell.token_budget for cell in second.unfinished()] == [128]
    assert "not finished: quest" in str(second.reasons_unfinished())
    left = second.num_tokens(second.unfinished())
    assert 0 < left < whole / 2
    engine = CountingEngine(1)
    second._run_job(engine, second.unfinished(), ignore)
    assert engine.asked == [128]
    (of_64, of_128) = measurement().store.results(plan.all_cells())
    assert len(of_64.grades) == len(of_128.grades) == 3
    assert of_128.answers == [""] * 3
    assert all(len(target.split()) == 5 for target in of_128.targets)
    assert of_64.depths == of_128.depths == pytest.approx([1 / 6, 1 / 2, 5 / 6])


def test_sigterm_ends_a_run_with_its_report(demo_model, tmp_path, monkeypatch):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Measurement, "run", stop)
    before = signal.getsignal(signal.SIGTERM)
    arguments = [demo_model, "--out", str(tmp_path), "--contexts", "512", "--budgets", "64"]
    arguments += ["--tasks", "passkey", "--methods", "quest", "--seeds", "1", "--samples", "1"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "not finished: quest" in (tmp_path / "report.md").read_text()
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_may_share_a_store(tmp_path):
    """Long lines, written at the same time, do not mix."""
    path, budgets, seeds = tmp_path / "cells.jsonl", range(20), range(4)
    cells = [Cell("passkey", 1024, 0, "quest", "minmax", b, s) for b in budgets for s in seeds]

    def write(seed):
        store = Store(path, {})
        for cell in cells[seed :: len(seeds)]:
            store.add(Result(cell, [1.0] * 5000, [0.5] * 5000, "a machine"))

    with ThreadPoolExecutor(len(seeds)) as pool:
        list(pool.map(write, seeds))
    assert len(path.read_text().splitlines()) == len(cells)
    assert len(Store(path, {}).results(cells)) == len(cells)


def test_one_command_makes_the_report_and_a_rerun_measures_nothing(
    demo_model, tmp_path, monkeypatch, capsys
):
    arguments = [demo_model, "--out", str(tmp_path), "--contexts", "1024", "--budgets", "128"]
    arguments += ["--tasks", "passkey", "multi_query", "perplexity"]
    arguments += ["--methods", "full", "quest"]
    arguments += ["--dense-layers", "0", "--seeds", "1", "--samples", "2"]
    main(arguments)
    report = (tmp_path / "report.md").read_text()
    assert "## Pass key" in report and "| quest | " in report and "## Perplexity" in report
    assert "multi_query at 1024 tokens: the model's language" in report
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 2 * 2
    full = [row for row in rows if row["method"] == "full"]
    assert [row["estimate"]["mean"] for row in full] == pytest.approx([1, 1], abs=0.05)
    assert [row["tokens_right"]["mean"] for row in full] == [1, 1]
    assert report.count("Of the answers' tokens") == report.count("Of the scored tokens") == 1

    def refuse(*_, **__):
        raise AssertionError("a rerun started an engine")

    monkeypatch.setattr("benchmarks.accuracy.vllm_engine.VllmEngine", refuse)
    main(arguments)
    assert (tmp_path / "report.md").read_text() == report
    main([*arguments, "--report-only", "--budgets", "128", "256"])
    report = (tmp_path / "report.md").read_text()
    assert "passkey at 1024 tokens, 0 dense: not finished: quest minmax" in report
    assert "--report-only" not in report  # it names what measures


def test_parts_of_a_grid_make_up_the_whole():
    plan = Plan(
        model="a model",
        tasks=("passkey", "key_value"),
        methods=("full", "quest", "h2o", "tova", "oracle"),
        budgets=(64, 128),
        contexts=(512, 1024),
        dense_layers=(0, 2),
        scores=("minmax", "mid_dev"),
        seeds=2,
        samples=1,
        language="demo",
    )
    divided = side_by_side.parts(plan)
    assert len(divided) == 2 * 3 * 2 * 2
    cells = [cell for part in divided for cell in part.all_cells()]
    assert sorted(cells) == sorted(plan.all_cells())
    assert all(part.sample_settings() == plan.sample_settings() for part in divided)


def test_processes_side_by_side_make_one_report(demo_model, tmp_path, capsys):
    arguments = [demo_model, "--out", str(tmp_path), "--contexts", "512", "--budgets", "64"]
    arguments += ["--tasks", "passkey", "multi_query", "--methods", "full", "tova"]
    main([*arguments, "--seeds", "1", "--samples", "2", "--processes", "2"])
    report = (tmp_path / "report.md").read_text()
    assert "full: 100.0 %" in report and "| tova | " in report
    assert capsys.readouterr().out.count("Skipped: multi_query") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--processes", "0"], "--processes is 0; it takes at least 1"),
        (["--budgets", "64", "0"], "--budgets is 0; it takes at least 1"),
        (["--dense-layers", "-1"], "--dense-layers is -1; it takes at least 0"),
        (["--samples", "0"], "--samples is 0; it takes at least 1"),
        (["--scores", "minmax", "maximum"], "unknown score 'maximum'; known: minmax"),
        (["--methods", "best"], "unknown method 'best'; known: full"),
        (["--filler", "text"], "give one with --text FILE"),
    ],
)
def test_bad_options_leave_with_one_line(demo_model, tmp_path, options, words):
    with pytest.raises(SystemExit, match=words):
        main([demo_model, "--out", str(tmp_path), "--report-only", *options])


def test_help_shows_defaults_that_say_something():
    text = parser().format_help()
    assert "default: None" not in text
    assert "default: 256" in " ".join(text.split())
