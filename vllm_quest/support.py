"""What QUEST cannot serve, and what to do about it: each refusal is one line.

Three gates. `refuse_unsupported` sees the whole configuration in the user's own process, before any
weight is read. `layer_reasons` sees what only an attention layer knows, such as its sinks, and
`sink_head_reasons` what is known once the layer's dense backend was made.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from vllm_quest import connectors
from vllm_quest.config import GROUP_TOKENS, QuestConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionImpl
    from vllm.v1.attention.selector import AttentionSelectorConfig

VLLM_AT_LEAST, VLLM_BELOW = "0.32", "0.34"
VLLM_WANTED = f"vllm>={VLLM_AT_LEAST},<{VLLM_BELOW}"
HEAD_SIZES = {"cpu": (64, 80, 96, 128, 256), "cuda": (64, 96, 128, 256)}
DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32),
    "cuda": (torch.float16, torch.bfloat16),
}
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
"""Caches of the model's dtype."""
FP8_CACHE_DTYPES = ("fp8", "fp8_e4m3")
"""Caches of float8_e4m3fn, with a scale for a layer's keys and one for its values."""
OTHER_BACKEND = "choose another --attention-backend"
MAX_SINK_HEADS = 64
"""Query heads whose sinks FlashAttention 3 takes (its `fwd`: "query heads <= 64 with S aux")."""
DRAFT_TAGS = ("eagle_head", "dflash_head", "dspark_head", "draft_model", "medusa_head")
"""What vLLM tags the building of draft models with (`set_model_tag` in `vllm/v1`)."""


def fits_vllm(version: str) -> bool:
    """Whether QUEST serves this version of vLLM; a local part such as `+cpu` does not matter."""
    installed = Version(Version(version).base_version)
    return Version(VLLM_AT_LEAST) <= installed < Version(VLLM_BELOW)


def refuse_unsupported(vllm_config: "VllmConfig") -> None:
    """Stop start-up if this configuration asks for what QUEST cannot do.

    Raises:
        ValueError: naming what is unsupported and the cure; or a bad setting (see `QuestConfig`).
    """
    quest = QuestConfig.from_vllm(vllm_config)
    for reason in _reasons(vllm_config, quest):
        raise ValueError(f"QUEST cannot serve this configuration: {reason}")


def serves_layer(selector: "AttentionSelectorConfig") -> bool:
    """Whether QUEST runs a layer for which it was chosen; if not, vLLM chooses another backend.

    It runs all layers of the model, or start-up stops. A draft model got QUEST with the model that
    it drafts for, unless its user named QUEST for the draft; it may do without.

    Raises:
        ValueError: naming what is unsupported and the cure.
    """
    for reason in layer_reasons(selector):
        if not _is_draft_without_a_choice():
            raise ValueError(f"QUEST cannot serve this model: {reason}")
        from vllm.logger import init_logger

        # A name below vLLM's, so that its handlers and levels apply.
        init_logger("vllm.quest").warning_once(
            "QUEST leaves the draft model to another backend: %s",
            reason.removesuffix(f"; {OTHER_BACKEND}"),
        )
        return False
    return True


def _is_draft_without_a_choice() -> bool:
    """Whether vLLM is building a draft model whose backend nobody named."""
    from vllm.compilation import backends
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    speculation = None if vllm_config is None else vllm_config.speculative_config
    if speculation is None or speculation.attention_backend is not None:
        return False
    return backends.model_tag in DRAFT_TAGS


