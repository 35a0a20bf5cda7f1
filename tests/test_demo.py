"""The command line as a newcomer sees it."""

import re
import subprocess
import sys

import pytest

from vllm_quest.demo import kv_share
from vllm_quest.pass_keys import FACT_TOKENS, make_haystack

COMMAND = (sys.executable, "-m", "vllm_quest")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)


def test_check_finds_everything_here():
    answer = run("check")
    assert answer.returncode == 0, answer.stdout
    for found in ("vLLM", "torch", "operators for cpu", "QUEST is registered", "bundled model"):
        assert found in answer.stdout
    assert "QUEST can serve here" in answer.stdout


def test_the_demo_compares_budgets():
    answer = run("demo", "--context", "4096", "--questions", "4", "--budgets", "512", "32")
    assert answer.returncode == 0, answer.stderr[-3000:]
    table = dict(re.findall(r"^(full attention|budget \d+) +(\d+) of 4", answer.stdout, re.M))
    assert int(table["full attention"]) >= 3
    assert int(table["budget 512"]) >= 3
    assert int(table["budget 32"]) <= 2
    assert "vllm serve MODEL --attention-backend QUEST" in answer.stdout


@pytest.mark.parametrize("command", [(), ("demo",), ("check",)])
def test_help_teaches(command):
    answer = run(*command, "--help")
    assert answer.returncode == 0
    assert "usage: vllm-quest" in answer.stdout


def test_the_share_of_bytes_counts_bounds_and_pages():
    assert kv_share(-1, 1000, 16) == kv_share(1000, 1000, 16) == 1.0
    assert kv_share(2048, 16384, 16) == pytest.approx(1 / 16 + 1 / 8)


@pytest.mark.parametrize("filler", ["sentences", "words"])
@pytest.mark.parametrize("num_tokens", [240, 1000, 4097])
def test_haystacks_have_the_length_and_facts_asked_for(demo_model, filler, num_tokens):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    haystack = make_haystack(num_tokens, 20, seed=num_tokens, filler=filler)
    token_ids = tokenizer(haystack.text, add_special_tokens=False)["input_ids"]
    assert len(token_ids) == haystack.num_tokens == num_tokens
    assert tokenizer.unk_token_id not in token_ids
    assert len({fact.key for fact in haystack.facts}) == 20
    for fact in haystack.facts:
        assert haystack.text.count(fact.sentence) == 1
        assert len(tokenizer(fact.sentence, add_special_tokens=False)["input_ids"]) == FACT_TOKENS
    assert haystack == make_haystack(num_tokens, 20, seed=num_tokens, filler=filler)
