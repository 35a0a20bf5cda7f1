"""A token budget per request: `SamplingParams(extra_args={"quest_token_budget": 1024})`.

vLLM hands a request's parameters to logits processors and to no one else, so this is one, though it
touches no logits: it records each request's budget by the slot that the request occupies. The
metadata builder looks the slots up.

The module is imported by every vLLM process, whether or not QUEST is selected: keep it light. vLLM
loads the class as `logits_processor.LogitsProcessor`.
"""

import difflib
import gc
import multiprocessing
import re
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from vllm_quest.config import LONGEST_SHOWN, UNLIMITED, engine_key, shown

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

# A name below vLLM's, so that its handlers and levels apply.
logger = init_logger("vllm.quest")

FIELD = "quest_token_budget"
PREFIX = "quest_"
SHORT = ("quest", "budget", "budgets")
"""Letters of fields that nothing reads, and that a user of QUEST may have meant for FIELD."""
LIKE = ("questtokenbudget", "tokenbudget")
"""Letters that those of other such fields are like, to CLOSE."""
CLOSE = 0.9
"""By `difflib`: one letter more or less. `max_token_budget`, which may be another's, is at 0.88."""
SERVER_DEFAULT = 0
"""Stands in the table for: this request asked for nothing."""


def requested_budget(extra_args: dict[str, Any] | None) -> int:
    """The token budget that a request asks for: tokens, UNLIMITED or SERVER_DEFAULT.

    Raises:
        ValueError: the value, or a key that begins with `quest_` in whatever spelling, is not one
            that QUEST knows.
    """
    if not extra_args:
        return SERVER_DEFAULT
    for key in extra_args:
        if key != FIELD and str(key).lower().replace("-", "_").startswith(PREFIX):
            raise ValueError(f"unknown field {shown(key)}; did you mean {FIELD!r}?")
    if FIELD not in extra_args:
        return SERVER_DEFAULT
    budget = extra_args[FIELD]
    is_integer = isinstance(budget, int) and not isinstance(budget, bool)
    if not is_integer or (budget < 1 and budget != UNLIMITED):
        raise ValueError(
            f"{FIELD} is {shown(budget)}; allowed: a positive number of tokens (integer), "
            "or -1 for full attention"
        )
    return min(int(budget), np.iinfo(np.int32).max)


def is_meant_for_us(key: object) -> bool:
    """Whether a field other than FIELD surely means it: in camel case, with a space or a letter too
    many, or without its prefix."""
    letters = re.sub("[^a-z]", "", str(key)[:LONGEST_SHOWN].lower())
    return letters in SHORT or bool(difflib.get_close_matches(letters, LIKE, cutoff=CLOSE))


def why_undelivered(vllm_config: "VllmConfig") -> str | None:
    """Why budgets of requests would not reach this engine's decode steps, and the cure; or None."""
    model, is_v2 = vllm_config.model_config, vllm_config.use_v2_model_runner
    is_hybrid = model is not None and model.is_hybrid
    speculates = vllm_config.speculative_config is not None
    is_pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1
    if speculates and not is_v2:
        # vllm/v1/sample/logits_processor/__init__.py, build_logitsprocs
        return (
            "vLLM's V1 model runner keeps it from plugins while speculating: "
            + ("" if is_hybrid or is_pipeline else "use the V2 runner, or ")
            + "remove --speculative-config"
        )
    if is_pipeline and is_v2 and not is_hybrid:
        # vllm/v1/worker/gpu/model_runner.py, add_requests: V2 tells the last rank, V1 all of them
        return (
            "vLLM's V2 model runner keeps it from all ranks of a pipeline but the last: use tensor "
            "parallelism" + ("" if speculates else ", or set VLLM_USE_V2_MODEL_RUNNER=0")
        )
    if is_hybrid and is_v2:
        # No `req_idx` in the batches of vllm/v1/worker/gpu/model_states/mamba_hybrid.py
        return (
            "vLLM's V2 model runner does not tell which request is which in hybrid models: set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
            + (", and remove --speculative-config" if speculates else "")
        )
    return None


class QuestBudgets(V2LogitsProcessor, V1LogitsProcessor):
    """Keeps `budget_by_slot`, `[max_num_seqs]` int32 in tokens, in step with vLLM's batch."""

    _tables: ClassVar[dict[int, np.ndarray]] = {}
    _engines: ClassVar[list[tuple["weakref.ref[VllmConfig]", str | None]]] = []
    """The engines of this process that use QUEST, and why they cannot have budgets, if so."""

    def __init__(self, vllm_config: "VllmConfig", *_: Any) -> None:
        slots = vllm_config.scheduler_config.max_num_seqs
        self.budget_by_slot = np.full(slots, SERVER_DEFAULT, dtype=np.int32)
        self._tables[engine_key(vllm_config)] = self.budget_by_slot

    @classmethod
    def table(cls, vllm_config: "VllmConfig") -> np.ndarray | None:
        """The budgets by slot of an engine; None if vLLM gave it no such processor."""
        return cls._tables.get(engine_key(vllm_config))

    @classmethod
    def note_engine(cls, vllm_config: "VllmConfig") -> None:
        """Remember an engine of this process that uses QUEST; warn if it cannot have budgets."""
        if multiprocessing.current_process().name.startswith("EngineCore"):
            return  # it checks its copy of the configuration anew; requests were checked before
        reason = why_undelivered(vllm_config)
        if any(reason_of_other is not None for _, reason_of_other in cls._engines):
            gc.collect()  # the configuration of a deleted engine lies in cycles
        others = [
            engine
            for engine in cls._engines
            if (other := engine[0]()) is not None and other is not vllm_config
        ]
        cls._engines = [*others, (weakref.ref(vllm_config), reason)]
        if reason is not None:
            logger.warning_once(
                "QUEST: all requests get the server's token budget, and those that ask for their "
                "own (%s) are refused: %s",
                FIELD,
                reason,
            )

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a bad budget when the request arrives: vLLM makes the ValueError its own
        VLLMValidationError, and over HTTP a status of 400.

        vLLM does not say which engine the request is for. One that cannot have budgets makes all
        engines of its process refuse them, for as long as its configuration is alive.
        """
        budget = requested_budget(sampling_params.extra_args)
        for vllm_config, reason in cls._engines:
            if vllm_config() is None:
                continue
            for key in sampling_params.extra_args or {}:
                if key != FIELD and is_meant_for_us(key):
                    raise ValueError(f"unknown field {shown(key)}; did you mean {FIELD!r}?")
            if reason is not None and budget != SERVER_DEFAULT:
                raise ValueError(f"{FIELD} cannot be served: {reason}; or leave the field out")

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """V2 runner: a request takes a slot."""
        self.budget_by_slot[req_idx] = requested_budget(sampling_params.extra_args)
        return False

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """V1 runner: requests leave, arrive and move, in this order."""
        if batch_update is None:
            return
        budgets = self.budget_by_slot
        budgets[list(batch_update.removed)] = SERVER_DEFAULT
        for slot, sampling_params, *_ in batch_update.added:
            budgets[slot] = requested_budget(sampling_params.extra_args)
        for source, target, direction in batch_update.moved:
            moved = budgets[source]
            budgets[source] = (
                budgets[target] if direction == MoveDirectionality.SWAP else SERVER_DEFAULT
            )
            budgets[target] = moved

    def is_argmax_invariant(self) -> bool:
        """Logits stay as they are."""
        return True

    def apply(self, logits: "torch.Tensor", ctx: Any = None) -> "torch.Tensor":
        """Logits stay as they are."""
        return logits
