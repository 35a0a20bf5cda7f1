"""Every table of README.md and docs/*.md is what its JSON under benchmarks/results/ says."""

import json
import re

import pytest

from benchmarks.tables import (
    DOCUMENTS,
    FULL,
    MARKED,
    RENDERERS,
    ROOT,
    accuracy,
    markdown,
    render,
    scaling,
    served_in_fp8,
)

TABLE = re.compile(r"(?:^|\n)([^|\n][^\n]*|)\n((?:\|[^\n]*\n)+)")
"""A table, with the line above it."""

CHECKED_BY = {
    "| setting | default | meaning |": "test_readme.py",
    "| counter | counts |": "test_readme.py",
    "| family |": "test_families.py",
    "| connector |": "test_refusals.py",
    "| what | for example | cure |": "test_refusals.py",
    "| try | answer | test |": "test_bad_input.py",
}
"""Tables that hold no measurement, by how their heads begin, and the test that holds them."""

document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@document
def test_tables_are_what_their_json_says(document):
    """If it fails: `python -m benchmarks.tables`, and read the difference."""
    text = document.read_text()
    assert render(text) == text


@document
def test_every_table_has_a_json(document):
    for above, table in TABLE.findall(document.read_text()):
        test = next((test for head, test in CHECKED_BY.items() if table.startswith(head)), None)
        if test is not None:
            assert above == f"<!-- checked by tests/{test} -->"
        else:
            assert above.startswith("<!-- table: "), f"no JSON for the table\n{table}"


def test_measured_documents_have_tables():
    """The pattern of the test above finds tables at all."""
    tables = {path.name: len(TABLE.findall(path.read_text())) for path in DOCUMENTS}
    assert tables["README.md"] == 3
    assert tables["speed.md"] > 5
    assert tables["accuracy.md"] > 5


@document
def test_a_changed_number_is_found(document):
    text = document.read_text()
    for marked in MARKED.finditer(text):
        *_, number = re.finditer(r"\d+", marked["table"])
        start = marked.start("table")
        changed = f"{text[: start + number.start()]}7777{text[start + number.end() :]}"
        assert render(changed) == text


def test_every_renderer_is_used():
    marks = [marked["source"] for path in DOCUMENTS for marked in MARKED.finditer(path.read_text())]
    assert {mark.split()[0] for mark in marks} == set(RENDERERS)


def test_cells_are_the_json_rounded():
    """Some numbers of the README, computed here from the files themselves."""
    speed = json.loads((ROOT / "benchmarks/results/gpu_serving.json").read_text())["rows"][-1]
    readme = (ROOT / "README.md").read_text()
    assert f" | {speed['FLASH_ATTN ms'] / speed['QUEST ms']:.2f}x |\n" in readme

    rows = json.loads((ROOT / "benchmarks/results/accuracy/demo/results.json").read_text())["rows"]
    shares = {
        row["token_budget"]: f"{100 * row['estimate']['mean']:.0f}"
        for row in rows
        if row["task"] == "key_value" and row["method"] == "quest"
        if row["context_tokens"] == 16384 and row["dense_layers"] == 0
    }
    assert FULL not in shares
    assert f"| QUEST | {' | '.join(shares.values())} | - |" in readme


def test_fp8_and_bf16_caches_stand_side_by_side():
    """A case that did not fit with one cache is a dash there; files of other cases are refused."""
    numbers = ("FLASH_ATTN ms", "QUEST ms", "speed", "FLASH_ATTN tok/s", "QUEST tok/s")
    fp8 = {"model": "8b", "requests": 48, "context": 32768} | dict.fromkeys(numbers, 0.5)
    bf16 = fp8 | dict.fromkeys(numbers)
    (cells,) = served_in_fp8({"rows": [fp8]}, {"rows": [bf16]})
    assert cells["QUEST, fp8 (ms)"] == "0.50" and cells["speed-up, fp8"] == "0.50x"
    assert cells["QUEST, bf16 (ms)"] == cells["FLASH_ATTN, bf16 (tokens/s)"] == "-"
    with pytest.raises(ValueError, match=r"48, 32768.* in one file is .*24, 32768"):
        list(served_in_fp8({"rows": [fp8]}, {"rows": [bf16 | {"requests": 24}]}))


@pytest.mark.parametrize(
    ("quest", "kept", "name"),
    [
        ({}, None, "QUEST"),
        ({}, {"first_pages": 1, "newest_percent": 0}, "QUEST, first page kept"),
        ({"keep_first_pages": 2}, None, "QUEST, first 2 pages kept"),
        (
            {"page_size": 8, "keep_first_pages": 0, "keep_newest_percent": 25},
            {"first_pages": 0, "newest_percent": 25},
            "QUEST, pages of 8, newest 25 % kept",
        ),
    ],
)
def test_quest_is_named_by_what_it_keeps(quest, kept, name):
    """A report without `kept` is from before the first page was kept by default."""
    settings = {"engine_args": {"additional_config": {"quest": quest}}}
    row = {"task": "key_value", "context_tokens": 64, "dense_layers": 0, "method": "quest"}
    row |= {"token_budget": 32, "estimate": {"mean": 1.0, "low": 1.0, "high": 1.0}}
    result = {"settings": settings | ({"kept": kept} if kept else {}), "rows": [row]}
    (cells,) = accuracy(result, task="key_value", context="64", dense="0")
    assert name in cells.values()


def test_a_case_that_did_not_fit_is_a_dash():
    """And rows stand by model, case and GPUs, whatever the order of their files."""
    numbers = ("FLASH_ATTN ms", "QUEST ms", "speed", "FLASH_ATTN tok/s", "QUEST tok/s")
    case = {"model": "8b", "requests": 8, "context": 65536}
    case |= dict.fromkeys((*numbers, "FLASH_ATTN attention", "QUEST attention"), 0.5)
    lacking = case | dict.fromkeys(numbers) | {"gpus": 1, "QUEST attention": None}
    of_70b = case | {"model": "70b", "gpus": 4}
    larger = [of_70b, of_70b | {"requests": 4, "gpus": 2}]
    files = [larger, [case | {"gpus": 4}], [lacking]]
    rows = list(scaling(*({"machine": {"device": "NVIDIA H1"}, "rows": rows} for rows in files)))
    assert [row["GPUs"] for row in rows] == ["1 x H1", "4 x H1", "2 x H1", "4 x H1"]
    assert [row["requests x context (tokens)"][:1] for row in rows] == ["8", "8", "4", "8"]
    assert "70B" in rows[2]["model"] and "70B" in rows[3]["model"]
    assert rows[0]["QUEST (ms)"] == rows[0]["attention, QUEST"] == "-"
    assert rows[1]["QUEST (ms)"] == "0.50" and rows[1]["attention, QUEST"] == "50%"


def test_markdown():
    assert markdown([{"a": "1", "b": "2"}]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
