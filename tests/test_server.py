"""The user's own way in: `vllm serve --attention-backend QUEST`, asked through the OpenAI API."""

import json
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from engines import write_model
from servers import SERVE, serve
from test_readme import ROOT, SNIPPETS, snippets
from vllm_quest.metrics import HELP
from vllm_quest.monitor import LOOK_EVERY_S
from vllm_quest.pass_keys import make_haystack


@pytest.fixture(scope="module")
def client(demo_model, monkeypatch_module):
    monkeypatch_module.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    quest = json.dumps({"quest": {"token_budget": 1024, "dense_layers": 0}})
    options = ["--attention-backend", "QUEST", "--additional-config", quest, "--enforce-eager"]
    options.append("--enable-prompt-tokens-details")
    with serve(demo_model, *options) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none")


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def haystack():
    return make_haystack(8000, 64, seed=3)


def ask(client, model, haystack, fact, **options) -> str:
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": haystack.prompt(fact)}],
        temperature=0,
        max_tokens=5,
        stream=True,
        **options,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_chats_retrieve(client, demo_model, haystack):
    facts = haystack.facts[::8]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda fact: ask(client, demo_model, haystack, fact), facts))
    right = sum(answer.strip() == fact.code for answer, fact in zip(answers, facts, strict=True))
    assert right >= len(facts) - 1


def budget(value) -> dict:
    return {"extra_body": {"vllm_xargs": {"quest_token_budget": value}}}


def test_requests_with_budgets_of_their_own_share_the_server(client, demo_model, haystack):
    facts = haystack.facts[::4]
    with ThreadPoolExecutor(8) as pool:
        tiny = pool.map(lambda fact: ask(client, demo_model, haystack, fact, **budget(32)), facts)
        full = pool.map(lambda fact: ask(client, demo_model, haystack, fact, **budget(-1)), facts)
        right = [
            sum(answer.strip() == fact.code for answer, fact in zip(answers, facts, strict=True))
            for answers in (tiny, full)
        ]
    assert right[0] <= len(facts) // 2
    assert right[1] >= len(facts) - 1


@pytest.mark.parametrize("value", [0, -2, 1.5, "1024", [1024]])
def test_a_bad_budget_is_refused_and_the_server_goes_on(client, demo_model, haystack, value):
    prompt = "the code of amber falcon is"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=demo_model, prompt=prompt, **budget(value))
    assert "quest_token_budget" in str(error.value)
    assert "positive number of tokens" in str(error.value)
    fact = haystack.facts[0]
    assert ask(client, demo_model, haystack, fact, **budget(4096)).strip() == fact.code


def test_a_bad_budget_ends_a_stream_with_what_is_allowed(client, demo_model, haystack):
    """The status was sent before."""
    with pytest.raises(openai.APIError, match="positive number of tokens"):
        ask(client, demo_model, haystack, haystack.facts[0], **budget(0))


ENDPOINTS = {
    "completions": lambda text: {"prompt": text, "max_tokens": 4},
    "chat/completions": lambda text: {"messages": message(text), "max_tokens": 4},
    "responses": lambda text: {"input": text, "max_output_tokens": 4},
    "messages": lambda text: {"messages": message(text), "max_tokens": 4},
}


