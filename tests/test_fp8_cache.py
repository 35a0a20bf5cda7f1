"""FP8 KV caches where no GPU is needed: their blocks, the prefill's query, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

from vllm_quest import kv_page
from vllm_quest.backend import QuestBackend
from vllm_quest.config import QuestConfig
from vllm_quest.platforms.cuda import DenseImpl
from vllm_quest.support import FP8_CACHE_DTYPES, _fp8_reasons, layer_reasons

TO_BF16 = "set --kv-cache-dtype bfloat16"


@pytest.mark.parametrize("block_size", [16, 128, 512])
def test_a_block_has_as_many_rows_of_half_the_bytes(block_size):
    """vLLM keeps fp8 caches as uint8."""
    sizes = {"block_size": block_size, "num_kv_heads": 2, "head_size": 64}
    bf16 = kv_page.with_bounds(FullAttentionSpec(dtype=torch.bfloat16, **sizes), 16)
    fp8 = kv_page.with_bounds(
        FullAttentionSpec(dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR, **sizes), 16
    )
    assert fp8.num_states == bf16.num_states == block_size + block_size // 16
    assert 2 * fp8.page_size_bytes == bf16.page_size_bytes
    assert fp8.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR


@pytest.mark.parametrize(
    ("cache", "takes_fp8", "is_rounded"),
    [("fp8", True, True), ("fp8", False, False), ("auto", True, False)],
)
def test_flash_attn_gets_the_query_in_the_caches_dtype(monkeypatch, cache, takes_fp8, is_rounded):
    """FlashAttention 4 on sm_90 takes the query as it is (vLLM's `supports_quant_query_input`)."""
    seen = []

    def quantise(query, scale):
        assert query.dim() == 2
        return (query.float() / scale).to(torch.float8_e4m3fn), scale

    monkeypatch.setattr(vllm_ops, "scaled_fp8_quant", quantise)
    monkeypatch.setattr(
        FlashAttentionImpl, "forward", lambda self, layer, query, *rest: seen.append((query, rest))
    )
    impl = DenseImpl.__new__(DenseImpl)
    impl.kv_cache_dtype, impl.supports_quant_query_input = cache, takes_fp8
    query = torch.randn(3, 6, 64, dtype=torch.bfloat16)[:, :4]  # as a slice of QKV
    impl.forward(SimpleNamespace(_q_scale=torch.tensor(0.5)), query, "key", "value")
    ((given, rest),) = seen
    assert rest == ("key", "value")
    assert given.shape == query.shape
    wanted = (query.float() / 0.5).to(torch.float8_e4m3fn) if is_rounded else query
    assert given.dtype == wanted.dtype
    assert torch.equal(given.float(), wanted.float())


@pytest.fixture
def hopper(monkeypatch):
    """As on a GPU with FlashAttention 3; its tests may change the version."""
    monkeypatch.setattr(current_platform, "device_type", "cuda")
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **layer: 3)
    monkeypatch.setattr(fa_utils, "flash_attn_supports_kv_cache_dtype", lambda *a, **layer: True)


FP8_LAYER = AttentionSelectorConfig(64, torch.bfloat16, "fp8", None)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", FP8_CACHE_DTYPES)
def test_fp8_is_served_on_hopper(dtype):
    assert list(layer_reasons(FP8_LAYER._replace(kv_cache_dtype=dtype))) == []
    assert QuestBackend.supports_kv_cache_dtype(dtype)


OTHER_DTYPES = ("fp8_e5m2", "int8_per_token_head", "fp8_per_token_head", "nvfp4", "turboquant_k8v4")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_other_quantised_caches_are_refused_by_name(dtype):
    (reason,) = layer_reasons(FP8_LAYER._replace(kv_cache_dtype=dtype))
    assert f"is {dtype};" in reason and TO_BF16 in reason


def test_fp8_is_refused_on_cpus(monkeypatch):
    monkeypatch.setattr(current_platform, "device_type", "cpu")
    (reason,) = layer_reasons(FP8_LAYER)
    assert "is fp8" in reason and "GPUs alone" in reason and TO_BF16 in reason


@pytest.mark.usefixtures("hopper")
def test_fp8_is_refused_for_models_in_fp16():
    (reason,) = layer_reasons(FP8_LAYER._replace(dtype=torch.float16))
    assert "bfloat16, not in float16" in reason and "set --kv-cache-dtype float16" in reason


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("version", "takes_fp8"), [(2, False), (4, True), (3, False)])
def test_fp8_is_refused_without_flash_attention_3(monkeypatch, version, takes_fp8):
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **layer: version)
    monkeypatch.setattr(
        fa_utils, "flash_attn_supports_kv_cache_dtype", lambda *a, **layer: takes_fp8
    )
    (reason,) = layer_reasons(FP8_LAYER)
    for word in ("FlashAttention 3", "compute capability 9.0", "flash_attn_version", TO_BF16):
        assert word in reason


@pytest.mark.usefixtures("hopper")
def test_scales_per_head_are_refused_only_with_an_fp8_cache():
    layer = FP8_LAYER._replace(use_per_head_quant_scales=True)
    (reason,) = layer_reasons(layer)
    assert "per head" in reason and TO_BF16 in reason
    assert list(layer_reasons(layer._replace(kv_cache_dtype="bfloat16"))) == []  # the cure


REFUSED_WITH_FP8 = {
    "codes": (
        {"quest": QuestConfig(score="codes")},
        ["'score'", "'codes'", "another score", TO_BF16],
    ),
    "per head": ({"scheme": {"strategy": "attn_head"}}, ["per head", TO_BF16]),
    "left out": ({"skipped": ["0"]}, ["--kv-cache-dtype-skip-layers", TO_BF16]),
}


@pytest.mark.parametrize("what", [None, *REFUSED_WITH_FP8])
def test_what_an_fp8_cache_cannot_have_is_refused(what):
    case, words = REFUSED_WITH_FP8[what] if what else ({}, [])
    skipped = SimpleNamespace(kv_cache_dtype_skip_layers=case.get("skipped", []))
    reasons = list(
        _fp8_reasons(
            SimpleNamespace(cache_config=skipped),
            case.get("quest", QuestConfig()),
            case.get("scheme", {"strategy": "tensor"}),
        )
    )
    assert len(reasons) == (what is not None)
    for reason in reasons:
        assert all(word in reason for word in words)
