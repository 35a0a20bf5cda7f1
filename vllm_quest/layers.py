"""A model's attention layers: which QUEST attends in, and their numbers."""

from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

FULL_ATTENTION = ("full_attention", "attention", "hybrid")
"""How a model's configuration calls such layers: most families, then those of Mamba (Nemotron-H,
Granite 4), then Zamba2."""

LAYER_KINDS = ("layer_types", "layers_block_type")
"""Where a model's configuration lists the kinds of its layers."""


def is_full_attention(layer: Any) -> bool:
    """Whether a layer attends to its whole context, so that QUEST may choose among its pages."""
    return (
        isinstance(layer, Attention)
        and layer.sliding_window is None
        and not isinstance(layer, ChunkedLocalAttention)
    )


def layer_numbers(vllm_config: VllmConfig) -> dict[str, int]:
    """The numbers of the full-attention layers in this process, by name, from 0 at the front.

    A number is the layer's place among the model's full-attention layers, in the order in which the
    model makes them: names differ from family to family (`model.layers.3.self_attn.attn`,
    `transformer.h.3.attn`), and hybrids have layers of other kinds between them. Layers of a draft
    model come after those of the model that it drafts for.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    names = [name for name, layer in layers.items() if is_full_attention(layer)]
    first = _on_earlier_ranks(vllm_config)
    return {name: first + i for i, name in enumerate(names)}


def dense_layer_names(vllm_config: VllmConfig, dense_layers: int) -> frozenset[str]:
    """The layers in this process that always attend in full: the model's first `dense_layers`."""
    numbers = layer_numbers(vllm_config)
    return frozenset(name for name, number in numbers.items() if number < dense_layers)


def why_nothing_is_sparse(vllm_config: VllmConfig, dense_layers: int) -> str | None:
    """Why no layer of the model ever chooses pages, and what to do about it; None if one may."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return None  # other ranks have other layers
    numbers = layer_numbers(vllm_config).values()
    if not numbers:
        return (
            "no layer of this model attends to its whole context, so that QUEST changes nothing: "
            "leave --attention-backend out"
        )
    if max(numbers) < dense_layers:
        return (
            f"additional_config['quest']['dense_layers'] is {dense_layers}, and this model has "
            f"{max(numbers) + 1} full-attention layers: all of them attend in full; set a lower "
            "number"
        )
    return None


def _on_earlier_ranks(vllm_config: VllmConfig) -> int:
    """Full-attention layers that pipeline parallelism put on the ranks before this one."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.pipeline_parallel_size == 1:
        return 0
    start, _ = model.get_layers_start_end_indices(parallel)
    for listing in LAYER_KINDS:
        if kinds := getattr(model.hf_text_config, listing, None):
            return sum(kind in FULL_ATTENTION for kind in kinds[:start])
    return int(start)
