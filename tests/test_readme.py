"""The README's snippets run as they stand, with the bundled model in the reader's model's place."""

import re
from pathlib import Path

import pytest

from vllm_quest.metrics import HELP

README = (Path(__file__).parents[1] / "README.md").read_text()
MARK = "<!-- run by tests/test_readme.py -->\n```python\n"
SNIPPETS = [part.partition("```")[0] for part in README.split(MARK)[1:]]


def test_the_offline_snippet(demo_model, capsys):
    exec(SNIPPETS[0], names := {"MODEL": demo_model})
    exec(SNIPPETS[2], names)
    names["llm"].llm_engine.engine_core.shutdown()
    assert re.search(r"\d\d[^%]*0.0% of rows sparse\n100.0% of full", capsys.readouterr().out)


def test_the_metrics_table_is_complete():
    assert re.findall(r"^\| `(vllm:\w+)_total` \|", README, re.MULTILINE) == list(HELP)


def test_the_settings_table_is_complete():
    from vllm_quest.config import QuestConfig

    for name, value in vars(QuestConfig()).items():
        assert re.search(rf"^\| `{name}` \| {value} \|", README, re.MULTILINE)


def test_files_in_the_file_map_exist():
    root = Path(__file__).parents[1]
    for folder in re.findall(r"^(\w+)/ ", README.partition("## Where things are")[2], re.MULTILINE):
        assert (root / folder).is_dir(), folder


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(path):
    assert (Path(__file__).parents[1] / path).exists()
