"""The command line as a newcomer sees it."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engines import ON_GPU
from vllm_quest.config import UNLIMITED
from vllm_quest.demo import Outcome, kv_share, run_demo, table
from vllm_quest.pass_keys import FACT_TOKENS, make_haystack

COMMAND = (sys.executable, "-P", "-m", "vllm_quest")  # what the script vllm-quest imports


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True)


def test_check_finds_everything_here():
    answer = run("check")
    assert answer.returncode == 0, answer.stdout
    for found in ("vLLM", "torch", "operators for cpu", "QUEST is registered", "bundled model"):
        assert found in answer.stdout
    assert "QUEST can serve here" in answer.stdout


def test_the_demo_compares_budgets_and_scores(tmp_path):
    """In a folder with another vllm_quest, as a clone is whose operators were not built."""
    (tmp_path / "vllm_quest.py").write_text("raise ImportError('of the working directory')")
    options = ("--context", "4096", "--questions", "4", "--budgets", "512", "32")
    answer = run("demo", *options, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr[-3000:]
    row = r"^(full attention|budget \d+, \w+) +(\d) of 4 +([\d.]+) +([\d.]+)x +([\d.]+)%$"
    rows = re.findall(row, answer.stdout, re.M)
    right = {name: int(number) for name, number, *_ in rows}
    assert list(right) == ["full attention"] + [
        f"budget {budget}, {score}" for budget in (512, 32) for score in ("minmax", "codes")
    ]
    assert right["full attention"] >= 3
    for score in ("minmax", "codes"):
        assert right[f"budget 512, {score}"] >= 3
        assert right[f"budget 32, {score}"] <= 2
    assert all(float(ms_per_token) > 0 for _, _, ms_per_token, *_ in rows)
    assert "vllm serve MODEL --attention-backend QUEST" in answer.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_questions": 0}, "--questions is 0; allowed: a positive number"),
        ({"context_tokens": 50000}, "--context is 50000; allowed: 1 to 40832"),
        ({"context_tokens": 100, "num_questions": 50}, "got 50 facts in 100 tokens"),
        ({"budgets": [512, 0]}, "quest_token_budget is 0; allowed: a positive number of tokens"),
    ],
)
def test_bad_options_are_refused_before_a_server_starts(options, words, capsys):
    defaults = {"context_tokens": 1024, "num_questions": 4, "budgets": [512], "seed": 0}
    assert run_demo(**defaults | {"scores": ["minmax"], "kv_cache_dtype": "auto"} | options) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-quest demo: ") and words in line


@pytest.mark.skipif(ON_GPU, reason="GPUs serve an fp8 cache")
def test_a_server_that_does_not_start_says_why():
    answer = run("demo", "--kv-cache-dtype", "fp8", "--context", "1024")
    assert answer.returncode == 1
    assert "set --kv-cache-dtype bfloat16" in answer.stderr
    assert answer.stderr.endswith("The server did not start; its last lines are above.\n")


def test_a_demo_that_is_ended_ends_its_server():
    demo = subprocess.Popen([*COMMAND, "demo", "--context", "1024"], stderr=subprocess.PIPE)
    assert demo.stderr is not None
    told = b""
    while not told.endswith(b"Waiting for the server"):
        told += demo.stderr.read(1)
        assert demo.poll() is None
    servers = psutil.Process(demo.pid).children()
    demo.terminate()
    assert demo.wait(timeout=60) == 128 + signal.SIGTERM
    assert servers and not any(server.is_running() for server in servers)


def test_the_table_compares_the_fastest_answers():
    full = Outcome("minmax", UNLIMITED, right=3, asked=3, ms_per_step=[14.2, 12.0, 13.0])
    small = Outcome("minmax", 1024, right=2, asked=3, ms_per_step=[7.5, 40.0, 8.0])
    header, *rows = table([full, small], 16384).splitlines()
    assert header.split("  ")[-1].strip() == "KV bytes read"
    assert rows[0].split() == ["full", "attention", "3", "of", "3", "12.0", "1.0x", "100.0%"]
    assert rows[1].split() == ["budget", "1024,", "minmax", "2", "of", "3", "7.5", "1.6x", "12.5%"]
    assert len({len(line) for line in (header, *rows)}) == 1


@pytest.mark.parametrize("command", [(), ("demo",), ("check",)])
def test_help_teaches(command):
    answer = run(*command, "--help")
    assert answer.returncode == 0
    assert "usage: vllm-quest" in answer.stdout


@pytest.mark.parametrize(("score", "scoring"), [("minmax", 1 / 16), ("codes", 9 / 128)])
def test_the_share_of_bytes_counts_what_scores_are_made_of_and_pages(score, scoring):
    for covering in (UNLIMITED, 1000):
        assert kv_share(Outcome(score, covering), 1000, 16) == 1.0
    assert kv_share(Outcome(score, 2048), 16384, 16) == pytest.approx(scoring + 1 / 8)


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
