"""`vllm-quest explain` records what the operators did, weighs it right, and draws it."""

import argparse
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from batch import Shape, make_batch
from engines import ON_GPU, engine, greedy, random_prompts, token_ids, write_model, write_weights
from vllm_quest import cli, ops, reference
from vllm_quest.config import SCORES, QuestConfig
from vllm_quest.explain import request as request_module
from vllm_quest.explain.command import add_options
from vllm_quest.explain.drawing import MISSED, NOT_READ, colours, draw
from vllm_quest.explain.recording import LayerRecord, Recorder, page_truth, score_errors
from vllm_quest.explain.request import CannotExplain, Explanation, Request, find
from vllm_quest.pass_keys import make_haystack

COMMAND = (sys.executable, "-m", "vllm_quest", "explain")
PAGE = 16


def true_weights(query, keys, scale, soft_cap=0.0):
    """Softmax of `[num_heads, head_size]` over `[num_tokens, num_kv_heads, head_size]`, fp64."""
    num_heads, num_kv_heads = len(query), keys.shape[1]
    weights = []
    for head in range(num_heads):
        logits = keys[:, head * num_kv_heads // num_heads].double() @ query[head].double() * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        weights.append(torch.softmax(logits, dim=0))
    return torch.stack(weights)


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("seq_len", [1, PAGE - 1, PAGE, PAGE + 1, 130])
def test_the_mass_is_the_softmax_over_all_tokens(seq_len, soft_cap):
    torch.manual_seed(seq_len)
    num_heads, num_kv_heads, head_size, block_tokens = 6, 2, 64, 32
    rows = block_tokens + block_tokens // PAGE
    cache = torch.full((9, num_kv_heads, rows, 2 * head_size), torch.nan)
    table = torch.randperm(9, dtype=torch.int32)
    keys = torch.randn(seq_len, num_kv_heads, head_size)
    for token, key in enumerate(keys):
        cache[table[token // block_tokens], :, token % block_tokens, :head_size] = key
    query = torch.randn(num_heads, head_size)

    scaling = {"scale": 0.3, "soft_cap": soft_cap}
    truth = page_truth(query, cache, table, seq_len, page_size=PAGE, **scaling)

    mass = truth.log_mass.exp()
    weights = true_weights(query, keys, **scaling)
    expected = torch.stack([part.sum(dim=-1) for part in weights.split(PAGE, dim=-1)], dim=-1)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mass.sum(dim=-1), torch.ones(num_heads))


@pytest.mark.parametrize("score", SCORES)
def test_a_score_is_compared_with_what_it_stands_for(score):
    shape = Shape(head_size=64, pages_per_block=8, dtype=torch.float32, score=score)
    batch = make_batch(shape, [700], 4)
    settings = {"page_size": PAGE, "scale": batch.scale, "score": score}
    table = batch.rows.block_table[0]
    truth = page_truth(batch.query[0], batch.kv_cache, table, 700, soft_cap=0.0, **settings)
    errors = score_errors(batch.score()[0], truth, 700, **settings)

    logits = [part @ key.T for part, key in zip(*queries_and_keys(batch), strict=True)]
    logits = torch.stack(logits) * batch.scale  # [num_kv_heads, group_size, seq_len]
    if score == "codes":
        pages = logits.softmax(-1)[..., :640].unflatten(-1, (40, PAGE)).sum(-1).log()
        estimate = batch.scores[0, :, :40] * math.log(2)
        assert abs(errors.mean()) < 0.1 and errors.std() < 0.2
    else:
        padded = torch.nn.functional.pad(logits, (0, 4), value=-math.inf)
        pages = padded.unflatten(-1, (44, PAGE)).amax(-1)
        estimate = batch.scores[0, :, :44] * batch.scale
        assert score != "minmax" or errors.min() > 0
    expected = estimate.double() - pages.amax(1)
    torch.testing.assert_close(errors.double(), expected, rtol=0, atol=1e-4)


def queries_and_keys(batch):
    """Of one row, by KV head in fp64: `[group_size, head_size]` and `[seq_len, head_size]`."""
    seq_len, shape = int(batch.rows.seq_lens[0]), batch.shape
    blocks = batch.rows.block_table[0, : -(-seq_len // shape.block_tokens)].long()
    tokens = batch.kv_cache[blocks, :, : shape.block_tokens, : shape.head_size].transpose(0, 1)
    keys = tokens.flatten(1, 2)[:, :seq_len].double()
    return batch.query[0].double().chunk(shape.num_kv_heads), keys


@pytest.mark.parametrize("score", ["minmax", "codes"])
def test_the_record_is_what_the_operators_read(tmp_path, monkeypatch, score):
    """From the recorded pages alone follow sparse decode's output and the share that they held."""
    model = write_weights(write_model(tmp_path))
    num_prompt, num_tokens, budget = 300, 6, 64
    seen = []
    sparse_decode = ops.sparse_decode

    def watch(query, kv_cache, rows, pages, out, **settings):
        sparse_decode(query, kv_cache, rows, pages, out, **settings)
        if rows.budget_pages[0] < ops.UNLIMITED_PAGES:
            page_size = settings["page_size"]
            block_tokens = reference.tokens_per_block(kv_cache, page_size, settings["score"])
            blocks = kv_cache[rows.block_table[0].long(), :, :block_tokens]
            tokens = blocks.transpose(1, 2).flatten(0, 1)[: rows.seq_lens[0]]
            tensors = (query[0], tokens, out[0])
            seen.append((*(tensor.clone().cpu() for tensor in tensors), settings["scale"]))

    monkeypatch.setattr(ops, "sparse_decode", watch)
    with engine(model, quest={"token_budget": budget, "dense_layers": 1, "score": score}) as llm:
        numbers = {f"model.layers.{number}.self_attn.attn": number for number in range(3)}
        recorder = Recorder(num_prompt, numbers)
        with recorder.recording():
            token_ids(llm, random_prompts([num_prompt]), greedy(num_tokens))
        for changes, message in (
            ({"layers": [0]}, "every layer chosen is dense"),
            ({"layers": [1, 3]}, "--layers names 3; the model's layers are 0 to 2"),
            ({"heads": [2]}, "--heads names 2; the model's KV heads are 0 to 1"),
        ):
            quest = QuestConfig(token_budget=budget, dense_layers=1, score=score)
            request = Request(model, "", quest, num_tokens, **changes)
            with pytest.raises(CannotExplain, match=message):
                request_module._choose(request, llm)

    num_steps = num_tokens - 1
    records = recorder.records(num_steps)
    assert sorted(records) == [1, 2]  # the first layer is dense, the prefill is not recorded
    assert len(seen) == 2 * num_steps
    for call, (query, tokens, out, scale) in enumerate(seen):
        step, layer = divmod(call, 2)
        record = records[1 + layer]
        assert len(tokens) == num_prompt + 1 + step
        keys, values = tokens.double().chunk(2, dim=-1)
        weights = true_weights(query, keys, scale)
        # The GPU's weights and outputs are bf16.
        rounding = 2.0**-7 * values.abs().max().item() if ON_GPU else 1e-3
        for head in range(2):
            pages = record.read[step, head]
            assert pages.sum() == budget // PAGE
            attended = torch.from_numpy(np.repeat(pages, PAGE)[: len(tokens)])
            group = slice(2 * head, 2 * head + 2)
            expected = reference.attend(query[group], tokens[attended, head], scale, 0.0, None)
            torch.testing.assert_close(out[group].double(), expected, rtol=1e-2, atol=rounding)
            held = weights[group][:, attended].sum(dim=-1)
            np.testing.assert_allclose(record.held[step, head], held, rtol=1e-3)
        most = [group.view(2, -1).mean(dim=0) for group in weights.view(2, 2, -1)]
        for head, mean in enumerate(most):
            by_page = torch.stack([part.sum() for part in mean.split(PAGE)])
            best = by_page.topk(budget // PAGE).values.sum()
            np.testing.assert_allclose(record.best[step, head].mean(), best, rtol=1e-3)


@pytest.fixture(scope="module")
def haystack():
    return make_haystack(2048, 16, seed=3)


@pytest.mark.parametrize("score", ["minmax", "codes"])
def test_the_command_draws_and_tells(haystack, tmp_path, score):
    from matplotlib.image import imread

    fact = haystack.facts[4]
    prompt, picture, numbers = (tmp_path / name for name in ("prompt.txt", "a.png", "a.json"))
    prompt.write_text(haystack.prompt(fact))
    files = ("--prompt-file", prompt, "--output", picture, "--json", numbers)
    options = ("--token-budget", "512", "--dense-layers", "1", "--score", score)
    answer = subprocess.run([*COMMAND, *files, *options], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-3000:]

    height, width, _ = imread(picture).shape
    assert 1000 <= width <= 2000
    assert 500 <= height <= 1500
    told = json.loads(numbers.read_text())
    assert told["answer"] == fact.code
    assert " ".join(told["fed_tokens"]) == fact.code
    assert told["token_budget"] == 512
    assert told["score"] == score
    assert told["kv_heads"] == [0, 1]
    # Tokens are words and full stops here, after one that opens the prompt.
    words = haystack.prompt(fact).replace(".", " .").replace(",", " ,").replace("?", " ?").split()
    assert [" ".join(words[first - 1 : end - 1]) for first, end in told["answer_places"]] == [
        fact.code
    ]
    assert [layer["kind"] for layer in told["layers"]] == ["dense"] + 3 * ["sparse"]
    for layer in told["layers"][1:]:
        held = np.array(layer["held"])
        assert held.shape == (5, 2, 2)
        assert 0 < held.min() == pytest.approx(layer["held_lowest"])
        assert layer["held_mean"] == pytest.approx(held.mean())
        assert layer["held_mean"] <= layer["best_mean"] + 1e-6 <= 1 + 1e-5
        assert f"{layer['held_mean']:.1%}" in answer.stdout
        error, deviation = np.array(layer["score_error"]).mean(axis=(0, 1))
        assert f"{error:+.2f} ± {deviation:.2f}" in answer.stdout
        assert score != "minmax" or error > 1  # a bound is above what it bounds
        for step, heads in enumerate(layer["pages"]):
            for pages in heads:
                assert len(pages) == 512 // PAGE
                assert pages[-1] == (told["prompt_tokens"] + step) // PAGE  # the newest


def explain_in_process(capsys, *arguments):
    """Exit status and the error's lines, for runs that start no engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vllm-quest", "explain", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return end.value.code, capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--prompt-file", "missing.txt"), "prompt file cannot be read: .*missing.txt"),
        (("--token-budget", "4096"), "2057 tokens fit the token budget of 4096.*--token-budget"),
        (("--token-budget", "-1"), "-1 is full attention: nothing to explain"),
        (("--token-budget", "0"), "'token_budget'.* is 0; allowed"),
        (("--max-tokens", "39000"), "prompt has 2057 tokens; .* more than the model's 40960"),
        (("--answer", "no such thing"), "'no such thing' does not occur in the prompt"),
        (("--output", "nowhere/a.png"), "folder nowhere of a.png does not exist"),
        (("--output", "."), r"\. is a folder; name a file"),
        (("--json", "/"), "/ is a folder; name a file"),
        (("nowhere/model",), "model 'nowhere/model' cannot be loaded"),
    ],
)
def test_errors_are_one_line(haystack, tmp_path, capsys, options, message):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(haystack.prompt(haystack.facts[0]))
    status, lines = explain_in_process(capsys, "--prompt-file", prompt, *options)
    assert status == 1
    assert lines[-1].startswith("vllm-quest explain: ")
    assert re.search(message, lines[-1])


def test_a_model_of_ones_own_needs_a_prompt(capsys):
    status, lines = explain_in_process(capsys, "some/model")
    assert status == 1
    assert "--prompt-file is missing" in lines[-1]


@pytest.mark.parametrize("layers", ["a", "0,,1", "3-1", "0,3-1", "-1"])
def test_a_list_that_is_none_is_refused(layers, capsys):
    add_options(parser := argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args([f"--layers={layers}"])
    assert "is no list such as 0,2,8-15" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["1", "0", "-1", "many"])
def test_an_answer_without_a_decode_step_is_refused(number, capsys):
    add_options(parser := argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args([f"--max-tokens={number}"])
    assert f"'{number}' is no number of 2 or more" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("vllm_quest.explain.command.find_spec", lambda name: None)
    status, lines = explain_in_process(capsys)
    assert status == 1
    assert "pip install 'vllm-quest[plot]'" in lines[-1]


def test_help_teaches_without_loading_vllm():
    code = "import sys; from vllm_quest.cli import main; sys.argv[1:] = ['explain', '--help']\n"
    code += "try: main()\nfinally: assert 'vllm' not in sys.modules and 'torch' not in sys.modules"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "--token-budget" in answer.stdout


def test_a_text_is_found_by_its_tokens():
    text, offsets = "a bc. bc", [(0, 0), (0, 1), (1, 4), (4, 5), (5, 8)]
    assert find("bc", text, offsets) == [(2, 3), (4, 5)]
    assert find("bc. bc", text, offsets) == [(2, 5)]
    assert find("d", text, offsets) == find("", text, offsets) == find("bc", text, []) == []


def record_of(read, mass):
    """A record of one step and one KV head."""
    return LayerRecord(
        read=np.array([[read]], dtype=bool),
        mass=np.array([[mass]], dtype=np.float16),
        held=np.ones((1, 1, 1), np.float32),
        best=np.ones((1, 1, 1), np.float32),
        error=np.zeros((1, 1, 2), np.float32),
    )


def test_colours_tell_read_missed_and_the_rest_apart():
    from matplotlib.colors import to_rgb

    pages = record_of([1, 1, 0, 0], [0.0, 0.9, 0.001, 0.05])
    image = colours(pages, 1)
    assert image.shape == (1, 4, 3)
    weak, strong, unread, missed = image[0]
    assert strong.sum() < weak.sum() < unread.sum()  # darker
    assert tuple(unread) == to_rgb(NOT_READ)
    assert tuple(missed) == to_rgb(MISSED)
    joined = colours(pages, 3)
    assert np.array_equal(joined[0], [strong, missed])


def test_a_large_model_is_readable(tmp_path):
    from matplotlib.image import imread

    num_steps, num_heads, num_pages = 40, 8, 2048
    rng = np.random.default_rng(0)
    shape = (num_steps, num_heads, num_pages)
    record = LayerRecord(
        read=rng.random(shape) < 0.06,
        mass=(rng.random(shape) ** 50 / 100).astype(np.float16),
        held=np.full((num_steps, num_heads, 4), 0.9, np.float32),
        best=np.full((num_steps, num_heads, 4), 0.95, np.float32),
        error=np.zeros((num_steps, num_heads, 2), np.float32),
    )
    explanation = Explanation(
        request=Request("org/model-8B", "", QuestConfig(), max_tokens=num_steps + 1),
        prompt_tokens=num_pages * PAGE - num_steps,
        answer="42",
        fed_tokens=["four $"] * num_steps,
        places=[(1000, 1002)],
        heads=list(range(num_heads)),
        layers={0: "dense", 1: "dense", 2: "sliding window"} | {n: record for n in range(3, 32)},
    )
    draw(explanation, tmp_path / "large.png")
    height, width, _ = imread(tmp_path / "large.png").shape
    assert 1000 <= width <= 2000
    assert height <= 2400
