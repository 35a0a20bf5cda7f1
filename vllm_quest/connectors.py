"""KV connectors: which of vLLM's carry QUEST's blocks whole, and which do not.

Bounds are rows of a block (`kv_page`), so whatever moves whole blocks moves them. A connector is
allowed where it does so and where nobody with other settings can read what it stored. Each one
stands here with its reason; a connector that stands nowhere is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

NIXL_MODULE = "vllm_quest.nixl"
"""Where NIXL's connectors are taken from, in place of vLLM's own module (see there)."""

NIXL = ("NixlConnector", "NixlPullConnector")
OFFLOADING = ("OffloadingConnector", "SimpleCPUOffloadConnector")
MULTI = "MultiConnector"

WHOLE_BLOCKS = {
    "OffloadingConnector": "it copies page_size_bytes of each block and layer, all of the block's "
    "rows, to host memory that ends with the engine",
    "SimpleCPUOffloadConnector": "it copies the bytes between a block and the next, to host memory "
    "or a file that end with the engine",
    **dict.fromkeys(
        NIXL,
        "it registers page_size_bytes of each block and layer; engines compare their settings "
        "before they hand each other blocks (nixl.py)",
    ),
    MULTI: "it hands blocks to the connectors that it lists, and each of them is looked up here",
}
"""The connectors that are allowed, and why bounds arrive with their keys."""

REFUSED = {
    "ExampleConnector": "it copies the slots of tokens alone, without bounds",
    "ExampleHiddenStatesConnector": "it is not known to carry bounds",
    "DecodeBenchConnector": "it fills blocks with made-up values; bounds would not be the keys'",
    "LMCacheConnectorV1": "LMCache takes the rows of a block for its tokens, and bounds are rows",
    "LMCacheMPConnector": "LMCache takes the rows of a block for its tokens, and bounds are rows",
    "MooncakeConnector": "it compares the sizes of blocks but not what they hold, so that engines "
    "with other settings would go unnoticed",
    "MooncakeStoreConnector": "its store outlives the engine, and its keys do not tell page sizes "
    "and scores apart",
    "NixlPushConnector": "nobody tried it with bounds",
    "FlexKVConnectorV1": "it is not known to carry bounds",
    "HF3FSKVConnector": "its files outlive the engine, and their names do not tell page sizes and "
    "scores apart",
    "HiSparseConnector": "it is for models with MLA",
    "MoRIIOConnector": "it is for AMD GPUs",
}
"""vLLM's other connectors, and why they are refused."""

OFFLOADING_SPECS = {"CPUOffloadingSpec": ("cuda",)}
"""Where the OffloadingConnector may put blocks, and on which devices vLLM does so. Tiers behind
host memory (TieringOffloadingSpec) outlive the engine, and their keys do not tell scores apart."""


@dataclass(frozen=True)
class Connector:
    """A connector that a configuration names, by itself or in a MultiConnector's list."""

    name: str
    module: str | None
    """Where its class comes from, if not from vLLM's registry."""

    settings: Mapping[str, Any]
    """Its `kv_connector_extra_config`."""


def reasons(vllm_config: "VllmConfig", device: str) -> Iterator[str]:
    """Why QUEST cannot have its KV cache moved as configured, and the cure; nothing if it can."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    connectors = list(configured(vllm_config.kv_transfer_config))
    if cache.kv_offloading_size is not None:
        # vLLM names the connector later (VllmConfig._post_init_kv_transfer_config).
        if cache.kv_offloading_backend != "native":
            yield (
                f"--kv-offloading-backend is {cache.kv_offloading_backend}, and "
                f"{REFUSED['LMCacheMPConnector']}; set it to native"
            )
        elif device != "cuda":
            yield "vLLM offloads the KV cache of GPUs alone; remove --kv-offloading-size"
    is_hybrid = model is not None and model.is_hybrid
    if is_hybrid and (connectors or cache.kv_offloading_size is not None):
        yield (
            "moving the KV cache was not tried with hybrid models; remove --kv-transfer-config and "
            "--kv-offloading-size"
        )
        return
    for connector in connectors:
        yield from _connector_reasons(connector, device)


def cure(device: str) -> str:
    """What to do where a connector is refused; it names connectors that the device has."""
    allowed = NIXL if device == "cpu" else (*OFFLOADING, *NIXL)
    return f"remove --kv-transfer-config, or name one of {', '.join(allowed)}"


def configured(transfer: "KVTransferConfig | None") -> Iterator[Connector]:
    """The connectors of a configuration, each once, those of a MultiConnector's list included."""
    if transfer is None or not transfer.is_kv_transfer_instance:
        return
    settings = transfer.kv_connector_extra_config
    yield Connector(transfer.kv_connector, transfer.kv_connector_module_path, settings)
    if transfer.kv_connector == MULTI:
        for entry in settings.get("connectors", []):
            yield Connector(
                entry.get("kv_connector"),
                entry.get("kv_connector_module_path"),
                entry.get("kv_connector_extra_config", {}),
            )


def _connector_reasons(connector: Connector, device: str) -> Iterator[str]:
    name, settings = connector.name, connector.settings
    if connector.module not in (None, NIXL_MODULE):
        name = f"{name} of {connector.module}"
        yield f"the KV connector {name} is not known to carry bounds; {cure(device)}"
    elif name in REFUSED:
        yield f"the KV connector {name} is refused: {REFUSED[name]}; {cure(device)}"
    elif name not in WHOLE_BLOCKS:
        yield f"the KV connector {name} is not known to carry bounds; {cure(device)}"
    elif name == "OffloadingConnector":
        yield from _offloading_reasons(settings, device)
    elif name in OFFLOADING and device != "cuda":
        yield f"vLLM offloads the KV cache of GPUs alone; {cure(device)}"
    elif name in NIXL and not settings.get("enforce_handshake_compat", True):
        yield (
            f"enforce_handshake_compat of the {name} is false, and engines with other blocks "
            "would go unnoticed; remove it from kv_connector_extra_config"
        )


def _offloading_reasons(settings: Mapping[str, Any], device: str) -> Iterator[str]:
    spec = settings.get("spec_name", "CPUOffloadingSpec")
    if spec not in OFFLOADING_SPECS:
        yield (
            f"spec_name of the OffloadingConnector is {spec}, which is not known to keep bounds "
            "and settings together; set it to CPUOffloadingSpec"
        )
    elif device not in OFFLOADING_SPECS[spec]:
        yield f"vLLM offloads the KV cache of GPUs alone; {cure(device)}"
    if settings.get("canonical_layout"):
        yield (
            "canonical_layout of the OffloadingConnector has no room for bounds; remove it from "
            "kv_connector_extra_config"
        )


def prepare(transfer: "KVTransferConfig | None") -> None:
    """Let NIXL's connectors compare QUEST's settings. Safe to call again."""
    if transfer is None:
        return
    if transfer.kv_connector in NIXL:
        transfer.kv_connector_module_path = NIXL_MODULE
    elif transfer.kv_connector == MULTI:
        for entry in transfer.kv_connector_extra_config.get("connectors", []):
            if entry.get("kv_connector") in NIXL:
                entry["kv_connector_module_path"] = NIXL_MODULE
