"""Puts the checker in a worker's way, takes it away, and brings what it found."""

import contextlib
import functools
from dataclasses import asdict
from typing import Any
from unittest import mock

from torch import Tensor

from vllm_quest import ops
from vllm_quest.config import QuestConfig
from vllm_quest.impl import QuestImpl
from vllm_quest.metadata import QuestMetadata, QuestMetadataBuilder

from .checker import REAL, Checker, Totals


def start_checks(worker: Any) -> None:
    """Check every step of a worker from now on."""
    runner = worker.model_runner
    checker = Checker(runner, QuestConfig.from_vllm(worker.vllm_config))
    patches = contextlib.ExitStack()
    worker.checker, worker.patches = checker, patches
    build, forward = QuestMetadataBuilder.build, QuestImpl.forward
    execute = runner.execute_model

    def checked_build(builder: Any, *args: Any, **named: Any) -> QuestMetadata:
        metadata = build(builder, *args, **named)
        if checker.in_step and builder.planner is not None:
            checker.plan(builder, metadata)
        return metadata

    def checked_forward(impl: Any, layer: Any, *args: Any, **named: Any) -> Tensor:
        real = functools.partial(forward, impl)
        return checker.forward(real, layer, *args, **named)

    def checked_execute(*args: Any, **named: Any) -> Any:
        return checker.step(execute, *args, **named)

    # What `select` chose is checked where it is attended to.
    operators = {name: getattr(checker, name) for name in REAL if name != "select"}
    patches.enter_context(mock.patch.multiple(ops, **operators))
    patches.enter_context(mock.patch.object(QuestMetadataBuilder, "build", checked_build))
    patches.enter_context(mock.patch.object(QuestImpl, "forward", checked_forward))
    patches.enter_context(mock.patch.object(runner, "execute_model", checked_execute))
    if hasattr(runner, "prepare_inputs"):  # the V2 runner
        prepare = runner.prepare_inputs

        def noted_prepare(*args: Any, **named: Any) -> Any:
            batch = prepare(*args, **named)
            checker.order = list(batch.req_ids)
            return batch

        patches.enter_context(mock.patch.object(runner, "prepare_inputs", noted_prepare))


def stop_checks(worker: Any) -> None:
    """Leave the process as it was."""
    worker.patches.close()


def take_report(worker: Any) -> dict[str, Any]:
    """What was checked and found since the last report."""
    checker = worker.checker
    report = {
        "totals": asdict(checker.totals),
        "faults": checker.faults,
        "leads": checker.leads,
        "resumed": checker.ledger.resumed,
    }
    checker.totals, checker.faults, checker.leads = Totals(), [], {}
    checker.ledger.resumed = {}
    return report
