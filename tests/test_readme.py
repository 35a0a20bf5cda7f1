"""Snippets of the README and of docs/ run as they stand, with the bundled model as the reader's.

Their settings, counters, folders and links are those of the code.
"""

import re
from pathlib import Path

import pytest

from vllm_quest.metrics import HELP

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OBSERVABILITY = (ROOT / "docs" / "observability.md").read_text()
WITH_LINKS = [
    *(ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "results" / "README.md",
]
MARK = "<!-- run by tests/test_readme.py -->\n```python\n"


def snippets(text: str) -> list[str]:
    return [part.partition("```")[0] for part in text.split(MARK)[1:]]


SNIPPETS = snippets(README)
"""The offline one, and one that asks a server (tests/test_server.py)."""


def test_the_offline_snippet(demo_model, capsys):
    exec(SNIPPETS[0], names := {"MODEL": demo_model})
    [stats] = snippets(OBSERVABILITY)
    exec(stats, names)
    names["llm"].llm_engine.engine_core.shutdown()
    assert re.search(r"\d\d[^%]*0.0% of rows sparse\n100.0% of full", capsys.readouterr().out)


def test_the_metrics_table_is_complete():
    assert re.findall(r"^\| `(vllm:\w+)_total` \|", OBSERVABILITY, re.MULTILINE) == list(HELP)


def test_the_settings_table_is_complete():
    from vllm_quest.config import QuestConfig

    for name, value in vars(QuestConfig()).items():
        assert re.search(rf"^\| `{name}` \| {value} \|", README, re.MULTILINE)


def test_files_in_the_file_map_exist():
    folders = re.findall(r"^(\w+)/ ", README.partition("## Where things are")[2], re.MULTILINE)
    assert folders
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.parametrize("document", WITH_LINKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", document.read_text()):
        path, _, heading = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), target
        assert not heading or heading in headings(linked.read_text()), target


def headings(markdown: str) -> list[str]:
    """A document's headings as GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
