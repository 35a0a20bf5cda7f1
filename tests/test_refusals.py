"""What QUEST cannot serve is refused at start-up, in one line that says what to do."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm import EngineArgs
from vllm.compilation.backends import set_model_tag
from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.platforms import current_platform
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from engines import (
    DENSE,
    ON_GPU,
    engine,
    generate,
    greedy,
    kv_quantised,
    random_prompts,
    write_model,
)
from vllm_quest import connectors
from vllm_quest.connectors import REFUSED, WHOLE_BLOCKS
from vllm_quest.impl import QuestImpl
from vllm_quest.support import (
    _group_reasons,
    layer_reasons,
    refuse_unsupported,
    sink_head_reasons,
)

ROOT = Path(__file__).parents[1]
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
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "state_size": 16,
    "conv_kernel": 4,
    "time_step_rank": 16,
}
VALUES_OF_ANOTHER_SIZE = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "mimo_v2_flash",
    "head_dim": 128,
    "v_head_dim": 64,
}
LARGE_GLOBAL_HEADS = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "head_dim": 256,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
}
DUAL_CHUNK = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dual_chunk_attention_config": {"chunk_size": 64, "local_size": 8},
}


def connector(name: str, module: str | None = None, **settings: Any) -> dict[str, Any]:
    """Engine options that name a KV connector."""
    return {
        "kv_transfer_config": {
            "kv_connector": name,
            "kv_connector_module_path": module,
            "kv_role": "kv_both",
            "kv_connector_extra_config": settings,
        }
    }


EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


def in_multi(name: str, **settings: Any) -> dict[str, Any]:
    """The same, within a MultiConnector."""
    [child] = connector(name, **settings).values()
    return connector("MultiConnector", connectors=[child])


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "MLA": (MLA, {}, ["MLA", "--attention-backend"]),
    "ALiBi": (ALIBI, {}, ["ALiBi", "--attention-backend"]),
    "encoder": (ENCODER, {}, ["pooling", "--attention-backend"]),
    "encoder and decoder": (ENCODER_DECODER, {}, ["encoder-decoder", "--attention-backend"]),
    "ExampleConnector": (
        {},
        connector("ExampleConnector", shared_storage_path="/nowhere"),
        ["ExampleConnector", "slots of tokens", "--kv-transfer-config", "NixlConnector"],
    ),
    "LMCache": ({}, connector("LMCacheConnectorV1"), ["LMCache takes the rows of a block"]),
    "LMCache by its option": (
        {},
        {"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"},
        ["--kv-offloading-backend is lmcache", "set it to native"],
    ),
    "Mooncake": ({}, in_multi("MooncakeConnector"), ["MooncakeConnector", "would go unnoticed"]),
    "unknown connector": (
        {},
        connector("Carrier", module="engines"),
        ["Carrier of engines is not known", "--kv-transfer-config"],
    ),
    "allowed name of another module": (
        {},
        connector("NixlConnector", module="engines"),
        ["NixlConnector of engines is not known"],
    ),
    "offloading to files": (
        {},
        connector("OffloadingConnector", spec_name="TieringOffloadingSpec"),
        ["spec_name", "TieringOffloadingSpec", "set it to CPUOffloadingSpec"],
    ),
    "handshake that compares nothing": (
        {},
        in_multi("NixlConnector", enforce_handshake_compat=False),
        ["enforce_handshake_compat", "kv_connector_extra_config"],
    ),
    **(
        {}
        if ON_GPU
        else {
            "offloading on CPUs": (
                {},
                {"kv_offloading_size": 1},
                ["GPUs alone", "--kv-offloading-size"],
            ),
            "SimpleCPUOffloadConnector on CPUs": (
                {},
                connector("SimpleCPUOffloadConnector"),
                ["GPUs alone", "--kv-transfer-config"],
            ),
        }
    ),
    "context parallelism": (
        {"num_key_value_heads": 1},
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        ["--decode-context-parallel-size"],
    ),
    "head size": (
        {"head_dim": 32},
        {},
        ["head size is 32", "64, 96, 128, 256" if ON_GPU else "64, 80, 96, 128, 256"],
    ),
    "quantised KV cache": (
        {},
        {"kv_cache_dtype": "fp8_e5m2", "dtype": "bfloat16"},
        ["is fp8_e5m2", "set --kv-cache-dtype bfloat16"],
    ),
    "fp8 KV cache in fp16, or on CPUs": (
        {},
        {"kv_cache_dtype": "fp8", "dtype": "float16"},
        ["is fp8", "set --kv-cache-dtype float16"],
    ),
    "KV cache with scales per head, or on CPUs": (
        kv_quantised(strategy="attn_head"),
        {"dtype": "bfloat16"},
        ["set --kv-cache-dtype bfloat16"],
    ),
    **(
        {}
        if ON_GPU
        else {
            "fp8 KV cache of the checkpoint": (
                kv_quantised(),
                {"dtype": "bfloat16"},
                ["checkpoint's own", "is fp8", "on GPUs alone", "set --kv-cache-dtype bfloat16"],
            )
        }
    ),
    "dual chunk attention": (
        DUAL_CHUNK,
        {},
        ["dual chunk attention", "config.json", "--attention-backend"],
    ),
    "attention-free": (MAMBA, {}, ["no attention layers", "--attention-backend"]),
    "values of another size": (
        VALUES_OF_ANOTHER_SIZE,
        {},
        ["keys have 128 elements", "values 64", "--attention-backend"],
    ),
    "head size of global layers": (LARGE_GLOBAL_HEADS, {}, ["head size is 512"]),
    "image prefix": (
        {"is_mm_prefix_lm": True},
        {},
        ["not causal", "--language-model-only", "--attention-backend"],
    ),
    "prefix attention": ({"prefix_lm": True}, {}, ["not causal", "--attention-backend"]),
    "a backend of the model's own": (
        {"param_sink_number": 128},
        {},
        ["backend of its own", "--attention-backend"],
    ),
    "fast prefill": (
        {},
        {"kv_sharing_fast_prefill": True},
        ["remove", "--kv-sharing-fast-prefill"],
    ),
    "QUEST for the draft alone": (
        {},
        {
            "backend": DENSE,
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "attention_backend": "QUEST",
            },
        },
        ["not for the model's full-attention", "--attention-backend QUEST", "--speculative-config"],
    ),
    "QUEST for other layers alone": (
        {},
        {"backend": None, "attention_config": {"backend_per_kind": {"sliding_window": "QUEST"}}},
        ["not for the model's full-attention", "--attention-backend QUEST", "--attention-config"],
    ),
    "microbatches": ({}, {"ubatch_size": 2}, ["remove", "--enable-dbo", "--ubatch-size"]),
    "reference sliding window": ({"rswa_window": 64}, {}, ["reference", "--attention-backend"]),
    "page size": (
        {},
        {"quest": {"page_size": 48}, "block_size": 128},
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


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a test that comes to reading weights."""

    def read(*arguments):
        raise AssertionError("weights were read before the refusal")

    monkeypatch.setattr(DummyModelLoader, "load_weights", read)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("what", REFUSALS)
