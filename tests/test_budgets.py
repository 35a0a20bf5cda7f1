"""Each request gets the budget that it asked for, and bad ones are refused when they arrive."""

import gc
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

import vllm_quest
from engines import ON_GPU, engine, greedy, random_prompts, token_ids, write_model, write_weights
from vllm_quest import ops
from vllm_quest.budgets import SERVER_DEFAULT, QuestBudgets, requested_budget, why_undelivered


@pytest.mark.parametrize("value", [0, -2, 1.5, "1024", True, [1024], None, {}])
def test_a_bad_budget_is_named_with_what_is_allowed(value):
    with pytest.raises(ValueError, match=r"quest_token_budget is .*; allowed: a positive number"):
        requested_budget({"quest_token_budget": value})


@pytest.mark.parametrize(
    "key",
    ["quest_budget", "quest_tokens", "quest_token_budgets", "QUEST_TOKEN_BUDGET", "quest-budget"],
)
def test_a_misspelt_field_is_refused_with_the_right_name(key):
    with pytest.raises(ValueError, match=f"'{key}'; did you mean 'quest_token_budget'"):
        requested_budget({key: 64})


@pytest.fixture
def noted(monkeypatch):
    """An engine of this process that uses QUEST, and lives."""
    monkeypatch.setattr(QuestBudgets, "_engines", [(object, None)])


@pytest.mark.parametrize(
    "key",
    [
        *("budget", "Budgets", "quest", "token_budget", "token_budgets", "TokenBudget"),
        *("questTokenBudget", " quest_token_budget", "quest.token_budget", "qest_token_budget"),
    ],
)
@pytest.mark.usefixtures("noted")
def test_a_field_that_is_surely_meant_is_refused_where_quest_serves(key):
    params = SamplingParams(extra_args={key: 64})
    with pytest.raises(ValueError, match=f"{key!r}; did you mean 'quest_token_budget'"):
        QuestBudgets.validate_params(params)


@pytest.mark.parametrize(
    "key", ["thinking_token_budget", "max_token_budget", "request_id", "question", 5]
)
@pytest.mark.usefixtures("noted")
def test_fields_of_others_are_none_of_its_business(key):
    QuestBudgets.validate_params(SamplingParams(extra_args={key: 64}))


@pytest.mark.parametrize("extra_args", [None, {}, {"of_another_plugin": 5}, {"question": 5}])
def test_no_budget_means_the_servers(extra_args):
    assert requested_budget(extra_args) == SERVER_DEFAULT


def test_an_absurd_budget_is_clipped():
    assert requested_budget({"quest_token_budget": 10**30}) == np.iinfo(np.int32).max


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("token_budget", [2**40, sys.maxsize, 2**63])
def test_a_servers_budget_may_be_of_any_size(model, token_budget):
    """It covers every context."""
    with engine(model, quest={"token_budget": token_budget, "dense_layers": 0}) as llm:
        token_ids(llm, random_prompts([300]), greedy(4))
        stats = vllm_quest.stats(llm)
    assert stats.sparse_rows == 0
    assert stats.pages_read == stats.pages_full > 0


