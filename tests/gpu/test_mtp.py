"""Heads that a checkpoint brings to predict several tokens (MTP) draft for their own model.

Every model and head is a family's shape with random weights, changed so that many drafts are kept
and many are not.
"""

import json
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models import registry

from checked_ops import check_operators
from engines import (
    DENSE,
    ON_GPU,
    Answer,
    agree,
    answers,
    counter,
    engine,
    greedy,
    random_prompts,
    token_ids,
)
from families import FAMILIES, Family, heads, random_weights
from fuzz.roundings import spread_of_lead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="three engines take a minute on CPUs"),
]

HEADS = {
    "GLM-4.5": FAMILIES["GLM-4.5"].extended(num_nextn_predict_layers=1),
    "ERNIE 4.5": Family(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        heads(10, 1, 128)
        | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
        | {"moe_intermediate_size": 64, "moe_layer_start_index": 1, "use_bias": False}
        | {"num_nextn_predict_layers": 1},
        2,
    ),
    "Qwen3-Next": FAMILIES["Qwen3-Next"].extended(num_nextn_predict_layers=1),
    "Qwen3.5": FAMILIES["Qwen3.5"].extended(mtp_num_hidden_layers=1),
}

TOKEN_OVER_LAYERS = 9.0
"""How much larger embeddings are made, so that about half of the next tokens follow from them."""

QUIET = 0.3
"""How much smaller the layers' outputs are made, so that rounding that differs between two backends
moves leads by less than NEAR_TIE."""

OUTPUTS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "w2_weight")
"""What layers add to the hidden state by."""

KEPT_ALIKE = 0.15
"""How far two backends' shares of kept drafts may lie apart: a near-tie turns one answer of three,
with some 40 drafts."""

JOINERS = ("fc.weight", "eh_proj.weight", "mtp_linear_proj.weight")
"""What maps [token's embedding, model's hidden state] to a head's input, as heads call it."""

LENGTHS = [5, 130, 280]
NUM_TOKENS = 24
OPTIONS = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 4}
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
MTP = {"method": "mtp", "num_speculative_tokens": 2}
COVERING = {"token_budget": -1}
SPARSE = {"token_budget": 64, "dense_layers": 1}


def guessable_weights(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
    """Random weights of a model, or of its head, which both tend to continue with the next id."""
    random_weights(loader, model, model_config)
    for module in model.modules():
        if isinstance(module, GemmaRMSNorm):
            module.weight.data -= 1.0  # these norms add it
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if name.endswith(JOINERS):
            torch.nn.init.eye_(weight.data)
        elif name.endswith(OUTPUTS):
            weight.data *= QUIET
    embeddings = weights["model.embed_tokens.weight"].data
    if "lm_head.weight" in weights:
        weights["lm_head.weight"].data.copy_(embeddings.roll(1, dims=0))
    embeddings *= TOKEN_OVER_LAYERS


@pytest.fixture(params=["V2", "V1"])
def runner(request, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if request.param == "V2" else "0")


@pytest.fixture
def write_head(tmp_path, monkeypatch):
    """Writes the configuration of a family with a head."""
    monkeypatch.setattr(DummyModelLoader, "load_weights", guessable_weights)
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())

    def write(name: str) -> str:
        (tmp_path / "config.json").write_text(json.dumps(HEADS[name].config))
        return str(tmp_path)

    return write


def kept_drafts(llm: LLM) -> float:
    """The share of an engine's drafts that were kept."""
    kept = counter(llm, "vllm:spec_decode_num_accepted_tokens")
    return kept / counter(llm, "vllm:spec_decode_num_draft_tokens")


def differences(llm: LLM, prompt: Any, true: Answer, found: Answer) -> list[str]:
    """Where an answer leaves the true one, which `llm` gave, by more than roundings explain."""
    if agree([true], [found]):
        return []
    pairs = list(zip(true.tokens, found.tokens, strict=True))
    first = next(i for i, (expected, ours) in enumerate(pairs) if expected != ours)
    tokens = [*prompt["prompt_token_ids"], *true.tokens[:first]]
    lead, spread = true.leads[first], spread_of_lead(llm, tokens, *pairs[first])
    return [f"token {first}: a lead of {lead}, moved by {spread}"] if lead > spread else []


@pytest.mark.parametrize("name", HEADS)
def test_a_head_drafts_for_its_model(name, runner, write_head):
    """Under graphs, a covering budget gives the dense backend's tokens, and keeps as many drafts;
    eagerly, a small budget decodes sparsely, as specified.

    The dense backend runs eagerly: under graphs on vLLM 0.32's V1 runner, FLASH_ATTN gives other
    tokens for Qwen3-Next than without drafts, and no answer for Qwen3.5.
    """
    model, prompts = write_head(name), random_prompts(LENGTHS)
    options = OPTIONS | HEADS[name].options | {"speculative_config": MTP}
    with engine(model, quest=COVERING, **options, **GRAPHS) as llm:
        ours = answers(llm, prompts, greedy(NUM_TOKENS))
        kept = kept_drafts(llm)
    with engine(model, backend=DENSE, **(options | {"enable_prefix_caching": False})) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS))
        kept_by_dense = kept_drafts(llm)
        found = [differences(llm, *each) for each in zip(prompts, dense, ours, strict=True)]
    assert found == [[]] * len(prompts)
    assert 0.1 < kept_by_dense < 0.95  # or the next line would say little
    assert abs(kept - kept_by_dense) < KEPT_ALIKE
    with engine(model, quest=SPARSE, **options) as llm, check_operators() as checked:
        token_ids(llm, prompts, greedy(NUM_TOKENS))
    assert checked.decodes > 0


@pytest.mark.parametrize("name", [name for name, family in HEADS.items() if family.is_hybrid])
def test_a_head_of_a_hybrid_with_cached_prefixes(name, runner, write_head):
    model, prompts = write_head(name), random_prompts([700])
    options = OPTIONS | HEADS[name].options
    options |= {"speculative_config": MTP, "enable_prefix_caching": True}
    with engine(model, backend=DENSE, **options) as llm:
        dense = [answers(llm, prompts, greedy(NUM_TOKENS)) for _ in range(2)]
    with engine(model, quest=COVERING, **options) as llm:
        ours = [answers(llm, prompts, greedy(NUM_TOKENS)) for _ in range(2)]
        assert counter(llm, "vllm:prefix_cache_hits") > 0
    assert all(map(agree, dense, ours))
