"""What QUEST cannot serve is refused at start-up, in one line that says what to do."""

from typing import Any

import pytest
import vllm

from engines import ON_GPU, engine, write_model

MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 3,
}
ALIBI = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "n_head": 4,
    "n_layer": 2,
    "layer_norm_epsilon": 1e-5,
}
SINKS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "layer_types": ["full_attention"] * 3,
}
ENCODER = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "layer_norm_eps": 1e-5,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
ENCODER_DECODER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "is_encoder_decoder": True,
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_target_positions": 448,
}
CONNECTOR = {
    "kv_transfer_config": {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": "/nowhere"},
    }
}

REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "MLA": (MLA, {}, ["MLA", "--attention-backend"]),
    "ALiBi": (ALIBI, {}, ["ALiBi", "--attention-backend"]),
    "attention sinks": (SINKS, {"dtype": "bfloat16"}, ["sinks", "--attention-backend"]),
    "encoder": (ENCODER, {}, ["pooling", "--attention-backend"]),
    "encoder and decoder": (ENCODER_DECODER, {}, ["encoder-decoder", "--attention-backend"]),
    "KV connector": ({}, CONNECTOR, ["ExampleConnector", "--kv-transfer-config"]),
    "KV offloading": ({}, {"kv_offloading_size": 1}, ["offloading", "--kv-offloading-size"]),
    "context parallelism": (
        {"num_key_value_heads": 1},
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        ["--decode-context-parallel-size"],
    ),
    "head size": ({"head_dim": 32}, {}, ["head size is 32", "64, 80, 96, 128, 256"]),
    "quantised KV cache": (
        {},
        {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
        ["fp8", "set --kv-cache-dtype bfloat16"],
    ),
    "another dtype for the KV cache": (
        {},
        {"kv_cache_dtype": "float16", "dtype": "bfloat16"},
        ["--kv-cache-dtype is float16", "bfloat16", "set --kv-cache-dtype auto"],
    ),
    "chunked local attention": (
        {"attention_chunk_size": 8192},
        {},
        ["chunked local attention", "--attention-backend"],
    ),
    "dual chunk attention": (
        {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 8}},
        {},
        ["dual chunk attention", "--hf-overrides", "--attention-backend"],
    ),
    "page size": (
        {},
        {"quest": {"page_size": 48}},
        ["'page_size'", "48", "block size of 128", "--block-size"],
    ),
    "unknown setting": ({}, {"quest": {"budget": 1}}, ["'budget'", "token_budget"]),
    "settings beside their section": (
        {},
        {"additional_config": {"token_budget": 64}},
        ["'token_budget'", '{"quest": {"token_budget": 2048}}'],
    ),
    "bad setting": ({}, {"quest": {"token_budget": "8"}}, ["'token_budget'", "'8'", "integer"]),
}


def refusal(path: str, **options: Any) -> str:
    with pytest.raises(Exception) as error, engine(path, **options):
        pass
    return str(error.value)


@pytest.mark.parametrize("what", REFUSALS)
def test_it_is_refused_with_a_cure(tmp_path, what):
    shape, options, words = REFUSALS[what]
    message = refusal(write_model(tmp_path, **shape), **options)
    lines = [line for line in message.splitlines() if "QUEST" in line or "quest" in line]
    assert len(lines) == 1, message
    for word in words:
        assert word in lines[0]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="vLLM does not sleep on CPUs")
def test_sleep_mode_is_refused(tmp_path):
    message = refusal(write_model(tmp_path), enable_sleep_mode=True)
    assert "--enable-sleep-mode" in message


def test_an_unsupported_vllm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.35.1")
    message = refusal(write_model(tmp_path))
    assert "vLLM 0.35.1 is installed; install vllm>=0.32,<0.34" in message