RUNNERS = [
    "0",
    pytest.param(
        "1",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not ON_GPU, reason="the V2 model runner needs a CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("v2_runner", RUNNERS)
def test_budgets_follow_their_requests(model, monkeypatch, v2_runner):
    """Hundreds of requests through few slots: the pages selected tell whose budget a row had.

    Every request's first prompt token is the mark of its budget, which the test reads back from the
    row's first key through the KV cache: nothing here trusts the host's own table of budgets.
    """
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", v2_runner)
    rng = random.Random(5)
    choices = [16, 48, 112, 240, -1]
    prompts = random_prompts([rng.choice([20, 130, 300, 600]) for _ in range(200)])
    budgets = [rng.choice(choices) for _ in prompts]
    for index, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        prompt["prompt_token_ids"][0] = 3 + choices.index(budget)
        prompt["prompt_token_ids"][1] = 10 + index
    params = [
        greedy(rng.randint(2, 20), extra_args={"quest_token_budget": budget}) for budget in budgets
    ]
    seen = []

    def watched(compiled):
        def decode(query, kv_cache, rows, *rest, **settings):
            # Position 0 has no rotation, so the first key of a request depends on its mark alone.
            marks = kv_cache[rows.block_table[:, 0].long(), :, 0].flatten(1).float().cpu()
            seen.extend(zip(marks, rows.budget_pages.tolist(), strict=True))
            compiled(query, kv_cache, rows, *rest, **settings)

        return decode

    for name in ("sparse_decode", "cluster_decode"):
        monkeypatch.setattr(ops, name, watched(getattr(ops, name)))
    quest = {"dense_layers": 0, "token_budget": 64}
    options = {"max_num_seqs": 7, "max_num_batched_tokens": 256, "max_model_len": 1024}
    with engine(
        model, quest=quest, num_gpu_blocks_override=160 if ON_GPU else 20, **options
    ) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner == (v2_runner == "1")
        seen.clear()
        token_ids(llm, prompts, params)

    by_mark: list[tuple[torch.Tensor, set[int]]] = []
    for mark, row_budget in seen:
        for known, row_budgets in by_mark:
            # Rounding to bf16 leaves the keys of one mark closer than this, not those of two.
            if (mark - known).norm() < 0.05 * known.norm():
                row_budgets.add(row_budget)
                break
        else:
            by_mark.append((mark, {row_budget}))
    pages = {budget // 16 if budget > 0 else ops.UNLIMITED_PAGES for budget in choices}
    layers = 3
    assert len(by_mark) == layers * len(choices)
    dense = {ops.UNLIMITED_PAGES, ops.UNSETTLED_PAGES}  # a resumed request's pages are unsettled
    for _, row_budgets in by_mark:
        assert len(row_budgets - dense) <= 1
    every_budget = set.union(*(row_budgets for _, row_budgets in by_mark))
    assert every_budget - {ops.UNSETTLED_PAGES} == pages


class Builder:
    """Keeps the batch that vLLM would have metadata made of."""

    supports_update_block_table = False
    kv_cache_spec = None
    layer_names = ("layer",)

    def get_metadata_builder(self, *_):
        return self

    def build_metadata(self, batch, *_):
        self.batch = batch


def batch_of_v2(model_state):
    """The batch of three decode rows that the V2 runner's model state hands to QUEST."""
    state = object.__new__(model_state)
    state.supports_mm_inputs = state._align_mode = False
    state.recoverssm = None
    state.vllm_config = SimpleNamespace(num_speculative_tokens=0)
    builder = Builder()
    state.prepare_attn(
        InputBatch.make_dummy(3, 3, InputBuffers(3, 3, torch.device("cpu"))),
        CUDAGraphMode.NONE,
        block_tables=(torch.zeros(3, 1, dtype=torch.int32),),
        slot_mappings=torch.zeros(1, 3, dtype=torch.int64),
        attn_groups=[[builder]],
        kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
    )
    return builder.batch


class EngineConfig(SimpleNamespace):
    """What budgets read of a VllmConfig; unlike its base it takes weak references, as that does."""


def config_of_engine(*, is_v2=True, is_hybrid=False, speculates=False, ranks=1):
    return EngineConfig(
        parallel_config=SimpleNamespace(pipeline_parallel_size=ranks),
        speculative_config=object() if speculates else None,
        model_config=SimpleNamespace(is_hybrid=is_hybrid),
        use_v2_model_runner=is_v2,
    )


@pytest.mark.parametrize(
    ("model_state", "is_hybrid"), [(DefaultModelState, False), (MambaHybridModelState, True)]
)
def test_budgets_are_served_where_v2_tells_which_request_is_which(model_state, is_hybrid):
    """Where vLLM begins to tell it, the refusal can go."""
    is_told = batch_of_v2(model_state).req_idx is not None
    assert (why_undelivered(config_of_engine(is_hybrid=is_hybrid)) is None) == is_told


@pytest.mark.parametrize("is_v2", [True, False])
@pytest.mark.parametrize("is_hybrid", [True, False])
@pytest.mark.parametrize("speculates", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_refusal_names_a_cure_that_cures(is_v2, is_hybrid, speculates, ranks):
    engine = {"is_v2": is_v2, "is_hybrid": is_hybrid, "speculates": speculates, "ranks": ranks}
    reason = why_undelivered(config_of_engine(**engine))
    if reason is None:
        return
    cure = reason.partition(": ")[2]
    if "use tensor parallelism" in cure and " or " not in cure:
        engine["ranks"] = 1
    elif "VLLM_USE_V2_MODEL_RUNNER=0" in cure:
        engine["is_v2"] = False
    elif "use the V2 runner" in cure:
        engine["is_v2"] = True
    if "remove --speculative-config" in cure and " or " not in cure:
        engine["speculates"] = False
    assert why_undelivered(config_of_engine(**engine)) is None


def test_an_engine_that_was_deleted_refuses_no_budgets(monkeypatch):
    """vLLM's engines lie in cycles, and nothing collects them when the next one starts."""
    monkeypatch.setattr(QuestBudgets, "_engines", [])
    asking = SamplingParams(extra_args={"quest_token_budget": 64})
    speculating = config_of_engine(is_v2=False, speculates=True)
    speculating.cycle = speculating
    QuestBudgets.note_engine(speculating)
    with pytest.raises(ValueError, match="cannot be served"):
        QuestBudgets.validate_params(asking)
    gc.disable()
    try:
        del speculating
        plain = config_of_engine()
        QuestBudgets.note_engine(plain)
        QuestBudgets.validate_params(asking)
    finally:
        gc.enable()


SPECULATE = """
import gc, importlib, sys
sys.path.insert(0, sys.argv[2])
import conftest
from vllm.platforms import current_platform
from engines import engine, greedy, random_prompts, token_ids
from vllm.exceptions import VLLMValidationError
if current_platform.is_cpu():
    # vLLM 0.32 trips over an attribute of this module when it speculates on a CPU
    # (vllm/triton_utils/dispatcher.py, line 139): hide it from vLLM's scan.
    importlib.import_module("numba")
    del sys.modules["llvmlite.binding.ffi"]
ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
with engine(sys.argv[1], speculative_config=ngram) as llm:
    print("answer:", token_ids(llm, random_prompts([20]), greedy(4)))
    try:
        token_ids(llm, random_prompts([20]), greedy(4, extra_args={"quest_token_budget": 64}))
    except VLLMValidationError as error:
        print("refused:", error)
    print("answer:", token_ids(llm, random_prompts([20]), greedy(4)))
del llm
gc.collect()  # with the engine's configuration goes its refusal
with engine(sys.argv[1]) as llm:
    asking = greedy(4, extra_args={"quest_token_budget": 64})
    print("served:", len(token_ids(llm, random_prompts([20]), asking)))
"""


def test_the_v1_runner_refuses_budgets_while_speculating(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    arguments = [sys.executable, "-c", SPECULATE, write_model(tmp_path), str(Path(__file__).parent)]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    # vLLM prints lines of its own.
    before, refusal, after = re.findall(r"^((?:answer|refused): .*)$", process.stdout, re.M)
    assert before == after
    assert "served: 1" in process.stdout
    assert refusal.startswith(
        "refused: quest_token_budget cannot be served: vLLM's V1 model runner"
    )
    output = process.stdout + process.stderr
    assert output.count("QUEST: all requests get the server's token budget") == 1
