"""What recipes ask of an engine beside text: adapters, embeddings, grammars, several samples."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from engines import (
    DENSE,
    LLAMA,
    ON_GPU,
    agree,
    answers,
    engine,
    greedy,
    random_prompts,
    token_ids,
    write_model,
    write_weights,
)
from vllm_quest import stats

NUM_LAYERS, NUM_KV_HEADS = LLAMA["num_hidden_layers"], LLAMA["num_key_value_heads"]
NUM_TOKENS = 8
ROWS = (NUM_TOKENS - 1) * NUM_LAYERS
"""Of one request, in all layers: its first token comes from prefill."""
SPARSE = {"token_budget": 64, "dense_layers": 0}
COVERING = greedy(NUM_TOKENS, extra_args={"quest_token_budget": -1})
LORA_RANK = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


def write_adapter(folder: Path, seed: int) -> str:
    """Write a LoRA adapter of random weights for all of a layer's attention matrices."""
    hidden, head_size = LLAMA["hidden_size"], LLAMA["head_dim"]
    queries, keys = LLAMA["num_attention_heads"] * head_size, NUM_KV_HEADS * head_size
    shapes = {  # [rows, columns]
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(NUM_LAYERS):
        for name, (rows, columns) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(LORA_RANK, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, LORA_RANK, generator=generator) / LORA_RANK**0.5
            weights |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "target_modules": list(shapes),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_adapters_share_a_batch(model, tmp_path):
    """Requests of two adapters, and on GPUs of none, get their own tokens and decode sparsely.

    On CPUs vLLM 0.32 takes an adapter for requests without one that share a batch with others,
    with any attention backend.
    """
    adapters = [
        LoRARequest("first", 1, write_adapter(tmp_path / "first", seed=1)),
        LoRARequest("second", 2, write_adapter(tmp_path / "second", seed=2)),
        *([None] if ON_GPU else []),
    ]
    prompts = len(adapters) * random_prompts([200])
    options = {"enable_lora": True, "max_lora_rank": LORA_RANK, "max_loras": 2}
    with engine(model, backend=DENSE, **options) as llm:
        dense = answers(llm, prompts, greedy(NUM_TOKENS), lora_request=adapters)
    assert len({answer.tokens for answer in dense}) == len(adapters)
    with engine(model, quest=SPARSE, **options) as llm:
        assert agree(dense, answers(llm, prompts, COVERING, lora_request=adapters))
        assert stats(llm).sparse_rows == 0
        answers(llm, prompts, greedy(NUM_TOKENS), lora_request=adapters)
        assert stats(llm).sparse_rows == len(adapters) * ROWS * NUM_KV_HEADS


def test_prompts_may_be_embeddings(model):
    """A prompt's embeddings give the tokens that its ids give, at a covering and a small budget."""
    prompts = random_prompts([200, 70])
    table = load_file(Path(model) / "model.safetensors")["model.embed_tokens.weight"]
    params = [COVERING, greedy(NUM_TOKENS)]
    with engine(model, quest=SPARSE, enable_prompt_embeds=True) as llm:
        dtype = llm.llm_engine.model_config.dtype
        embeddings = [
            {"prompt_embeds": table[prompt["prompt_token_ids"]].to(dtype)} for prompt in prompts
        ]
        assert token_ids(llm, embeddings, params) == token_ids(llm, prompts, params)


@pytest.mark.parametrize("budget", [-1, 64])
def test_answers_follow_a_grammar(demo_model, budget):
    """To the grammar an answer is its words without spaces: a token of the bundled model is one."""
    params = SamplingParams(
        temperature=0,
        max_tokens=12,
        extra_args={"quest_token_budget": budget},
        structured_outputs=StructuredOutputsParams(regex="(amber|azure){6}"),
    )
    prompt = "the code of amber falcon is 12345. " * 40
    with engine(demo_model, quest=SPARSE) as llm:
        (result,) = llm.generate([prompt], params, use_tqdm=False)
        words = result.outputs[0].text.split()
        assert len(words) == 6 and {*words} <= {"amber", "azure"}
        assert (stats(llm).sparse_rows > 0) == (budget == 64)


def test_samples_of_one_prompt_have_its_budget(model):
    """`n` samples are requests of their own: each has the budget, and differs by its seed."""
    (prompt,) = random_prompts([200])

    def sample(llm, budget: int) -> list[tuple[int, ...]]:
        params = SamplingParams(
            n=3,
            temperature=1.0,
            seed=0,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            extra_args={"quest_token_budget": budget},
        )
        (result,) = llm.generate([prompt], params, use_tqdm=False)
        return [tuple(output.token_ids) for output in result.outputs]

    with engine(model, quest=SPARSE) as llm:
        covered = sample(llm, -1)
        assert len(set(covered)) == 3
        assert stats(llm).sparse_rows == 0
        sample(llm, 64)
        assert stats(llm).sparse_rows == 3 * ROWS * NUM_KV_HEADS
