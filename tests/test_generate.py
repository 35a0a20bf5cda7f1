"""QUEST inside vLLM, offline: whatever batches vLLM makes, the answers are right.

With a budget that covers the context QUEST must answer as dense attention does, token for token.
Random weights in fp32 leave hardly a near-tie between tokens, so that equality is a fair demand.
"""

import os
import random

import pytest

from engines import (
    DENSE,
    ON_GPU,
    agree,
    answers,
    counter,
    engine,
    generate,
    greedy,
    random_prompts,
    token_ids,
    write_model,
    write_weights,
)

COVERING = {"token_budget": -1}
SPARSE = {"token_budget": 128, "dense_layers": 0}
TINY_CACHE = {"num_gpu_blocks_override": 24, "max_model_len": 1024}
"""3072 tokens, in the blocks of 128 that QUEST has by default."""
EDGE_LENGTHS = [1, 2, 15, 16, 17, 31, 127, 128, 129, 300, 700]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


SHAPES = {
    "grouped": {},
    "one query head per KV head": {"num_key_value_heads": 4},
    "three query heads per KV head": {"hidden_size": 384, "num_attention_heads": 6},
    **({} if ON_GPU else {"head size 80": {"head_dim": 80}}),
    "head size 96": {"head_dim": 96},
    "head size 128": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "head size 256": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "soft cap and sliding windows": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
        "sliding_window": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_covering_budget_gives_the_dense_tokens(tmp_path, shape):
    path = write_weights(write_model(tmp_path, **SHAPES[shape]))
    prompts = random_prompts(EDGE_LENGTHS)
    chunked = {"max_num_batched_tokens": 200, "max_num_seqs": 6}
    dense = generate(path, prompts, greedy(20), backend=DENSE, **chunked)
    assert agree(dense, generate(path, prompts, greedy(20), quest=COVERING, **chunked))


@pytest.fixture(scope="module")
def dense_at_edges(model):
    return generate(model, random_prompts(EDGE_LENGTHS), greedy(8), backend=DENSE)


@pytest.mark.parametrize(
    ("page_size", "block_size"), [(8, 128), (16, 16), (32, 128), (64, 64), (128, 128)]
)
def test_pages_may_be_smaller_than_blocks(model, dense_at_edges, page_size, block_size):
    prompts = random_prompts(EDGE_LENGTHS)
    covering = {"token_budget": 2048, "page_size": page_size, "dense_layers": 0}
    ours = generate(model, prompts, greedy(8), quest=covering, block_size=block_size)
    assert agree(dense_at_edges, ours)


@pytest.fixture(scope="module")
def dense_of_700(model):
    return generate(model, random_prompts([700]), greedy(20), backend=DENSE)


def test_a_small_budget_changes_the_answer(model, dense_of_700):
    """Or the tests above would show nothing."""
    sparse = {"token_budget": 16, "dense_layers": 0}
    assert generate(model, random_prompts([700]), greedy(20), quest=sparse) != dense_of_700


def test_dense_layers_alone_are_dense(model, dense_of_700):
    all_dense = {"token_budget": 16, "dense_layers": 3}
    ours = generate(model, random_prompts([700]), greedy(20), quest=all_dense)
    assert agree(dense_of_700, ours)


def test_hundreds_of_requests_of_very_different_lengths(model):
    rng = random.Random(1)
    lengths = [rng.choice([1, 2, 7, 16, 33, 130, 400, 1000]) for _ in range(300)]
    prompts = random_prompts(lengths)
    params = [greedy(rng.randint(1, 24)) for _ in prompts]
    options = {"max_num_seqs": 64, "max_num_batched_tokens": 512}
    dense = generate(model, prompts, params, backend=DENSE, **options)
    assert agree(dense, generate(model, prompts, params, quest=COVERING, **options))


def test_a_preemption_storm_loses_nothing(model):
    prompts = random_prompts([200 + 10 * i for i in range(24)])
    dense = generate(model, prompts, greedy(150), backend=DENSE)
    with engine(model, quest=COVERING, **TINY_CACHE) as llm:
        assert agree(dense, answers(llm, prompts, greedy(150)))
        assert counter(llm, "vllm:num_preemptions") > 0


def test_sparse_answers_survive_a_preemption_storm(model):
    """Every request comes to its end, and each run of the storm gives the same tokens."""
    prompts = random_prompts([200 + 10 * i for i in range(24)])
    sparse = {"token_budget": 64, "dense_layers": 1}
    runs = []
    for _ in range(2):
        with engine(model, quest=sparse, **TINY_CACHE) as llm:
            runs.append(answers(llm, prompts, greedy(150)))
            assert counter(llm, "vllm:num_preemptions") > 0
    assert agree(*runs)
    assert all(len(answer.tokens) == 150 for answer in runs[0])


SHARED = random_prompts([640])[0]["prompt_token_ids"]


def prompts_that_share() -> list[dict]:
    tails = [prompt["prompt_token_ids"] for prompt in random_prompts([1, 5, 17, 130, 1], seed=2)]
    prompts = [{"prompt_token_ids": SHARED + tail} for tail in tails]
    prompts.append({"prompt_token_ids": SHARED})  # hits whole: its last token alone is computed
    return prompts


def same_with_cached_prefixes(model, ask, **options) -> bool:
    """Whether `ask(llm, prompts)` answers alike without and with prefix caching."""
    prompts = prompts_that_share()
    runs = []
    for caching in (False, True):
        with engine(model, enable_prefix_caching=caching, **options) as llm:
            token_ids(llm, prompts[-1:], greedy(1))
            runs.append(ask(llm, prompts))
            assert (counter(llm, "vllm:prefix_cache_hits") > 0) == caching
    return agree(*runs)


IN_FP32 = pytest.mark.skipif(
    ON_GPU, reason="bf16 rounds other prefills differently, and other pages become the best"
)


@pytest.mark.parametrize("quest", [COVERING, pytest.param(SPARSE, marks=IN_FP32)])
def test_prefix_caching_changes_no_token(model, quest):
    def ask(llm, prompts):
        return answers(llm, prompts, greedy(20))

    assert same_with_cached_prefixes(model, ask, quest=quest)


def test_cached_prefixes_are_what_prefill_leaves(model):
    """One prompt after another, each prefilled in the same parts with and without the cache."""

    def ask(llm, prompts):
        return [answers(llm, [prompt], greedy(20))[0] for prompt in prompts]

    cut_alike = {"max_num_batched_tokens": len(SHARED)}
    assert same_with_cached_prefixes(model, ask, quest=SPARSE, **cut_alike)


def test_one_token_ends_of_prompts_are_prefill(model):
    """The last prompt token sees the whole context, however the prompt was cut into chunks."""
    prompts = random_prompts([641])
    sparse = {"token_budget": 16, "dense_layers": 0}
    whole = generate(model, prompts, greedy(1), quest=sparse)
    cut = generate(model, prompts, greedy(1), quest=sparse, max_num_batched_tokens=640)
    dense = generate(model, prompts, greedy(1), backend=DENSE)
    assert agree(dense, whole) and agree(dense, cut)


@pytest.mark.skipif(ON_GPU, reason="needs two devices, which CPU workers always find")
def test_tensor_parallel_workers_give_the_same_tokens(model, monkeypatch):
    """Workers are spawned, each has half of the KV heads, and heads select for themselves."""
    first, *_, last = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{last}")
    prompts = random_prompts([300, 700])
    alone = generate(model, prompts, greedy(16), quest=SPARSE)
    assert agree(alone, generate(model, prompts, greedy(16), quest=SPARSE, tensor_parallel_size=2))
