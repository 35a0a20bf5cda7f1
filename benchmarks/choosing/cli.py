"""The command `python -m benchmarks.choosing`."""

import argparse
import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.choosing import report
from benchmarks.choosing.attention import Model
from benchmarks.choosing.measure import measure_window
from benchmarks.choosing.methods import BASELINE, METHODS, Method
from benchmarks.choosing.samples import Samples
from benchmarks.help import DefaultsThatSay


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choosing",
        description="Compare choices of pages on a real model: how often its most probable token "
        "stays full attention's, and how many hidden facts it finds. A run that was stopped goes "
        "on after its last finished window.",
        epilog="methods: " + "; ".join(method.name for method in METHODS),
        formatter_class=DefaultsThatSay,
    )
    add = parser.add_argument
    add("model", help="a folder in --checkpoints, a path, or a name of the hub")
    add("--out", type=Path, required=True, help="folder for the report; made if missing")
    add("--checkpoints", type=Path, help="folder of checkpoints, and of text.txt")
    add("--text", type=Path, help="text file; default: text.txt of --checkpoints")
    add("--context", type=int, default=16_384, metavar="TOKENS", help="length of a window")
    add("--steps", type=int, default=256, help="tokens at a window's end that are decoded")
    add("--windows", type=int, default=6, help="spread evenly over the text")
    add("--facts", type=int, default=32, help="codes hidden in a window's text")
    add("--questions", type=int, default=16, help="facts of a window that are asked for")
    add(
        "--budgets",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 2048],
        metavar="TOKENS",
        help="what a choice may read",
    )
    add("--dense-layers", type=int, default=2, help="layers at the front that attend in full")
    add("--methods", nargs="+", metavar="METHOD", help="default: all; see below")
    add("--minutes", type=float, help="begin no window that would end later than this")
    add("--device", default="cuda" if on_gpu else "cpu", help="torch's name of it")
    add("--dtype", default="bfloat16" if on_gpu else "float32", help="of the model")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure window after window; the report is written after each."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    began = time.monotonic()
    folder = _model_folder(options.model, options.checkpoints)
    samples = Samples(
        folder,
        _text(options),
        context_tokens=options.context,
        steps=options.steps,
        num_windows=options.windows,
    )
    methods = _methods(options.methods)
    cells = [(method, budget) for method in methods for budget in options.budgets]
    settings = _settings(options, methods)
    options.out.mkdir(parents=True, exist_ok=True)
    store = report.Store(options.out / "windows.jsonl", settings)
    unfinished = [number for number in range(options.windows) if number not in store.windows]
    if unfinished:
        model = Model(
            folder, dense_layers=options.dense_layers, device=options.device, dtype=options.dtype
        )
    longest = 0.0
    with tqdm(total=len(unfinished) * (len(cells) + 2), unit="pass") as progress:
        for number in unfinished:
            start = time.monotonic()
            if options.minutes and start + longest - began > 60 * options.minutes:
                break
            progress.set_description(f"window {number}")
            outcomes = measure_window(
                model,
                samples.window(number),
                samples.facts(number, options.facts, options.questions),
                cells,
                progress.update,
            )
            store.add(number, outcomes)
            longest = max(longest, time.monotonic() - start)
            _write(options.out, store, arguments, options.device, settings)
    if store.windows:
        _write(options.out, store, arguments, options.device, settings)
        print((options.out / "report.md").read_text())


def _write(
    folder: Path, store: report.Store, arguments: list[str], device: str, settings: dict[str, Any]
) -> None:
    command = shlex.join(["python", "-m", "benchmarks.choosing", *arguments])
    report.write(folder, store=store, command=command, machine=_machine(device), settings=settings)


def _model_folder(model: str, checkpoints: Path | None) -> str:
    if checkpoints is not None and (checkpoints / model).is_dir():
        return str(checkpoints / model)
    return model


def _text(options: argparse.Namespace) -> Path:
    if options.text is None and options.checkpoints is None:
        raise SystemExit("no text to read: give one with --text FILE or --checkpoints DIR")
    text: Path = options.text or options.checkpoints / "text.txt"
    return text


def _methods(names: list[str] | None) -> list[Method]:
    """Those named, and the baseline first."""
    known = {method.name: method for method in METHODS}
    for name in names or []:
        if name not in known:
            raise SystemExit(f"unknown method {name!r}; known: {'; '.join(known)}")
    return [m for m in METHODS if names is None or m.name in names or m is BASELINE]


def _settings(options: argparse.Namespace, methods: list[Method]) -> dict[str, Any]:
    """What the numbers depend on."""
    names = ("context", "steps", "windows", "facts", "questions", "budgets", "dense_layers")
    return {
        "model": Path(options.model).name,
        "text": _text(options).name,
        "dtype": options.dtype,
        "methods": [method.name for method in methods],
        **{name: getattr(options, name) for name in names},
    }


def _machine(device: str) -> str:
    is_gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if is_gpu else f"CPU ({platform.machine()})"
    versions = (f"{package} {metadata.version(package)}" for package in ("torch", "transformers"))
    return ", ".join((name, *versions))
