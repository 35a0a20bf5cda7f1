"""The accuracy README's commands run as they stand, but for the model and the sizes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accuracy.cli import main
from vllm_quest.pass_keys import make_haystack

ROOT = Path(__file__).parents[1]
README = (ROOT / "benchmarks/accuracy/README.md").read_text()
MARK = "<!-- run by tests/test_accuracy_readme.py -->\n```\n"
COMMANDS = [part.partition("```")[0].strip() for part in README.split(MARK)[1:]]
REPORTS = [command for command in COMMANDS if command.startswith("python -m benchmarks.accuracy")]
LM_EVAL = [command for command in COMMANDS if command.startswith("lm_eval")]
SMALL = {"contexts": "512", "budgets": "64", "seeds": "1", "samples": "1"}


def shrink(command, demo_model, folder):
    """The command's arguments with the bundled model and small sizes."""
    text = folder / "text.txt"
    text.write_text(make_haystack(1024, 8, seed=0).text)
    values = SMALL | {"out": str(folder / "out"), "text": str(text), "longbench": str(folder)}
    _, _, _, _, *arguments = shlex.split(command)
    options = re.split(r" (?=--)", shlex.join(arguments))
    for number, option in enumerate(options):
        name = option.split()[0].removeprefix("--")
        if name in values:
            options[number] = f"--{name} {values[name]}"
    return [demo_model, *shlex.split(" ".join(options))]


@pytest.mark.parametrize("command", REPORTS, ids=lambda command: command.split(" --out ")[1][:18])
def test_a_command_makes_its_report(command, demo_model, tmp_path):
    arguments = shrink(command, demo_model, tmp_path)
    main([*arguments, "--methods", "full", "quest", "streaming"])
    report = (tmp_path / "out" / "report.md").read_text()
    if "longbench" in arguments:
        assert report.count("longbench_") == 6 and "does not read English" in report
    else:
        assert "| quest | " in report


OWN_SCORES = r"\|quest_passkey +\|.*\|right +\|↑ +\| +1\|"
RULER_SCORES = r"\|niah_multikey_3 *\|.*\| +1024\|(.|\n)*\|ruler_fwe *\|.*\| +1024\|"


@pytest.mark.parametrize(
    ("command", "scores"),
    list(zip(LM_EVAL, [OWN_SCORES, RULER_SCORES], strict=True)),
    ids=["own tasks", "RULER"],
)
def test_lm_eval_runs(command, scores, demo_model):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra 'eval')")
    for value, small in {
        '"MODEL"': f'"{demo_model}"',
        '"words": 8192': '"words": 512',
        '"samples": 32': '"samples": 2',
        "[4096]": "[1024]",
        "--limit 32": "--limit 2",
    }.items():
        command = command.replace(value, small)
    program = [str(Path(sys.executable).parent / "lm_eval"), *shlex.split(command)[1:]]
    run = subprocess.run(
        program,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(scores, run.stdout), run.stdout[-2000:]


def test_paper_and_commands_agree():
    """Every budget that the passkey tables name is in the command above them."""
    headers = re.findall(r"\| method \| paper: (.*) \| yours", README)
    for command, header in zip(REPORTS[:2], headers, strict=True):
        budgets = re.search(r"--budgets ([\d ]+)", command)
        assert header.replace(" |", "").split() == budgets.group(1).split()
