"""The command `python -m benchmarks.accuracy`."""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.help import DefaultsThatSay

BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
CONTEXTS = (4096, 16_384, 32_768)
CROSS_CHECKS = ("full-hf", "quest-hf")
"""Methods that a report measures in vLLM already."""

TASKS = ("passkey", "key_value", "multi_query", "variable_tracking", "perplexity")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="Measure what a token budget costs a model in accuracy, method by method. "
        "A run that was stopped goes on where it was when it is started again.",
        formatter_class=DefaultsThatSay,
    )
    add = parser.add_argument
    add("model", help="path or name of the model")
    add("--out", type=Path, required=True, help="folder for the report; made if missing")
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="or 'longbench': all six")
    add("--methods", nargs="+", metavar="METHOD", help="default: all but the cross-checks")
    tokens = {"nargs": "+", "type": int, "metavar": "TOKENS"}
    of_budgets = "what methods may read or keep of a context"
    add("--budgets", **tokens, default=list(BUDGETS), help=of_budgets)
    add("--contexts", **tokens, default=list(CONTEXTS), help="lengths of the prompts")
    of_layers = "layers at the front that attend in full; each number is measured"
    add("--dense-layers", nargs="+", type=int, default=[2], metavar="LAYERS", help=of_layers)
    add("--scores", nargs="+", default=["minmax"], metavar="SCORE", help="QUEST's page scores")
    add("--seeds", type=int, default=3, help="sets of samples")
    add("--samples", type=int, default=32, help="samples per seed")
    add(
        "--processes",
        type=int,
        default=1,
        help="how many run side by side, each with parts of the grid and a share of the memory: "
        "for small models, which leave most of a machine idle",
    )
    add("--report-only", action="store_true", help="measure nothing, report what is finished")
    add("--language", choices=("demo", "english"), help="default: told by the tokenizer")
    add(
        "--filler",
        choices=("sentences", "words", "text"),
        default="sentences",
        help="what lies between the facts: prose, words in random order, or lines of --text",
    )
    add("--text", type=Path, help="text file, for perplexity and as filler")
    add(
        "--scored-tokens",
        type=int,
        default=256,
        help="tokens at a window's end that are fed one by one and scored; -1: all but the first",
    )
    add(
        "--agree-with",
        type=Path,
        metavar="DIR",
        help="folder of a run with the same samples, whose full attention's most probable tokens "
        "these are compared with: of one with another KV cache dtype or backend, say",
    )
    add("--longbench", type=Path, help="folder with LongBench's jsonl files")
    add(
        "--engine-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM, such as '{\"tensor_parallel_size\": 2}', or settings "
        'of QUEST: \'{"additional_config": {"quest": {"page_size": 8}}}\'',
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure, then write the report."""
    # Methods are swapped in the process that runs the model: here.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)

    from benchmarks.accuracy import report, side_by_side
    from benchmarks.accuracy.cells import Store
    from benchmarks.accuracy.measure import Measurement
    from benchmarks.accuracy.tokens import Tokens
    from benchmarks.report import machine

    tokens = Tokens(options.model)
    plan = _plan(options, tokens)
    options.out.mkdir(parents=True, exist_ok=True)
    store = Store(options.out / "cells.jsonl", plan.sample_settings())
    this_machine = ", ".join(f"{key}: {value}" for key, value in machine().items())
    measurement = Measurement(plan, store, tokens, this_machine)
    measurement.make_samples()
    command = [argument for argument in arguments if argument != "--report-only"]

    def write_report() -> None:
        report.write(
            options.out,
            results=store.results(plan.all_cells()),
            scores=plan.scores,
            skipped=measurement.skipped.reasons | measurement.reasons_unfinished(),
            command=shlex.join(["python", "-m", "benchmarks.accuracy", *command]),
            settings=plan.sample_settings(),
            agree_with=options.agree_with,
        )

    try:
        with _exit_on_sigterm():
            if options.processes > 1 and not options.report_only:
                side_by_side.measure(measurement, options.processes, finished_cells=write_report)
            elif not options.report_only:
                measurement.run(finished_cells=write_report)
    finally:
        for what, reason in measurement.reasons_unfinished().items():
            measurement.skipped.add(what, reason)
        results = store.results(plan.all_cells())
        _draw(options.out, results, plan.scores, measurement.skipped)
        write_report()
    print((options.out / "report.md").read_text())


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, which `timeout` and schedulers send, end the run with its report."""

    def end(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _draw(folder: Path, results: Any, scores: Any, skipped: Any) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        skipped.add("plots", "matplotlib is not installed: pip install 'vllm-quest[eval]'")
    elif results:
        from benchmarks.accuracy import plots

        plots.write(folder, results, scores)


def _plan(options: argparse.Namespace, tokens: Any) -> Any:
    """A plan from the options; leaves with one line if they name what does not exist."""
    from benchmarks.accuracy.measure import VLLM_METHODS, transformers_methods
    from benchmarks.accuracy.plan import Plan
    from benchmarks.accuracy.tasks import ALL
    from vllm_quest.config import SCORES

    known_methods = (*VLLM_METHODS, *transformers_methods())
    for name, numbers, least in (
        ("--budgets", options.budgets, 1),
        ("--contexts", options.contexts, 1),
        ("--dense-layers", options.dense_layers, 0),
        ("--seeds", [options.seeds], 1),
        ("--samples", [options.samples], 1),
        ("--processes", [options.processes], 1),
    ):
        if min(numbers) < least:
            raise SystemExit(f"{name} is {min(numbers)}; it takes at least {least}")
    _check("score", options.scores, SCORES)
    if options.filler == "text" and options.text is None:
        raise SystemExit("--filler text needs a text: give one with --text FILE")
    tasks = []
    for name in options.tasks:
        tasks += [t for t in ALL if t.startswith("longbench")] if name == "longbench" else [name]
    _check("task", tasks, tuple(ALL))
    methods = tuple(options.methods or (m for m in known_methods if m not in CROSS_CHECKS))
    _check("method", methods, known_methods)
    return Plan(
        model=options.model,
        tasks=tuple(tasks),
        methods=methods,
        budgets=tuple(options.budgets),
        contexts=tuple(options.contexts),
        dense_layers=tuple(options.dense_layers),
        scores=tuple(options.scores),
        seeds=options.seeds,
        samples=options.samples,
        language=options.language or tokens.language(),
        filler=options.filler,
        text=options.text,
        scored_tokens=options.scored_tokens,
        longbench=options.longbench,
        engine_args=options.engine_args,
    )


def _check(kind: str, names: Any, known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise SystemExit(f"unknown {kind} {name!r}; known: {', '.join(known)}")
