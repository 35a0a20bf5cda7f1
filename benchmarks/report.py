"""One way to print a benchmark: what it ran on, then a table; and one way to keep it."""

import json
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, str]:
    """The processor or GPU and the versions that a result depends on."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
        name = f"{(names or [platform.machine()])[0].strip()}, {torch.get_num_threads()} threads"
    versions = {package: metadata.version(package) for package in ("vllm", "torch")}
    return {"device": name, **versions}


def print_machine() -> None:
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows that share their keys, as aligned columns."""
    header = list(rows[0])
    lines = [header, *([_cell(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def print_as_measured(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print each row as soon as it is there, then all of them as one table."""
    measured = []
    for row in rows:
        measured.append(row)
        print_table([row])
    print()
    print_table(measured)
    return measured


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return "-" if value is None else str(value)


def ratio(x: float | None, y: float | None) -> float | None:
    """x / y; None if either was not measured."""
    return None if x is None or y is None else x / y


def write_json(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Keep a result with the machine and the command that it came from, if it is to be kept."""
    if path is None:
        return
    command = " ".join(["python", *sys.argv])
    result = {"command": command, "machine": machine(), "rows": list(rows)}
    path.write_text(json.dumps(result, indent=1) + "\n")