def message(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def post(client, endpoint: str, model: str, text: str, token_budget: int) -> None:
    body = {"model": model, **ENDPOINTS[endpoint](text), **budget(token_budget)["extra_body"]}
    client.post(f"/{endpoint}", body=body, cast_to=object)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_refuses_a_bad_budget(client, demo_model, endpoint):
    with pytest.raises(openai.BadRequestError, match="positive number of tokens"):
        post(client, endpoint, demo_model, "the code of amber falcon is", 0)


def test_every_endpoint_serves_a_budget(client, demo_model):
    time.sleep(2 * LOOK_EVERY_S)  # for what other tests left
    before = quest_metrics(client)
    short = make_haystack(600, 4, seed=5)
    for endpoint in ENDPOINTS:
        post(client, endpoint, demo_model, short.prompt(short.facts[0]), 32)
    time.sleep(2 * LOOK_EVERY_S)
    new = {name: value - before.get(name, 0) for name, value in quest_metrics(client).items()}
    sparse_rows, dense_rows, _, pages_read, _ = new.values()
    assert dense_rows == 0 and sparse_rows % len(ENDPOINTS) == 0 < sparse_rows
    assert pages_read == sparse_rows * 32 / 16


@pytest.mark.parametrize("field", ["quest_budget", "questTokenBudget", "token_budgets"])
def test_a_misspelt_field_is_refused_with_the_right_name(client, demo_model, field):
    misspelt = {"extra_body": {"vllm_xargs": {field: 1024}}}
    with pytest.raises(openai.BadRequestError, match=f"{field}.*quest_token_budget"):
        client.completions.create(model=demo_model, prompt="the code", **misspelt)


def test_a_salt_keeps_cached_prefixes_of_other_budgets_away(client, demo_model):
    def ask(prompt, num_tokens, token_budget, **body):
        body |= {"ignore_eos": True, "return_token_ids": True, **budget(token_budget)["extra_body"]}
        return client.completions.create(
            model=demo_model, prompt=prompt, max_tokens=num_tokens, extra_body=body
        )

    text = make_haystack(300, 2, seed=6)
    decoded = ask(text.prompt(text.facts[0]), 300, 16).choices[0]
    next_turn = decoded.prompt_token_ids + decoded.token_ids
    shared, salted = (
        ask(next_turn, 1, -1, **salt).usage.prompt_tokens_details.cached_tokens
        for salt in ({}, {"cache_salt": "full"})
    )
    assert shared > len(decoded.prompt_token_ids)
    assert not salted
    [snippet] = snippets((ROOT / "docs" / "families.md").read_text())
    exec(snippet, {"client": client, "MODEL": demo_model})


def test_the_http_snippet_of_the_readme(client, demo_model):
    exec(SNIPPETS[1], names := {"MODEL": demo_model, "URL": client.base_url})
    assert names["completion"].choices[0].text


def quest_metrics(client) -> dict[str, float]:
    """The `vllm:quest_*` counters of the server's `/metrics`."""
    url = str(client.base_url).removesuffix("v1/") + "metrics"
    lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
    samples = [line.rpartition(" ") for line in lines if line.startswith("vllm:quest_")]
    return {sample.partition("{")[0]: float(value) for sample, _, value in samples}


def test_metrics_tell_what_was_read(client, demo_model, haystack):
    """4 answers of 5 tokens after 8K tokens: what their decode steps read, to the page."""
    time.sleep(2 * LOOK_EVERY_S)  # for what other tests left
    before = quest_metrics(client)
    for fact in haystack.facts[:2]:
        ask(client, demo_model, haystack, fact)
        ask(client, demo_model, haystack, fact, **budget(-1))
    time.sleep(2 * LOOK_EVERY_S)
    new = {name: value - before.get(name, 0) for name, value in quest_metrics(client).items()}
    assert list(new) == [f"{name}_total" for name in HELP]
    sparse_rows, dense_rows, pages_scored, pages_read, pages_full = new.values()
    assert sparse_rows == dense_rows > 0
    assert pages_scored == pages_full / 2
    assert pages_read == sparse_rows * 1024 / 16 + pages_full / 2


def test_a_bad_setting_stops_the_server_with_one_line(tmp_path):
    model = write_model(tmp_path)
    options = ["--attention-backend", "QUEST", "--skip-tokenizer-init"]
    settings = ["--additional-config", '{"quest": {"token_budgets": 5}}']
    process = subprocess.run([*SERVE, model, *options, *settings], capture_output=True, text=True)
    assert process.returncode != 0
    errors = process.stderr.split("Traceback")[-1].splitlines()
    [line] = [line for line in errors if "'token_budgets'" in line]
    assert "'token_budget'" in line
    assert "EngineCore" not in process.stderr