def test_it_is_refused_with_a_cure(tmp_path, what):
    shape, options, words = REFUSALS[what]
    if ON_GPU and options.get("tensor_parallel_size", 1) > torch.cuda.device_count():
        pytest.skip("vLLM itself refuses: too few GPUs")
    message = refusal(write_model(tmp_path, **shape), **options)
    lines = [line for line in message.splitlines() if "QUEST" in line or "quest" in line]
    assert len(lines) == 1, message
    for word in words:
        assert word in lines[0]


@pytest.mark.usefixtures("no_weights")
def test_a_layout_that_scatters_pages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "NHD")
    message = refusal(write_model(tmp_path))
    assert "VLLM_KV_CACHE_LAYOUT is NHD" in message and "unset it, or set it to LBHNC" in message


SINKS_REFUSED = {
    "FlashAttention 2": (
        {"attention_config": {"flash_attn_version": 2}, "dtype": "bfloat16"},
        ["sinks", "FlashAttention 3 or 4", "flash_attn_version", "--attention-backend"],
    ),
    "another dtype": ({"dtype": "float16"}, ["sinks", "float16", "set --dtype bfloat16"]),
}


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="CPU_ATTN takes all sinks")
@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("why", SINKS_REFUSED)
def test_sinks_that_prefill_cannot_have_are_refused(tmp_path, why):
    options, words = SINKS_REFUSED[why]
    message = refusal(write_model(tmp_path, **SINKS), **options)
    assert "QUEST cannot serve this model" in message
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("has_sink", "takes_sinks", "dtype", "words"),
    [
        (True, False, torch.bfloat16, SINKS_REFUSED["FlashAttention 2"][1]),
        (True, True, torch.float16, SINKS_REFUSED["another dtype"][1]),
        (True, True, torch.bfloat16, None),
        (False, False, torch.float16, None),
    ],
)
def test_sinks_are_served_where_flash_attention_takes_them(
    monkeypatch, has_sink, takes_sinks, dtype, words
):
    """As on a GPU, whose FlashAttention is asked."""
    monkeypatch.setattr(current_platform, "device_type", "cuda")
    monkeypatch.setattr(FlashAttentionBackend, "supports_sink", lambda: takes_sinks)
    layer = AttentionSelectorConfig(64, dtype, "auto", None, has_sink=has_sink)
    reasons = list(layer_reasons(layer))
    if words is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        assert all(word in reasons[0] for word in words)