def _reasons(vllm_config: "VllmConfig", quest: QuestConfig) -> Iterator[str]:
    import vllm
    from vllm.platforms import current_platform

    if not fits_vllm(vllm.__version__):
        yield f"vLLM {vllm.__version__} is installed; install {VLLM_WANTED}"

    device = current_platform.device_type
    if device not in HEAD_SIZES:
        yield f"it runs on CPUs and NVIDIA GPUs, not on {device}; {OTHER_BACKEND}"
        return

    from vllm_quest import extension

    if missing := extension.why_missing(device):
        yield missing

    if device == "cuda":
        from vllm.v1.attention.backends.fa_utils import is_flash_attn_varlen_func_available

        if not current_platform.has_device_capability(extension.OLDEST_ARCH):
            yield f"the GPU is older than compute capability 8.0; {OTHER_BACKEND}"
        if not is_flash_attn_varlen_func_available():
            yield "this vLLM has no FlashAttention, which QUEST needs for prefill; reinstall vLLM"

    model = vllm_config.model_config
    if model is not None:
        if model.use_mla:
            yield f"the model uses MLA (multi-head latent attention); {OTHER_BACKEND}"
        elif model.is_encoder_decoder:
            yield f"the model is an encoder-decoder; {OTHER_BACKEND}"
        elif model.runner_type == "pooling":
            yield f"pooling models do not decode; {OTHER_BACKEND}"
        elif model.is_attention_free:
            yield f"the model has no attention layers; {OTHER_BACKEND}"
        else:
            yield from _kind_reasons(model)
            yield from _head_size_reasons(model)
            yield from _shape_reasons(model.get_head_size(), model.dtype, device)
            yield from _group_reasons(model, vllm_config.parallel_config, device)

    cache = vllm_config.cache_config
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None) or {}
    cache_dtype: str = cache.cache_dtype
    # vLLM's `Attention.__init__` takes any scheme for fp8, and refuses others when it reads scales.
    if cache_dtype == "auto" and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8):
        cache_dtype = "fp8"
    yield from _cache_dtype_reasons(
        cache_dtype, None if model is None else model.dtype, device, _head_size_of(model)
    )
    if cache_dtype in FP8_CACHE_DTYPES:
        yield from _fp8_reasons(vllm_config, quest, scheme)
    # Where nobody named a block size, vLLM may yet ask the backend for one: 0.32 does so on GPUs,
    # and 0.33 on CPUs too.
    is_final = cache.user_specified_block_size or cache.block_size != cache.DEFAULT_BLOCK_SIZE
    block_size = (cache.block_size or 0) if is_final else 0
    if block_size % quest.page_size != 0:
        yield (
            f"additional_config['quest']['page_size'] is {quest.page_size}, which does not divide "
            f"vLLM's block size of {block_size}; set page_size to a divisor, or --block-size "
            "to a multiple"
        )
    elif quest.score == "codes" and block_size % GROUP_TOKENS != 0:
        yield (
            f"additional_config['quest']['score'] is 'codes', which needs blocks of a multiple of "
            f"{GROUP_TOKENS} tokens, and vLLM's block size is {block_size}; set --block-size "
            f"{GROUP_TOKENS}, or another score"
        )

    yield from _layout_reasons()
    if cache.kv_sharing_fast_prefill:
        yield (
            "--kv-sharing-fast-prefill keeps from backends which requests read prompts and which "
            "request is which; remove it"
        )
    parallel = vllm_config.parallel_config
    if parallel.use_ubatching:
        yield (
            "microbatches were not tried, and vLLM's V1 runner keeps from backends which requests "
            "they hold; remove --enable-dbo and --ubatch-size"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield (
            "context parallelism splits a request's pages over GPUs; remove "
            "--decode-context-parallel-size and --prefill-context-parallel-size"
        )
    yield from connectors.reasons(vllm_config, device)


def layer_reasons(selector: "AttentionSelectorConfig") -> Iterator[str]:
    """Why QUEST cannot run a layer with these properties; nothing if it can."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionType

    if selector.use_mla or selector.use_sparse:
        yield f"the model uses MLA or a sparse attention of its own; {OTHER_BACKEND}"
    if selector.attn_type != AttentionType.DECODER:
        yield f"it attends with an encoder ({selector.attn_type}); {OTHER_BACKEND}"
    if selector.has_sink:
        yield from _sink_reasons(selector.dtype, current_platform.device_type)
    if selector.use_mm_prefix or selector.use_non_causal:
        yield f"the model attends to later tokens (not causal); {OTHER_BACKEND}"
    if selector.use_rswa:
        yield f"the model uses reference sliding-window attention; {OTHER_BACKEND}"
    cache_dtype = selector.kv_cache_dtype or "auto"
    if selector.use_per_head_quant_scales and cache_dtype in FP8_CACHE_DTYPES:
        yield _PER_HEAD
    if selector.use_batch_invariant:
        yield f"VLLM_BATCH_INVARIANT is set; unset it, or {OTHER_BACKEND}"
    if selector.use_adaptive_verification:
        yield (
            "adaptive verification trims drafts on the GPU alone, and QUEST plans rows on the "
            "host; remove enable_adaptive_verification from --speculative-config"
        )
    if selector.use_pcp or selector.use_dcp:
        yield "context parallelism is configured; remove it"
    yield from _shape_reasons(selector.head_size, selector.dtype, current_platform.device_type)
    yield from _cache_dtype_reasons(
        cache_dtype,
        selector.dtype,
        current_platform.device_type,
        selector.head_size,
        has_sinks=selector.has_sink,
    )


def _layout_reasons() -> Iterator[str]:
    """A layout of KV blocks that scatters a page; vLLM would refuse it once weights were read."""
    from vllm import envs

    from vllm_quest.backend import QuestBackend

    requested = envs.VLLM_KV_CACHE_LAYOUT
    allowed = [each.name for each in QuestBackend.supported_kv_cache_layouts()]
    if requested not in (None, "HND", *allowed):  # HND is vLLM's older name of the first
        yield (
            f"VLLM_KV_CACHE_LAYOUT is {requested}, where a page of a KV head does not lie in one "
            f"piece; unset it, or set it to {' or '.join(allowed)}"
        )


def _kind_reasons(model: "ModelConfig") -> Iterator[str]:
    """Kinds of attention that a model's configuration tells of."""
    config = model.hf_text_config
    if getattr(config, "dual_chunk_attention_config", None) is not None:
        yield (
            "the model uses dual chunk attention; remove dual_chunk_attention_config from its "
            f"config.json, or {OTHER_BACKEND}"
        )
    if model.is_mm_prefix_lm:
        images = model.multimodal_config
        takes_embeddings = images is not None and images.enable_mm_embeds
        without = " and without --enable-mm-embeds" if takes_embeddings else ""
        yield (
            "the model's image tokens attend to later ones (not causal); serve text alone with "
            f"--language-model-only{without}, or {OTHER_BACKEND}"
        )
    if getattr(config, "prefix_lm", None) is not None:
        yield f"the model's prompts attend to later tokens (not causal); {OTHER_BACKEND}"
    if getattr(config, "param_sink_number", 0):
        yield (
            "the model attends to sink tokens of its own with a backend of its own, whatever is "
            "chosen: leave --attention-backend out"
        )
    if model.rswa_window is not None:
        yield f"the model uses reference sliding-window attention; {OTHER_BACKEND}"


def _head_size_reasons(model: "ModelConfig") -> Iterator[str]:
    """Values of another size than keys; `layer_reasons` sees the head size of each layer."""
    config, head_size = model.hf_text_config, model.get_head_size()
    value_size = getattr(config, "v_head_dim", None) or head_size
    if value_size != head_size:
        yield (f"its keys have {head_size} elements, and its values {value_size}; {OTHER_BACKEND}")


def _group_reasons(model: "ModelConfig", parallel: "ParallelConfig", device: str) -> Iterator[str]:
    """More query heads per KV head than the GPU operators take."""
    from vllm_quest.ops import MAX_GROUP_SIZE

    group_size = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    if device == "cuda" and group_size > MAX_GROUP_SIZE:
        yield (
            f"it has {group_size} query heads per KV head on each GPU; the GPU operators take "
            f"{MAX_GROUP_SIZE}: raise --tensor-parallel-size, or {OTHER_BACKEND}"
        )


def _sink_reasons(dtype: torch.dtype, device: str) -> Iterator[str]:
    """Attention sinks that the platform's own backend does not take; CPU_ATTN takes all."""
    if device != "cuda":
        return
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    if not FlashAttentionBackend.supports_sink():
        yield (
            "the model has attention sinks, and their prefill needs FlashAttention 3 or 4, which "
            "run on GPUs from compute capability 9.0: leave flash_attn_version to vLLM, or "
            f"{OTHER_BACKEND}"
        )
    elif dtype != torch.bfloat16:
        yield (
            f"the model has attention sinks, which FlashAttention takes in bfloat16 only, and its "
            f"dtype is {str(dtype).removeprefix('torch.')}; set --dtype bfloat16"
        )


def sink_head_reasons(num_heads: int, dense: "AttentionImpl[Any]") -> Iterator[str]:
    """More query heads with sinks than the platform's own backend takes, in a layer of it."""
    # CPU_ATTN, which takes any number, has no such attribute.
    is_flash_attn_3 = getattr(dense, "vllm_flash_attn_version", None) == 3
    if is_flash_attn_3 and num_heads > MAX_SINK_HEADS:
        yield (
            f"the model has attention sinks and {num_heads} query heads on each GPU, and "
            f"FlashAttention 3 takes sinks of {MAX_SINK_HEADS}: raise --tensor-parallel-size, or "
            "set --attention-backend TRITON_ATTN"
        )


def _shape_reasons(head_size: int, dtype: torch.dtype, device: str) -> Iterator[str]:
    if head_size not in HEAD_SIZES[device]:
        allowed = ", ".join(map(str, HEAD_SIZES[device]))
        yield f"its head size is {head_size}; supported on {device}: {allowed}; {OTHER_BACKEND}"
    if dtype not in DTYPES[device]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[device])
        yield f"its dtype is {dtype}; set --dtype to one of {allowed}"


