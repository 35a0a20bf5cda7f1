"""QUEST under CUDA graphs, in both of vLLM's model runners, answers as it does without them."""

import pytest
import torch

from eagle import make_next_id_likely, write_eagle_head
from engines import (
    ATTENTION_SHAPES,
    DENSE,
    agree,
    answers,
    counter,
    engine,
    greedy,
    random_prompts,
    write_model,
    write_weights,
)
from vllm_quest import ops
from vllm_quest.impl import QuestImpl, choose_by_score
from vllm_quest.pass_keys import make_haystack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GRAPHS = {
    "full": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "full and piecewise": {"cudagraph_mode": "FULL_AND_PIECEWISE"},
    "piecewise": {"cudagraph_mode": "PIECEWISE"},
}
SPARSE = {"token_budget": 128, "dense_layers": 1}
CODES = {"score": "codes", "keep_first_pages": 1}
LENGTHS = [1, 16, 17, 300, 700, 1500, 33]

SHAPES = ATTENTION_SHAPES | {
    "7B, one query head per KV head": {
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}


def write(folder, shape: str) -> str:
    sizes = {"hidden_size": 4096, "intermediate_size": 4096} | SHAPES[shape]
    return write_weights(write_model(folder, **sizes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("8b"), "8B, grouped")


@pytest.fixture(params=["V2", "V1"])
def runner(request, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if request.param == "V2" else "0")


def run(model, quest, backend="QUEST", **options):
    with engine(model, backend, quest, kv_cache_memory_bytes=4 << 30, **options) as llm:
        return answers(llm, random_prompts(LENGTHS), greedy(24))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_covering_budget_gives_the_dense_tokens(tmp_path, shape):
    path = write(tmp_path, shape)
    graphs = {"enforce_eager": False, "compilation_config": GRAPHS["full"]}
    dense = run(path, None, DENSE, **graphs)
    assert agree(dense, run(path, {"token_budget": 4096}, **graphs))


@pytest.mark.parametrize("mode", GRAPHS)
def test_graphs_change_no_token(model, runner, mode):
    """The same compilation with and without graphs: torch.compile itself rounds differently, and
    in its default mode as the fastest of several kernels happens to."""
    compilation = GRAPHS[mode] | {"inductor_compile_config": {"deterministic": True}}
    with_graphs = {"enforce_eager": False, "compilation_config": compilation}
    without = with_graphs | {"compilation_config": compilation | {"cudagraph_mode": "NONE"}}
    assert agree(run(model, SPARSE, **without), run(model, SPARSE, **with_graphs))


def test_codes_under_graphs(model, runner):
    graphs = {"enforce_eager": False, "compilation_config": GRAPHS["full"]}
    without = {"compilation_config": GRAPHS["full"] | {"cudagraph_mode": "NONE"}}
    dense = run(model, None, DENSE, **graphs)
    assert agree(dense, run(model, {"token_budget": 4096} | CODES, **graphs))
    sparse = SPARSE | CODES
    assert agree(run(model, sparse, **graphs | without), run(model, sparse, **graphs))


@pytest.mark.parametrize("graphs", [None, "full"])
def test_a_context_longer_than_shared_memory_has_room_for(tmp_path, graphs):
    """One launch, with far keys in device memory, answers as three launches do.

    In one layer, so that no rounding before it makes queries choose other pages.
    """
    sizes = {"max_position_embeddings": 320_000, "num_hidden_layers": 1}
    model = write_weights(write_model(tmp_path, **sizes))
    quest = {"token_budget": 128, "dense_layers": 0, "page_size": 8}
    options = {"enforce_eager": False, "compilation_config": GRAPHS[graphs]} if graphs else {}
    prompts = random_prompts([300_000, 700, 33])
    assert ops.max_cluster_pages(2, 64, torch.device("cuda")) < 300_000 // 8

    def run():
        with engine(model, quest=quest, kv_cache_memory_bytes=4 << 30, **options) as llm:
            return answers(llm, prompts, greedy(24))

    def in_three_launches(*arguments):
        choose_by_score(*arguments)

    one_launch = run()
    with QuestImpl.choosing(in_three_launches):
        assert agree(run(), one_launch)


@pytest.mark.parametrize("draft_backend", ["QUEST", DENSE])
def test_an_eagle_head_changes_no_token(tmp_path, runner, draft_backend):
    """Drafting and verifying replay graphs of several tokens per request."""
    model = make_next_id_likely(write_weights(write_model(tmp_path / "target")))
    graphs = {"enforce_eager": False, "compilation_config": GRAPHS["full"]}
    eagle = {
        "method": "eagle",
        "model": write_eagle_head(tmp_path / "head"),
        "num_speculative_tokens": 3,
        "attention_backend": draft_backend,
    }
    prompts = random_prompts(LENGTHS)
    plain = run(model, SPARSE, **graphs)
    with engine(model, quest=SPARSE, speculative_config=eagle, **graphs) as llm:
        assert agree(plain, answers(llm, prompts, greedy(24)))
        drafted = counter(llm, "vllm:spec_decode_num_draft_tokens")
        accepted = counter(llm, "vllm:spec_decode_num_accepted_tokens")
    assert accepted > 20 and drafted - accepted > 20  # both happen, again and again


@pytest.mark.parametrize("quest", [{"token_budget": 4096}, SPARSE], ids=["covering", "sparse"])
def test_drafts_with_codes(tmp_path, runner, quest):
    """Drafts complete groups and are rejected: the tokens in their place code the groups anew."""
    model = make_next_id_likely(write_weights(write_model(tmp_path)))
    graphs = {"enforce_eager": False, "compilation_config": GRAPHS["full"]}
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 2,
    }
    prompts = random_prompts(LENGTHS)
    # The model goes on counting, as this prompt does.
    prompts += [{"prompt_token_ids": [3 + i % 400 for i in range(1000)]}]
    options = {"kv_cache_memory_bytes": 4 << 30, **graphs}
    with engine(model, quest=quest | CODES, **options) as llm:
        plain = answers(llm, prompts, greedy(150))
    if quest["token_budget"] == 4096:
        with engine(model, DENSE, **options) as llm:
            assert agree(plain, answers(llm, prompts, greedy(150)))
    with engine(model, quest=quest | CODES, speculative_config=ngram, **options) as llm:
        assert agree(plain, answers(llm, prompts, greedy(150)))
        drafted = counter(llm, "vllm:spec_decode_num_draft_tokens")
        accepted = counter(llm, "vllm:spec_decode_num_accepted_tokens")
    assert accepted > 20 and drafted - accepted > 100


@pytest.mark.parametrize("score", ["minmax", "codes"])
def test_the_bundled_model_retrieves_under_graphs(demo_model, runner, score):
    haystack = make_haystack(16384, 128, seed=11)
    facts = haystack.facts[::4]
    prompts = [[{"role": "user", "content": haystack.prompt(fact)}] for fact in facts]
    quest = {"token_budget": 2048, "dense_layers": 0, "score": score, "keep_first_pages": 1}
    graphs = {"enforce_eager": False, "compilation_config": GRAPHS["full"]}
    right = {}
    with engine(demo_model, quest=quest, kv_cache_memory_bytes=4 << 30, **graphs) as llm:
        for budget in (-1, 2048, 32):
            params = greedy(5, extra_args={"quest_token_budget": budget})
            results = llm.chat(prompts, params, use_tqdm=False)
            right[budget] = sum(
                result.outputs[0].text.strip() == fact.code
                for result, fact in zip(results, facts, strict=True)
            )
    assert right[-1] >= len(facts) - 2
    assert right[2048] >= len(facts) - 2
    assert right[32] <= len(facts) // 2
