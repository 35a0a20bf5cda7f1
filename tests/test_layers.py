"""Dense layers are the first full-attention layers of a model, whatever vLLM calls them."""

from unittest.mock import Mock

import pytest
from vllm.config import VllmConfig

import vllm_quest
from engines import (
    DENSE,
    LLAMA,
    agree,
    answers,
    engine,
    generate,
    greedy,
    random_prompts,
    token_ids,
    write_model,
    write_weights,
)
from vllm_quest import metadata
from vllm_quest.layers import dense_layer_names, layer_numbers, why_nothing_is_sparse

NUM_LAYERS = LLAMA["num_hidden_layers"]

FAMILIES = {
    "transformer.h.{}.attn.attn": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "transformer.h.{}.self_attention.attn": {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "without": ["head_dim"],
        "tie_word_embeddings": True,
    },
}
"""Families by the names of their layers, none of which has `layers.<number>`."""


@pytest.mark.parametrize("name", FAMILIES, ids=["GPT-2", "Falcon"])
def test_layers_of_any_name_are_served(tmp_path, name):
    model = write_weights(write_model(tmp_path, **FAMILIES[name]))
    prompts = random_prompts([300, 17])
    dense = generate(model, prompts, greedy(8), backend=DENSE)
    with engine(model, quest={"token_budget": 512, "dense_layers": 1}) as llm:
        assert agree(dense, answers(llm, prompts, greedy(8)))
    with engine(model, quest={"token_budget": 64, "dense_layers": 1}) as llm:
        numbers = {name.format(number): number for number in range(NUM_LAYERS)}
        assert layer_numbers(llm.llm_engine.vllm_config) == numbers
        before = vllm_quest.stats(llm)
        token_ids(llm, prompts[:1], greedy(8))
        after = vllm_quest.stats(llm)
    sparse_rows = after.sparse_rows - before.sparse_rows
    dense_rows = after.dense_rows - before.dense_rows
    assert sparse_rows == (NUM_LAYERS - 1) * dense_rows > 0


def test_windowed_layers_have_no_number(tmp_path, monkeypatch):
    """As in Gemma 3, a model begins with windows: its first full-attention layers are dense.

    By default all that there are, which the log says.
    """
    monkeypatch.setattr(metadata, "logger", log := Mock())
    windows_first = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
        "sliding_window": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 6,
        "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
    }
    with engine(write_model(tmp_path, **windows_first)) as llm:
        config = llm.llm_engine.vllm_config
        first, second = "model.layers.2.self_attn.attn", "model.layers.5.self_attn.attn"
        assert layer_numbers(config) == {first: 0, second: 1}
        assert dense_layer_names(config, 1) == {first}
        assert why_nothing_is_sparse(config, 1) is None
    message, reason = log.warning_once.call_args.args
    assert "no decode step is sparse" in message
    assert "'dense_layers'] is 2, and this model has 2 full-attention layers" in reason


def test_a_model_without_full_attention_is_told_of():
    assert "leave --attention-backend out" in why_nothing_is_sparse(VllmConfig(), 0)
