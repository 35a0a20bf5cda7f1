"""`python -m tests.fuzz`: draws engines and requests until the time is over, and reports.

A fault ends its engine, is made small, and the next engine follows.
"""

import argparse
import json
import math
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from engines import DENSE

from . import models
from .cases import Case, RequestCase, Wave
from .draw import DTYPES, draw_engine, draw_wave
from .models import MODELS
from .run import Outcome, compare_alone, run_case, run_wave, running
from .shrink import shrink

SHARE_ALONE = 0.25
"""Of an engine's time, for the same requests alone."""

GRACE_SECONDS = 20.0
"""What a wave may take beyond its engine's time before its requests are cancelled."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--engine-seconds", type=float, default=60.0, help="once it has started")
    parser.add_argument("--engine", type=int, help="this one of the seed's engines alone")
    parser.add_argument("--waves", type=int, help="so many waves for each engine")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--case", type=Path, help="repeat a case that was written")
    parser.add_argument(
        "--backend",
        default="QUEST",
        help="repeat the case with another attention backend, whose answers alone are compared: "
        f"a fault that {DENSE} has too is vLLM's",
    )
    parser.add_argument("--shrink-seconds", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--json", type=Path, help="write the totals there")
    return parser.parse_args(arguments)


def describe(case: Case) -> str:
    """An engine in one line."""
    engine, quest = case.engine, case.engine.quest
    options = {
        key: value for key, value in engine.options.items() if value not in (False, None, "fcfs")
    }
    return f"{engine.model} {engine.speculation} {quest} {options} {engine.environment}"


def run_engine(
    told: argparse.Namespace, index: int, seconds: float, folder: Path
) -> tuple[Case, Outcome]:
    """One engine of the seed for a time, or for a number of waves."""
    engine = draw_engine(told.seed, index, told.models, told.dtypes)
    num_waves = told.waves
    outcome, waves = Outcome(), []
    vocabulary = models.vocabulary(engine.model)
    try:
        with running(engine, folder) as llm:
            deadline = time.monotonic() + seconds * (1 - SHARE_ALONE)
            while not outcome.faults:
                is_over = time.monotonic() > deadline if num_waves is None else False
                if (waves and is_over) or len(waves) == num_waves:
                    break
                waves.append(draw_wave(told.seed, index, len(waves), engine))
                until = deadline + min(GRACE_SECONDS, seconds) if num_waves is None else math.inf
                outcome.add(run_wave(llm, waves[-1], vocabulary, until=until))
        if not outcome.faults:
            requests: list[RequestCase] = [each for wave in waves for each in wave.requests]
            share = SHARE_ALONE * seconds
            outcome.add(compare_alone(engine, requests, outcome, folder, share))
    except Exception:
        outcome.faults.append(traceback.format_exc()[-3000:])
    return Case(engine, tuple(waves or [Wave(())])), outcome


def report_failure(
    case: Case, outcome: Outcome, repeat: str, arguments: argparse.Namespace, folder: Path
) -> None:
    """Say how to repeat a failure, and make it small."""
    print("FAULT:", *outcome.faults[:5], sep="\n  ")
    print(f"repeat: {repeat}")
    if case.engine.options.get("enable_sleep_mode"):
        print("not made smaller: engines that sleep need a process each", flush=True)
        return
    if not arguments.shrink_seconds:
        return

    differs = any(", alone " in fault for fault in outcome.faults)
    alone_seconds = 20.0 if differs else 0.0

    def fails(smaller: Case) -> bool:
        return bool(run_case(smaller, folder, alone_seconds).faults)

    small = shrink(case, fails, arguments.shrink_seconds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    small.write(path)
    count = sum(len(wave.requests) for wave in small.waves)
    print(f"smallest ({count} requests): python -m tests.fuzz --case {path}", flush=True)
    if differs:
        dense = run_case(small, folder, alone_seconds, DENSE)
        print(f"with {DENSE} in QUEST's place:", *dense.faults[:2] or ["no fault"], flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Returns the number of engines with faults."""
    told = parse(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if told.case is not None:
            outcome = run_case(Case.read(told.case), folder, backend=told.backend)
            print(*outcome.faults or ["no fault"], sep="\n")
            return len(outcome.faults)
        total, num_engines, failures = Outcome(), 0, 0
        while True:
            index = num_engines if told.engine is None else told.engine
            left = told.minutes * 60 - (time.monotonic() - started)
            if (left < 5 and num_engines) or (told.engine is not None and num_engines):
                break
            begun = time.monotonic()
            seconds = min(told.engine_seconds, left)
            case, outcome = run_engine(told, index, seconds, folder)
            num_engines += 1
            took = time.monotonic() - begun
            rows = outcome.totals.rows
            print(
                f"engine {index}: {describe(case)}\n  {len(case.waves)} waves, {rows} rows "
                f"({outcome.totals.sparse_rows} sparse), {rows / took:.0f} rows/s, "
                f"{len(outcome.resumed)} resumed, {outcome.compared} compared, "
                f"{outcome.excused} near ties, {len(outcome.faults)} faults",
                flush=True,
            )
            if outcome.faults:
                failures += 1
                repeat = f"--seed {told.seed} --engine {index} --waves {len(case.waves)}"
                for name, every in (("models", list(MODELS)), ("dtypes", list(DTYPES))):
                    if getattr(told, name) != every:
                        repeat += f" --{name} " + " ".join(map(repr, getattr(told, name)))
                report_failure(case, outcome, f"python -m tests.fuzz {repeat}", told, folder)
            outcome.answers.clear()
            outcome.leads.clear()
            total.add(Outcome(outcome.totals, [], {}, {}, {}, *counts(outcome)))
            result = asdict(total.totals) | {
                "engines": num_engines,
                "engines_with_faults": failures,
                "tokens": total.tokens,
                "answers_compared_with_those_alone": total.compared,
                "near_ties": total.excused,
                "seconds": round(time.monotonic() - started),
            }
            if told.json is not None:
                told.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return failures


def counts(outcome: Outcome) -> tuple[int, int, int]:
    """Its numbers beside the totals."""
    return outcome.compared, outcome.excused, outcome.tokens
