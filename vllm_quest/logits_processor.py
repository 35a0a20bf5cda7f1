"""The class that vLLM loads into each of its processes, whether or not QUEST is selected.

vLLM stops where such a class does not import. So there is one in any case: `budgets.QuestBudgets`,
or where that is broken one that does nothing. Whoever selects QUEST is told before (`selected`).
"""

import contextlib
import importlib
import logging
from typing import Any

INTERFACES = (
    "vllm.v1.worker.gpu.sample.logits_processor",
    "vllm.v1.sample.logits_processor",
)
"""Of the V2 and the V1 model runner."""


def _load() -> type:
    try:
        from vllm_quest.budgets import QuestBudgets
    except Exception as error:
        logging.getLogger("vllm.quest").error(
            "QUEST is not available, since its token budgets do not load: %r. Reinstall vllm-quest "
            "with a vLLM that it supports. Other backends work.",
            error,
        )
        return _bystander()
    return QuestBudgets


def _bystander() -> type:
    """A logits processor that does nothing, for the model runners that this vLLM has."""
    interfaces = []
    for module in INTERFACES:
        with contextlib.suppress(Exception):
            interfaces.append(importlib.import_module(module).LogitsProcessor)

    def apply(self: Any, logits: Any, *_: Any) -> Any:
        return logits

    does_nothing = {
        "__init__": lambda self, *_: None,
        "apply": apply,
        "is_argmax_invariant": lambda self: True,
        "update_state": lambda self, *_: None,
        "add_request": lambda self, *_: False,
    }
    return type("Bystander", tuple(interfaces), does_nothing)


LogitsProcessor = _load()
