"""Registration: makes QUEST a name that vLLM knows, in every process that vLLM starts.

vLLM calls `register` through the entry-point group `vllm.general_plugins`. With QUEST registered
but not selected, vLLM behaves as without this package, also where this package is broken.
"""

import functools
import logging
import multiprocessing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

NAME = "QUEST"
BACKEND_PATH = "vllm_quest.backend.QuestBackend"

# A name below vLLM's, so that its handlers and levels apply.
logger = logging.getLogger("vllm.quest")


def register() -> None:
    """Add the backend QUEST to vLLM. Safe to call again.

    vLLM would not survive an exception here, nor would servers that do not use QUEST. So a failure
    is logged, and leaves QUEST a name that vLLM refuses.
    """
    try:
        _register()
    except Exception as error:
        logger.error(
            "QUEST is not available, since its plugin failed: %r. Reinstall vllm-quest with a "
            "vLLM that it supports. Other backends work.",
            error,
        )


def _register() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME in AttentionBackendEnum.__members__:
        return
    wrap_platform = _platform_wraps()
    register_backend(NAME, BACKEND_PATH)
    _make_picklable(AttentionBackendEnum[NAME])
    wrap_platform()


def load_member() -> "AttentionBackendEnum":
    """Return `AttentionBackendEnum.QUEST`, registering it first where that has not happened."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[NAME]


def is_selected(vllm_config: "VllmConfig") -> bool:
    """Whether the full-attention layers, where alone pages are chosen, are to use QUEST."""
    attention = vllm_config.attention_config
    return _is_quest(attention.backend_per_kind.get("full_attention", attention.backend))


def is_named(vllm_config: "VllmConfig") -> bool:
    """Whether any option names QUEST: for layers of some kind, or for the draft model."""
    attention, speculation = vllm_config.attention_config, vllm_config.speculative_config
    draft_backend = None if speculation is None else speculation.attention_backend
    chosen = [attention.backend, draft_backend, *attention.backend_per_kind.values()]
    return any(map(_is_quest, chosen))


def has_idle_settings(vllm_config: "VllmConfig") -> bool:
    """Whether a configuration that does not name QUEST has settings of it.

    No in engine processes, so that it is said once, in the user's own. No where vLLM speculates:
    the draft model has a configuration of its own, which keeps the settings and may not name QUEST.
    """
    if multiprocessing.current_process().name.startswith("EngineCore"):
        return False
    settings = vllm_config.additional_config
    is_draft = vllm_config.speculative_config is not None
    if is_draft or not isinstance(settings, dict):
        return False
    return any(str(key).lower() == NAME.lower() for key in settings)


def _is_quest(backend: "AttentionBackendEnum | None") -> bool:
    return backend is not None and backend.name == NAME


def _make_picklable(member: "AttentionBackendEnum") -> None:
    """Let spawned processes unpickle the member before they have loaded plugins.

    vLLM pickles its configuration into children; enum members pickle by value, and the stock enum
    of a fresh process has no such value. This one is pickled as a call of `load_member`.
    """

    def reduce(protocol: int) -> tuple[Any, tuple[()]]:
        return load_member, ()

    member.__reduce_ex__ = reduce


def _platform_wraps() -> Callable[[], None]:
    """What teaches the platform two things, for configurations that select QUEST only.

    * `check_and_update_config` refuses what QUEST cannot serve and prepares the rest, in the user's
      own process, before any other is started.
    * `get_attn_backend_cls` lets draft models that QUEST cannot serve have another backend; and
      on CPUs it honours the name, where vLLM's own answers CPU_ATTN whatever was asked
      (`vllm/platforms/cpu.py`).
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check_config = platform.check_and_update_config
    get_backend = platform.get_attn_backend_cls

    @functools.wraps(check_config)
    def check_and_update_config(vllm_config: "VllmConfig") -> None:
        check_config(vllm_config)
        if is_selected(vllm_config):
            _prepare(vllm_config)
        elif is_named(vllm_config):
            raise ValueError(
                "QUEST is named, but not for the model's full-attention layers, where alone it "
                "chooses pages: set --attention-backend QUEST, or leave it out of "
                "--attention-config and --speculative-config"
            )
        elif has_idle_settings(vllm_config):
            logger.warning(
                "additional_config has settings of QUEST, and QUEST is not chosen: attention is "
                "dense. Set --attention-backend QUEST, or leave them out."
            )

    @functools.wraps(get_backend)
    def get_attn_backend_cls(
        selected_backend: Any, attn_selector_config: Any, *more: Any, **named: Any
    ) -> Any:
        if _is_quest(selected_backend):
            from vllm_quest.support import serves_layer

            if not serves_layer(attn_selector_config):
                selected_backend = None
            elif current_platform.is_cpu():
                return BACKEND_PATH
        return get_backend(selected_backend, attn_selector_config, *more, **named)

    def wrap() -> None:
        platform.check_and_update_config = staticmethod(check_and_update_config)
        platform.get_attn_backend_cls = staticmethod(get_attn_backend_cls)

    return wrap


def _prepare(vllm_config: "VllmConfig") -> None:
    """Refuse or prepare a configuration that selects QUEST.

    Raises:
        ValueError: QUEST cannot serve it (see `support`), or this package is broken.
    """
    try:
        from vllm_quest.selected import prepare
    except Exception as error:
        raise ValueError(f"QUEST cannot be used: {error!r}; reinstall vllm-quest") from error
    prepare(vllm_config)