def _head_size_of(model: "ModelConfig | None") -> int | None:
    return None if model is None or model.is_attention_free else model.get_head_size()


def _cache_dtype_reasons(
    cache_dtype: str,
    dtype: torch.dtype | None,
    device: str,
    head_size: int | None,
    *,
    has_sinks: bool = False,
) -> Iterator[str]:
    """A KV cache whose dtype QUEST does not have here. The checkpoint may have brought it, so that
    leaving the option out is no cure."""
    name = "bfloat16" if dtype is None else str(dtype).removeprefix("torch.")
    said = f"the KV cache's dtype (--kv-cache-dtype, or the checkpoint's own) is {cache_dtype}"
    if name in KV_CACHE_DTYPES:
        cure = f"set --kv-cache-dtype {name}"
    else:
        cure = "set --dtype bfloat16 and --kv-cache-dtype bfloat16"
    if cache_dtype in KV_CACHE_DTYPES:
        if cache_dtype not in ("auto", name):
            yield (
                f"--kv-cache-dtype is {cache_dtype}, and the model's dtype {name}; QUEST keeps "
                "keys in the model's dtype: set --kv-cache-dtype auto"
            )
    elif cache_dtype not in FP8_CACHE_DTYPES:
        yield f"{said}; QUEST has fp8 (e4m3) and the model's own: {cure}"
    elif device == "cpu":
        yield f"{said}, which QUEST has on GPUs alone: {cure}"
    elif dtype not in (None, torch.bfloat16):
        yield f"{said}, which QUEST has for models in bfloat16, not in {name}: {cure}"
    elif not _flash_attn_3_takes(cache_dtype, head_size, has_sinks=has_sinks):
        yield (
            f"{said}, and its prefill needs FlashAttention 3, which runs on GPUs of compute "
            f"capability 9.0: leave flash_attn_version to vLLM there, elsewhere {cure}"
        )


