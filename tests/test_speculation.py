"""Speculation: drafts are verified as rows, and answers are those of QUEST without speculation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eagle import make_next_id_likely, write_eagle_head
from engines import DENSE, ON_GPU, write_model, write_weights

COVERING = {"token_budget": -1}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}

SPECULATE = """
import contextlib, importlib, json, sys
from checked_ops import Checked, check_operators
from engines import *
model, quest, speculations, is_checked = sys.argv[1], *map(json.loads, sys.argv[2:])
if not ON_GPU:
    # vLLM 0.32 trips over an attribute of this module when it speculates on a CPU
    # (vllm/triton_utils/dispatcher.py, line 139): hide it from vLLM's scan.
    importlib.import_module("numba")
    del sys.modules["llvmlite.binding.ffi"]
prompts = [{"prompt_token_ids": random_prompts([20])[0]["prompt_token_ids"] * 12}]
prompts += random_prompts([360, 750, 33, 110])  # all but one pass the end of a group of codes
prompts += random_prompts([1])  # whose one token stands behind the others in a head's first batch
plain = generate(model, prompts, greedy(40), quest=quest)
if quest["token_budget"] == -1:
    assert agree(plain, generate(model, prompts, greedy(40), backend=DENSE))
results = []
for speculation in speculations:
    check = check_operators() if is_checked else contextlib.nullcontext(Checked())
    with check as checked, engine(model, quest=quest, speculative_config=speculation) as llm:
        assert agree(plain, answers(llm, prompts, greedy(40)))
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        results.append({
            "drafted": counter(llm, "vllm:spec_decode_num_draft_tokens"),
            "accepted": counter(llm, "vllm:spec_decode_num_accepted_tokens"),
            "checked": vars(checked),
            "backends": [layer.attn_backend.get_name() for layer in layers.values()],
        })
# vLLM may print more when it stops.
print("RESULT", json.dumps(results))
"""


def speculate(model, quest, *speculations, is_checked=False):
    """What vLLM says of its drafts, after answers were found equal with and without them.

    In a process of its own, for what it does to `sys.modules`. Operators are compared with the
    reference if `is_checked`.
    """
    told = (quest, speculations, is_checked)
    arguments = [sys.executable, "-c", SPECULATE, model, *map(json.dumps, told)]
    process = subprocess.run(arguments, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    (results,) = re.findall(r"^RESULT (.*)$", process.stdout, re.M)
    return json.loads(results)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def guessable(tmp_path_factory):
    return make_next_id_likely(write_weights(write_model(tmp_path_factory.mktemp("guessable"))))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    return write_eagle_head(tmp_path_factory.mktemp("eagle"))


@pytest.mark.parametrize("quest", [COVERING, {"token_budget": 64, "dense_layers": 0}])
def test_drafts_copied_from_the_prompt(model, quest):
    (result,) = speculate(model, quest, NGRAM)
    assert result["drafted"] > 0


@pytest.mark.parametrize("quest", [COVERING, {"token_budget": 256, "dense_layers": 1}])
def test_codes_of_drafts(guessable, quest):
    """A draft that completes a group of 128 tokens gives it codes, and the token that replaces the
    draft gives it others."""
    (result,) = speculate(guessable, quest | {"score": "codes"}, NGRAM, is_checked=True)
    assert result["drafted"] - result["accepted"] > 100
    assert result["checked"]["recoded"] > 0
    assert (result["checked"]["decodes"] > 0) == (quest is not COVERING)


@pytest.mark.parametrize("quest", [COVERING, {"token_budget": 128, "dense_layers": 1}])
def test_drafts_of_an_eagle_head(guessable, head, quest):
    """Many drafts are kept and many are not, whether the head attends with QUEST or densely."""
    eagle = {"method": "eagle", "model": head, "num_speculative_tokens": 3}
    backends = ("QUEST", DENSE)
    speculations = [eagle | {"attention_backend": backend} for backend in backends]
    kept = []
    for backend, result in zip(backends, speculate(guessable, quest, *speculations), strict=True):
        assert result["backends"] == 3 * ["QUEST"] + [backend]
        kept.append(result["accepted"] / result["drafted"])
    assert all(0.2 < share < 0.8 for share in kept)
    if quest is COVERING and not ON_GPU:  # rounding to bf16 may turn a guess
        assert kept[0] == kept[1]
