"""What people serve: every family's shape gives the dense tokens, and decodes sparsely.

By default a few families run whose shapes differ; `-m families` runs all of them.
"""

import json
from pathlib import Path

import pytest
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models import registry

import engines
from checked_ops import check_operators
from engines import DENSE, ON_GPU, agree, answers, engine, greedy, random_prompts, token_ids
from families import FAMILIES, random_weights
from vllm_quest import stats

LENGTHS = [5, 130, 280]
"""Tokens: below a page, and beyond a block, a window and a chunk of prefill."""

BF16_NEAR_TIE = 0.25
"""As `engines.NEAR_TIE` on GPUs."""

NUM_TOKENS = 8
QUEST = {"token_budget": 32, "dense_layers": 1}
OPTIONS = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 4}
COVERING = greedy(NUM_TOKENS, extra_args={"quest_token_budget": -1})

TABLE = [
    pytest.param(
        name,
        id=name,
        marks=[
            *([] if family.in_ci else [pytest.mark.families]),
            *([pytest.mark.gpu] if family.needs_gpu else []),
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
        (tmp_path / "config.json").write_text(json.dumps(FAMILIES[name].config))
        return str(tmp_path)

    return write


@pytest.mark.parametrize("name", TABLE)
def test_a_family(name, write_family, monkeypatch):
    """A covering budget gives the dense tokens, and a small one reads less, as specified."""
    family = FAMILIES[name]
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
