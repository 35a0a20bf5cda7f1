"""What people serve: every family's shape gives the dense tokens, and decodes sparsely.

By default the families run whose shapes differ; `-m families` runs the others.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models import registry

import engines
from checked_ops import check_operators
from engines import (
    DENSE,
    ON_GPU,
    agree,
    answers,
    counter,
    engine,
    greedy,
    random_prompts,
    token_ids,
)
from families import FAMILIES, random_weights
from vllm_quest import metadata, stats

LENGTHS = [5, 130, 280]
"""Tokens: below a page, and beyond a block, a window and a chunk of prefill."""

BF16_NEAR_TIE = 0.25
"""As `engines.NEAR_TIE` on GPUs."""

NUM_TOKENS = 8
QUEST = {"token_budget": 32, "dense_layers": 1}
OPTIONS = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 4}
COVERING = greedy(NUM_TOKENS, extra_args={"quest_token_budget": -1})

GPU = pytest.mark.gpu

TABLE = [
    pytest.param(
        name,
        id=name,
        marks=[
            *([] if family.in_ci else [pytest.mark.families]),
            *([GPU] if family.needs_gpu else []),
            pytest.mark.skipif(bool(family.needs_gpu) and not ON_GPU, reason=family.needs_gpu),
        ],
    )
    for name, family in FAMILIES.items()
]


@pytest.fixture
def write_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a family's configuration; vLLM makes up weights that make attention matter."""
    monkeypatch.setattr(DummyModelLoader, "load_weights", random_weights)
    # vLLM inspects each model class in a process of its own, which takes seconds.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())

    def write(name: str) -> str:
        if FAMILIES[name].is_hybrid:  # requests have budgets of their own with V1 alone
            monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        (tmp_path / "config.json").write_text(json.dumps(FAMILIES[name].config))
        return str(tmp_path)

    return write


@pytest.mark.parametrize("name", TABLE)
def test_a_family(name, write_family, monkeypatch):
    """A covering budget gives the dense tokens, and a small one reads less, as specified."""
    family = FAMILIES[name]
    monkeypatch.setattr(metadata, "logger", log := Mock())
    if family.options.get("dtype") == "bfloat16":
        monkeypatch.setattr(engines, "NEAR_TIE", BF16_NEAR_TIE)
    model, options = write_family(name), OPTIONS | family.options
    prompts = random_prompts(LENGTHS)
    with engine(model, backend=DENSE, **options) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS))
    with engine(model, quest=QUEST, **options) as llm, check_operators() as checked:
        assert agree(dense, answers(llm, prompts, COVERING))
        covered = stats(llm)
        token_ids(llm, prompts, greedy(NUM_TOKENS))
        small = stats(llm)
        vllm_config = llm.llm_engine.vllm_config
        num_kv_heads = vllm_config.model_config.get_num_kv_heads(vllm_config.parallel_config)
    assert covered.sparse_rows == 0
    # The longest prompt's rows exceed the budget, and so do those of the other beyond a page.
    rows = 2 * (NUM_TOKENS - 1)
    assert small.sparse_rows == rows * family.sparse_layers * num_kv_heads
    assert (checked.decodes > 0) == (family.sparse_layers > 0)
    assert log.warning_once.called == (family.sparse_layers == 0)


def backends(llm) -> dict[str, int]:
    """How many attention layers each backend has."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return Counter(layer.backend.name for layer in layers if isinstance(layer, Attention))


def on_gpus(*values: Any) -> Any:
    """Values of a test's parameters that run on GPUs alone."""
    skipped = pytest.mark.skipif(not ON_GPU, reason="LFM2 stands for hybrids on CPUs")
    return pytest.param(*values, id="-".join(map(str, values)), marks=[GPU, skipped])


@pytest.mark.parametrize(
    ("name", "block_size"),
    [
        ("LFM2", 128),
        ("LFM2", 96),
        on_gpus("Qwen3-Next", 192),
        on_gpus("Qwen3.5", 192),
        on_gpus("Nemotron-H", 96),
    ],
)
def test_a_hybrid_with_cached_prefixes(name, block_size, write_family):
    """States of other layers are cached beside QUEST's pages, in blocks of a size that fits both.

    vLLM calls this the mamba cache mode "align". Dense attention runs with the same cache, because
    vLLM 0.32 on CPUs answers LFM2 otherwise where prompts are cut elsewhere, see `fuzz.mended`.
    """
    model, prompts = write_family(name), random_prompts([300])
    options = OPTIONS | {"enable_prefix_caching": True, "block_size": block_size}
    with engine(model, backend=DENSE, **options) as llm:
        dense = [answers(llm, prompts, greedy(NUM_TOKENS)) for _ in range(2)]
    with engine(model, quest=QUEST, **options) as llm:
        ours = [answers(llm, prompts, COVERING) for _ in range(2)]
        assert counter(llm, "vllm:prefix_cache_hits") > 0
    assert all(map(agree, dense, ours))