def _flash_attn_3_takes(cache_dtype: str, head_size: int | None, *, has_sinks: bool) -> bool:
    """Whether FLASH_ATTN would prefill such a cache, and with FlashAttention 3: 4 was not tried."""
    from vllm.v1.attention.backends import fa_utils

    layer = {"head_size": head_size, "has_sinks": has_sinks}
    takes_fp8 = bool(fa_utils.flash_attn_supports_kv_cache_dtype(cache_dtype, **layer))
    return takes_fp8 and fa_utils.get_flash_attn_version(**layer) == 3


_PER_HEAD = (
    "the checkpoint scales an fp8 KV cache's keys and values per head, and QUEST has one scale for "
    "all: set --kv-cache-dtype bfloat16"
)


def _fp8_reasons(
    vllm_config: "VllmConfig", quest: QuestConfig, scheme: dict[str, Any]
) -> Iterator[str]:
    """What QUEST does not serve with an fp8 cache.

    `scheme` is the checkpoint's `kv_cache_scheme`; empty if it has none.
    """
    if scheme.get("strategy") == "attn_head":
        yield _PER_HEAD
    if quest.score == "codes":
        yield (
            "additional_config['quest']['score'] is 'codes', which an fp8 KV cache does not have; "
            "set --kv-cache-dtype bfloat16, or another score"
        )
    if vllm_config.cache_config.kv_cache_dtype_skip_layers:
        yield (
            "some layers are left out of the fp8 KV cache, and blocks of two sizes were not tried; "
            "remove --kv-cache-dtype-skip-layers, or set --kv-cache-dtype bfloat16"
        )
