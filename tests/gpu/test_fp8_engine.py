"""FP8 KV caches through vLLM: `--kv-cache-dtype fp8`, or a checkpoint that says so.

The checkpoints have scales far from 1, so that a scale left out or misplaced changes answers.
"""

from unittest import mock

import pytest
import torch
from vllm import SamplingParams

from checked_ops import check_operators
from engines import (
    ATTENTION_SHAPES,
    DENSE,
    HAS_FP8,
    KV_SCALES,
    VOCABULARY,
    agree,
    answers,
    counter,
    engine,
    greedy,
    random_prompts,
    token_ids,
    write_fp8_scales,
    write_model,
    write_weights,
)
from vllm_quest import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_FP8, reason="no GPU with FlashAttention 3"),
]

STEPS = 8
"""Decode steps whose log probabilities are compared."""

GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
PIECEWISE = GRAPHS | {"compilation_config": {"mode": 0, "cudagraph_mode": "PIECEWISE"}}
FP8 = {"kv_cache_dtype": "fp8"}
LENGTHS = [1, 2, 15, 16, 17, 127, 128, 129, 300, 700, 1500]
COVERING = {"token_budget": 4096}
SPARSE = {"token_budget": 128, "dense_layers": 1}

SHAPES = ATTENTION_SHAPES | {
    "one query head per KV head": {
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
    },
    "sliding windows": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 128,
        "tie_word_embeddings": True,
        "sliding_window": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def write(folder, shape: str) -> str:
    sizes = {"hidden_size": 1024, "intermediate_size": 1024} | SHAPES[shape]
    return write_fp8_scales(write_weights(write_model(folder, **sizes)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("8b"), "8B, grouped")


@pytest.fixture(params=["V2", "V1"])
def runner(request, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if request.param == "V2" else "0")


def run(model, quest, backend="QUEST", lengths=LENGTHS, **options):
    options = FP8 | {"kv_cache_memory_bytes": 2 << 30} | options
    with engine(model, backend, quest, **options) as llm:
        return answers(llm, random_prompts(lengths), greedy(24))


def log_probabilities(model, quest, backend="QUEST", **options) -> torch.Tensor:
    """Of all tokens in decode steps, `[prompts, STEPS, VOCABULARY]`.

    Every step but the first, which prefill makes; whatever they are, the same token is taken.
    """
    params = SamplingParams(
        temperature=0,
        max_tokens=1 + STEPS,
        ignore_eos=True,
        logprobs=VOCABULARY,
        allowed_token_ids=[7],
    )
    options = FP8 | {"kv_cache_memory_bytes": 2 << 30, "max_logprobs": VOCABULARY} | options
    with engine(model, backend, quest, **options) as llm:
        results = llm.generate(random_prompts(LENGTHS), params, use_tqdm=False)
    return torch.tensor(
        [
            [[step[token].logprob for token in range(VOCABULARY)] for step in steps[1:]]
            for steps in (result.outputs[0].logprobs for result in results)
        ]
    )


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_covering_budget_is_more_exact_than_flash_attn_with_fp8(tmp_path, shape):
    """FLASH_ATTN rounds its query and its weights to fp8 as well. Of both, the distance to a bf16
    cache is then the smaller one, and they are no further apart than both are from it."""
    path = write(tmp_path, shape)
    exact = log_probabilities(path, None, DENSE, kv_cache_dtype="bfloat16", **GRAPHS)
    dense = log_probabilities(path, None, DENSE, **GRAPHS)
    quest = log_probabilities(path, COVERING, **GRAPHS)
    print(f"{shape}: FLASH_ATTN {distance(dense, exact):.3g}, QUEST {distance(quest, exact):.3g}")
    print(f"{shape}: QUEST and FLASH_ATTN {distance(quest, dense):.3g}")
    assert distance(quest, exact) <= 1.1 * distance(dense, exact)
    assert distance(quest, dense) <= 2 * distance(dense, exact)


@pytest.mark.parametrize("which", ["key", "value"])
def test_a_scale_left_out_is_seen(model, which):
    """The test above would fail."""
    from vllm_quest import impl  # noqa: F401  (its annotations name the class that is replaced)

    real = ops.KvScales

    def one_left_out(key, value):
        scales = {"key": key, "value": value}
        return real(**(scales | {which: torch.ones_like(scales[which])}))

    exact = log_probabilities(model, None, DENSE, kv_cache_dtype="bfloat16")
    dense = log_probabilities(model, None, DENSE)
    with mock.patch.object(ops, "KvScales", one_left_out):
        quest = log_probabilities(model, COVERING)
    assert distance(quest, exact) > 1.1 * distance(dense, exact)


def test_the_checkpoint_says_fp8(model):
    """`auto` becomes fp8, with the checkpoint's scales; the cache is half of a bf16 cache."""
    blocks = {}
    for dtype in ("auto", "bfloat16"):
        with engine(model, quest=SPARSE, kv_cache_dtype=dtype) as llm:
            config = llm.llm_engine.vllm_config
            blocks[dtype] = config.cache_config.num_gpu_blocks
            for layer in config.compilation_config.static_forward_context.values():
                is_fp8 = layer.impl.has_fp8_cache
                assert is_fp8 == (dtype == "auto") == (layer.kv_cache.dtype == torch.uint8)
                assert not is_fp8 or layer._k_scale.item() == pytest.approx(KV_SCALES["k_scale"])
                assert not is_fp8 or layer._v_scale.item() == pytest.approx(KV_SCALES["v_scale"])
                assert not is_fp8 or layer._q_scale.item() == pytest.approx(KV_SCALES["q_scale"])
            token_ids(llm, random_prompts([300]), greedy(8))
    assert blocks["auto"] in (2 * blocks["bfloat16"], 2 * blocks["bfloat16"] + 1)


@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_small_budgets_agree_with_the_reference(model, runner, page_size):
    """Each write, choice and attention of an engine's steps, on its own cache."""
    quest = {"token_budget": 64, "dense_layers": 1, "page_size": page_size}
    with check_operators() as checked, engine(model, quest=quest, **FP8) as llm:
        token_ids(llm, random_prompts([1, 17, 129, 300]), greedy(8))
    assert checked.fp8_writes == checked.writes > 0
    assert checked.decodes > 0


@pytest.mark.parametrize("score", ["mean_std", "mid_dev"])
def test_other_scores_answer(model, score):
    assert run(model, SPARSE | {"score": score}, lengths=[300, 700])


@pytest.mark.parametrize("graphs", [GRAPHS, PIECEWISE], ids=["full", "piecewise"])
def test_graphs_change_no_token(model, runner, graphs):
    compilation = graphs["compilation_config"] | {"cudagraph_mode": "NONE"}
    without = graphs | {"compilation_config": compilation}
    assert agree(run(model, SPARSE, **without), run(model, SPARSE, **graphs))


def test_prefix_caching_and_preemption_keep_bounds(model):
    """Blocks that are found again, and those of requests that were driven out and came back."""
    prompts = random_prompts([700, 690, 680, 670])
    # 23 blocks hold two prompts of 11 blocks, and not their answers.
    small = {
        "num_gpu_blocks_override": 24,
        "block_size": 64,
        "max_model_len": 1024,
        "enable_prefix_caching": True,
    }
    with engine(model, quest=COVERING, **FP8, **small) as llm:
        crowded = answers(llm, prompts, greedy(60))
        assert counter(llm, "vllm:num_preemptions") > 0
        again = answers(llm, prompts[::-1], greedy(60))[::-1]  # the last ones' blocks are left
        assert counter(llm, "vllm:prefix_cache_hits") > 0
    with engine(model, quest=COVERING, **FP8, kv_cache_memory_bytes=2 << 30) as llm:
        alone = answers(llm, prompts, greedy(60))
    assert agree(alone, crowded) and agree(alone, again)


def test_drafts_are_verified(model, runner):
    """Rows of several tokens per request; written drafts that are rejected are written again."""
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 2,
    }
    prompts = random_prompts([300, 700])
    plain, drafted = (
        run_prompts(model, prompts, speculative_config=config) for config in (None, ngram)
    )
    assert agree(plain, drafted)


def run_prompts(model, prompts, **options):
    options = {name: value for name, value in options.items() if value is not None}
    with engine(model, quest=COVERING, **FP8, kv_cache_memory_bytes=2 << 30, **options) as llm:
        return answers(llm, prompts, greedy(60))


def test_the_bundled_model_answers_as_with_a_bf16_cache(demo_model):
    """A model that was trained, whose scales are 1: QUEST rounds keys and values alone."""
    from vllm_quest.pass_keys import make_haystack

    haystack = make_haystack(16384, 128, seed=11)
    facts = haystack.facts[::4]
    prompts = [[{"role": "user", "content": haystack.prompt(fact)}] for fact in facts]
    right = {}
    for dtype in ("fp8", "bfloat16"):
        options = {"kv_cache_dtype": dtype, "kv_cache_memory_bytes": 4 << 30}
        with engine(demo_model, quest={"token_budget": 2048, "dense_layers": 0}, **options) as llm:
            results = llm.chat(prompts, greedy(5), use_tqdm=False)
            right[dtype] = sum(
                result.outputs[0].text.strip() == fact.code
                for result, fact in zip(results, facts, strict=True)
            )
    assert right["fp8"] >= right["bfloat16"] - 2