@pytest.mark.parametrize("name", [on_gpus("LFM2"), on_gpus("Qwen3-Next"), on_gpus("Qwen3.5")])
def test_a_hybrid_under_the_v2_runner(name, write_family, monkeypatch):
    """It needs a GPU."""
    model, prompts = write_family(name), random_prompts(LENGTHS)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with engine(model, backend=DENSE, **OPTIONS) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS))
    with engine(model, quest=QUEST | {"token_budget": -1}, **OPTIONS) as llm:
        assert agree(dense, answers(llm, prompts, greedy(NUM_TOKENS)))
    with engine(model, quest=QUEST, **OPTIONS) as llm, check_operators() as checked:
        token_ids(llm, prompts, greedy(NUM_TOKENS))
        with pytest.raises(
            VLLMValidationError, match=r"in hybrid models: set VLLM_USE_V2_MODEL_RUNNER=0"
        ):
            token_ids(llm, prompts, COVERING)
    assert checked.decodes > 0


@pytest.mark.parametrize(
    ("name", "block_size"), [("LFM2", 48), on_gpus("Qwen3-Next", 240), on_gpus("Qwen3.5", 240)]
)
def test_a_hybrid_in_blocks_of_any_size(name, block_size, write_family):
    """Of an odd number of pages, without prefix caching: the mamba cache mode "none"."""
    model, prompts = write_family(name), random_prompts(LENGTHS)
    options = OPTIONS | {"enable_prefix_caching": False}
    with engine(model, backend=DENSE, **options) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS))
    with engine(model, quest=QUEST, block_size=block_size, **options) as llm:
        assert agree(dense, answers(llm, prompts, COVERING))


@pytest.mark.parametrize(
    ("name", "options", "variables"),
    [
        ("Gemma 2", {"disable_hybrid_kv_cache_manager": True}, {}),
        ("gpt-oss", {"disable_hybrid_kv_cache_manager": True}, {}),
        ("Llama 4", {}, {"VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": "1"}),
    ],
)
def test_layer_kinds_in_one_group_or_in_several(
    name, options, variables, write_family, monkeypatch
):
    """Whether vLLM keeps layers of all kinds in one KV cache group, or each kind in its own."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    model, prompts = write_family(name), random_prompts(LENGTHS)
    with engine(model, backend=DENSE, **OPTIONS) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS))
    with engine(model, quest=QUEST, **OPTIONS, **options) as llm:
        assert agree(dense, answers(llm, prompts, COVERING))


@pytest.mark.parametrize("name", ["Gemma 2", "gpt-oss"])
def test_windowed_layers_may_keep_their_own_backend(name, write_family):
    model, prompts = write_family(name), random_prompts(LENGTHS)
    by_kind = {
        "attention_config": {"backend_per_kind": {"full_attention": "QUEST"}},
        "additional_config": {"quest": QUEST},
    }
    with engine(model, backend=DENSE, **OPTIONS) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS))
    with engine(model, backend=None, **OPTIONS, **by_kind) as llm:
        assert backends(llm) == {"QUEST": 2, DENSE: 2}
        assert agree(dense, answers(llm, prompts, COVERING))


IN_A_FRESH_PROCESS = """
import sys
from vllm import EngineArgs
model = sys.argv[1]
config = {"backend": "QUEST", "backend_per_kind": {"full_attention": "QUEST"}}
try:
    EngineArgs(model, attention_config=config)
except ValueError as error:
    assert "Unknown attention backend" in str(error)
else:
    raise AssertionError("vLLM knows the name without its plugins")
from vllm.plugins import load_general_plugins
load_general_plugins()
print(EngineArgs(model, attention_config=config).attention_config.backend.name)
"""


def test_attention_config_is_read_before_plugins(demo_model):
    arguments = [sys.executable, "-c", IN_A_FRESH_PROCESS, demo_model]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.stdout.split()[-1:] == ["QUEST"], process.stderr[-2000:]