MANY_SINK_HEADS = SINKS | {"num_attention_heads": 80, "num_key_value_heads": 8}
MANY_SINK_WORDS = ["80 query heads", "sinks of 64", "--tensor-parallel-size", "TRITON_ATTN"]


@pytest.mark.parametrize("num_heads", [64, 80])
@pytest.mark.parametrize("flash_attn_version", [3, 4, None])
def test_more_heads_with_sinks_than_flash_attention_3_takes_are_refused(
    num_heads, flash_attn_version
):
    """CPU_ATTN has no such version, and no such limit."""
    version = {} if flash_attn_version is None else {"vllm_flash_attn_version": flash_attn_version}
    reasons = list(sink_head_reasons(num_heads, SimpleNamespace(**version)))
    assert len(reasons) == (num_heads == 80 and flash_attn_version == 3)
    for reason in reasons:
        assert all(word in reason for word in MANY_SINK_WORDS)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="CPU_ATTN takes sinks of any number of heads")
@pytest.mark.usefixtures("no_weights")
def test_many_heads_with_sinks_are_refused_before_weights_are_read(tmp_path):
    message = refusal(write_model(tmp_path, **MANY_SINK_HEADS), dtype="bfloat16")
    assert all(word in message for word in MANY_SINK_WORDS)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the cure is a backend for GPUs")
def test_many_heads_with_sinks_are_served_by_the_backend_that_the_refusal_names(tmp_path):
    model = write_model(tmp_path, **MANY_SINK_HEADS)
    (answer,) = generate(model, random_prompts([40]), greedy(4), backend="TRITON_ATTN")
    assert len(answer.tokens) == 4


@pytest.mark.usefixtures("no_weights")
def test_another_dtype_for_the_kv_cache_is_refused(tmp_path):
    """By QUEST; from 0.33 on by vLLM itself."""
    message = refusal(write_model(tmp_path), kv_cache_dtype="float16", dtype="bfloat16")
    for word in ("--kv-cache-dtype", "float16", "bfloat16", "auto"):
        assert word in message


def test_a_block_size_that_vllm_has_yet_to_choose_is_not_refused(tmp_path):
    """vLLM asks the backend for one: 0.32 on GPUs, 0.33 on CPUs too."""
    options = EngineArgs(write_model(tmp_path), attention_backend="QUEST", skip_tokenizer_init=True)
    config = options.create_engine_config()
    config.additional_config = {"quest": {"page_size": 48}}
    config.cache_config.block_size = config.cache_config.DEFAULT_BLOCK_SIZE
    refuse_unsupported(config)
    config.cache_config.user_specified_block_size = True
    with pytest.raises(ValueError, match="block size of 16"):
        refuse_unsupported(config)


def test_each_connector_of_vllm_is_allowed_or_refused_with_a_reason():
    """A new one of a later vLLM is refused as unknown until somebody looks at what it copies."""
    known = WHOLE_BLOCKS.keys() | REFUSED.keys()
    assert not WHOLE_BLOCKS.keys() & REFUSED.keys()
    assert known == KVConnectorFactory._registry.keys()


def moving_kv(*, is_hybrid: bool = False, offloads: bool = False, **transfer: Any) -> Any:
    """What `connectors.reasons` reads of an engine's configuration."""
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            kv_offloading_size=1.0 if offloads else None, kv_offloading_backend="native"
        ),
        model_config=SimpleNamespace(is_hybrid=is_hybrid),
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cure_of_a_refused_connector_is_allowed(device):
    [reason] = connectors.reasons(moving_kv(**EXAMPLE), device)
    names = reason.rpartition("name one of ")[2].split(", ")
    assert ("OffloadingConnector" in names) == (device == "cuda")
    for name in names:
        config = moving_kv(kv_connector=name, kv_role="kv_both")
        assert list(connectors.reasons(config, device)) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("transfer", [{"offloads": True}, EXAMPLE, NIXL])
def test_hybrid_models_keep_their_kv_where_it_is(device, transfer):
    """The cure names no connector, since none was tried with them."""
    *_, reason = connectors.reasons(moving_kv(is_hybrid=True, **transfer), device)
    assert "hybrid" in reason and "remove --kv-transfer-config" in reason
    assert "name one of" not in reason
    assert list(connectors.reasons(moving_kv(is_hybrid=True), device)) == []


def test_the_documented_connectors_are_these():
    text = (ROOT / "docs" / "distributed.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (allowed|refused) \| (.*) \|$", text, re.MULTILINE)
    allowed = [(name, "allowed", reason) for name, reason in WHOLE_BLOCKS.items()]
    assert rows == allowed + [(name, "refused", reason) for name, reason in REFUSED.items()]


def test_an_unsupported_vllm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.35.1")
    message = refusal(write_model(tmp_path))
    assert "vLLM 0.35.1 is installed; install vllm>=0.32,<0.34" in message


def test_dual_chunk_attention_is_served_without_its_configuration(tmp_path):
    """The cure. Overriding it by null is none: vLLM indexes the null where it finds this file."""
    model = write_model(tmp_path, **DUAL_CHUNK)
    (tmp_path / "sparse_attention_config.json").write_text('{"sparse": {}}')
    assert "NoneType" in refusal(model, hf_overrides={"dual_chunk_attention_config": None})
    file = Path(model) / "config.json"
    config = json.loads(file.read_text())
    del config["dual_chunk_attention_config"]
    file.write_text(json.dumps(config))
    prompts, covering = random_prompts([40]), {"token_budget": -1}
    dense = generate(model, prompts, greedy(4), backend=DENSE)
    assert generate(model, prompts, greedy(4), quest=covering) == dense


def test_what_a_layer_needs_of_its_backend_is_named():
    """`sinks=None`, as Granite says it, needs nothing (tests/test_families.py serves it)."""
    with pytest.raises(ValueError, match="its attention layers need chunk_lookback;"):
        QuestImpl(2, 64, 0.125, sinks=None, chunk_lookback=1)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "device", "is_refused"),
    [
        (71, 1, "cuda", True),
        (48, 1, "cuda", True),
        (16, 1, "cuda", False),
        (71, 1, "cpu", False),
    ],
)
def test_more_query_heads_per_kv_head_than_gpu_operators_take(
    num_heads, num_kv_heads, device, is_refused
):
    """71 is Falcon 7B's, 48 StarCoder's."""
    model = SimpleNamespace(
        get_num_attention_heads=lambda parallel: num_heads,
        get_num_kv_heads=lambda parallel: num_kv_heads,
    )
    reasons = list(_group_reasons(model, None, device))
    assert len(reasons) == is_refused
    for reason in reasons:
        assert f"{num_heads} query heads per KV head" in reason
        assert "--tensor-parallel-size" in reason and "--attention-backend" in reason


def test_drafts_trimmed_on_the_device_are_refused():
    layer = AttentionSelectorConfig(64, torch.bfloat16, "auto", None)
    assert list(layer_reasons(layer)) == []
    [reason] = layer_reasons(layer._replace(use_adaptive_verification=True))
    assert "remove enable_adaptive_verification from --speculative-config" in reason


UNSERVED_DRAFTS = {
    "head size is 32": AttentionSelectorConfig(32, torch.bfloat16, "auto", None),
    "not causal": AttentionSelectorConfig(64, torch.bfloat16, "auto", None, use_non_causal=True),
}
"""As DFlash and DSpark, which are not causal."""


def choose_for_draft(why: str, attention_backend: AttentionBackendEnum | None) -> str:
    """The backend of a draft model's layer that QUEST cannot serve."""
    vllm_config = VllmConfig()
    vllm_config.speculative_config = SimpleNamespace(attention_backend=attention_backend)
    quest = AttentionBackendEnum["QUEST"]
    with set_current_vllm_config(vllm_config), set_model_tag("eagle_head"):
        return current_platform.get_attn_backend_cls(quest, UNSERVED_DRAFTS[why])


@pytest.mark.parametrize("why", UNSERVED_DRAFTS)
def test_a_draft_model_gets_another_backend(why, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert "quest" not in choose_for_draft(why, None).lower()
    assert "draft model" in caplog.text and why in caplog.text


@pytest.mark.parametrize("why", UNSERVED_DRAFTS)
def test_a_draft_model_is_refused_where_quest_was_named_for_it(why):
    with pytest.raises(ValueError, match=why):
        choose_for_draft(why, AttentionBackendEnum["QUEST"])
