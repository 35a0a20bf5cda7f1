"""Renders the measured tables of README.md and docs/*.md from the JSON of their measurement.

    python -m benchmarks.tables

A table to be rendered has a line above it that names one of RENDERERS, the JSON files and options:

    <!-- table: page_scores benchmarks/results/accuracy/demo_scores/results.json budget=1024 -->

Below the table stands a line with the machine and the command, rendered too. So a number is never
typed: measure with `--json` (or `--out`), then run this. `tests/test_tables.py` holds that every
table is what its JSON says.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(
    r"^<!-- table: (?P<source>.*) -->\n(?P<table>(?:\|.*\n)*)(?P<caption>(?:\n\*Measured .*\n)?)",
    re.MULTILINE,
)

Result = dict[str, Any]
"""What a benchmark wrote: command, machine or machines, rows."""

Cells = dict[str, str]
"""A table's row: a cell for each column's head."""

FULL = -1
"""The token budget of full attention."""

MODELS = {
    "8b": "Llama-3-8B, 32/8 heads",
    "7b": "Llama-2-7B, 32/32 heads",
    "70b": "Llama-3-70B, 64/8 heads",
}
TRAINED = {"vllm_quest/demo_model": "bundled", "second_model": "second"}
FILLERS = {"sentences": "sentences", "words": "random words", "text": "Python sources"}
METHODS = {
    "full": "full attention",
    "oracle": "oracle",
    "quest": "QUEST",
    "h2o": "H2O",
    "streaming": "StreamingLLM",
    "tova": "TOVA",
}
"""Names of the methods of `benchmarks.accuracy`, in the order of a table's rows."""

CHOICES = {
    "full attention": "full attention",
    "full attention, computed another way": "full attention, computed another way",
    "oracle mass, p16": "oracle by mass",
    "min/max, p16": "`minmax`, nothing kept",
    "min/max, p16 +0": "`minmax`, first page",
    "min/max, p16 +25": "`minmax`, first page + 25 %",
    "min/max 4 bits, p4 +25": "4-bit bounds, pages of 4, first page + 25 %",
    "keys 2 bits, mass, p16 +0": "2-bit keys, first page",
    "keys 2 bits, mass, p16 +25": "2-bit keys, first page + 25 %",
    "keys 1 bit, mass, p16 +25": "1-bit keys, first page + 25 %",
    "StreamingLLM, p16": "StreamingLLM",
}
"""Methods of `benchmarks.choosing` that tables show, and their names, in the order of the rows."""


CHOICES_OF_SCORES = {"minmax": "min/max, p16 +0", "codes": "keys 2 bits, mass, p16 +0"}
"""Of those, what chooses as the plugin's scores do by default, with the first page kept."""

SPEED_CASE = {"kernels": "8 x 32K, 32/8", "models": ("8b", 8, 32768)}
"""What a table of accuracy gives the speed of: of `kernels.py` and of `gpu_serving.py`."""


def render(text: str) -> str:
    """A document with each of its marked tables as the JSON has it."""

    def table(marked: re.Match[str]) -> str:
        name, *words = marked["source"].split()
        options = dict(word.split("=") for word in words if "=" in word)
        results = [json.loads((ROOT / word).read_text()) for word in words if "=" not in word]
        lines = markdown(RENDERERS[name](*results, **options))
        return f"<!-- table: {marked['source']} -->\n{lines}\n{caption(results)}\n"

    return MARKED.sub(table, text)


def markdown(rows: Iterable[Cells]) -> str:
    """A Markdown table of rows with the same heads."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def caption(results: Iterable[Result]) -> str:
    """The line below a table: what it was measured on, and how."""
    parts = []
    for result in results:
        machine = result.get("machine") or result["machines"][0]
        if isinstance(machine, str):
            machine = _parse_machine(machine)
        names = {"vllm": "vLLM", "torch": "torch", "transformers": "transformers"}
        versions = ", ".join(f"{names[key]} {machine[key]}" for key in names if key in machine)
        command = re.sub(r" --((json|plot|log) \S+|report-only)", "", result["command"])
        parts.append(f"on {machine['device']} ({versions}) by `{command}`")
    return f"*Measured {'; '.join(parts)}.*"


def _parse_machine(text: str) -> dict[str, str]:
    """A machine as reports write it: `device: NVIDIA H200, vllm: 0.32.0, torch: 2.11.0`, or, those
    of `benchmarks.choosing`, `NVIDIA H200, torch 2.11.0, transformers 5.17.0`."""
    keys = "vllm|torch|transformers"
    device, *versions = re.split(rf", (?=(?:{keys}):? )", text.removeprefix("device: "))
    return {"device": device, **dict(re.split(":? ", version) for version in versions)}


# Speed.


def whole_models(result: Result) -> Iterable[Cells]:
    """Of `gpu_serving.py`: a decode step of a whole model."""
    for row in result["rows"]:
        yield {
            "model": MODELS[row["model"]],
            "requests x context (tokens)": f"{row['requests']} x {in_k(row['context'])}",
            "FLASH_ATTN (ms)": _ms(row["FLASH_ATTN ms"]),
            "QUEST (ms)": _ms(row["QUEST ms"]),
            "speed-up": f"{row['speed']:.2f}x",
        }


def scaling(*results: Result) -> Iterable[Cells]:
    """Of `gpu_serving.py --tensor-parallel --random-kv`: a decode step by the number of GPUs."""
    rows = [row | result["machine"] for result in results for row in result["rows"]]
    models = list(MODELS)
    case = ("context", "requests", "gpus")
    rows.sort(key=lambda row: [models.index(row["model"]), *(row[key] for key in case)])
    for row in rows:
        yield {
            "model": MODELS[row["model"]],
            "requests x context (tokens)": f"{row['requests']} x {in_k(row['context'])}",
            "GPUs": f"{row['gpus']} x {row['device'].removeprefix('NVIDIA ')}",
            "FLASH_ATTN (ms)": _or_dash(row["FLASH_ATTN ms"], _ms),
            "QUEST (ms)": _or_dash(row["QUEST ms"], _ms),
            "speed-up": _or_dash(row["speed"], "{:.2f}x".format),
            "FLASH_ATTN (tokens/s)": _or_dash(row["FLASH_ATTN tok/s"], "{:.0f}".format),
            "QUEST (tokens/s)": _or_dash(row["QUEST tok/s"], "{:.0f}".format),
            "attention, FLASH_ATTN": _or_dash(row["FLASH_ATTN attention"], "{:.0%}".format),
            "attention, QUEST": _or_dash(row["QUEST attention"], "{:.0%}".format),
        }


def first_tokens(result: Result) -> Iterable[Cells]:
    """Of `offload.py`: the time to the first token by where the prompt's blocks are."""
    for row in result["rows"]:
        yield {
            "backend": row["backend"],
            "prompt (tokens)": in_k(row["context"]),
            "prefilled (ms)": _ms(row["prefilled ms"]),
            "from the GPU's cache (ms)": _ms(row["on the GPU ms"]),
            "from host memory (ms)": _ms(row["on the host ms"]),
        }


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    """A number, or a dash where a case did not fit the GPU."""
    return "-" if value is None else text(value)


def layers(result: Result) -> Iterable[Cells]:
    """Of `kernels.py`: attention alone, then with the write of keys and values."""
    for row in result["rows"]:
        flashinfer = [row[key] for key in row if key.startswith("FlashInfer") and "µs" in key]
        yield {
            "rows x context, heads": row["rows x context, heads"],
            "FA3 (µs)": _us(row["FA3 µs"]),
            "FlashInfer (µs)": _us(min(flashinfer)),
            "QUEST, 3 launches (µs)": _us(row["3 launches µs"]),
            "QUEST (µs)": _us(row["total µs"]),
            "speed-up over FA3": f"{row['ratio']:.1f}x",
            "bound": f"{row['limit']:.1f}x",
            "layer, FA3 (µs)": _us(row["FA3 layer µs"]),
            "layer, QUEST (µs)": _us(row["layer µs"]),
            "layer's speed-up": f"{row['layer ratio']:.1f}x",
        }


def budgets(result: Result) -> Iterable[Cells]:
    """Of `kernels.py --budgets`: attention alone."""
    for row in result["rows"]:
        yield {
            "rows x context, heads": row["rows x context, heads"],
            "budget (tokens)": str(row["budget"]),
            "FA3 (µs)": _us(row["FA3 µs"]),
            "QUEST (µs)": _us(row["total µs"]),
            "speed-up over FA3": f"{row['ratio']:.1f}x",
            "bound": f"{row['limit']:.1f}x",
        }


def coded(*results: Result) -> Iterable[Cells]:
    """Of `kernels.py --score codes`: attention alone. The last result is the reference table."""
    *of_codes, reference = results
    minmax = {row["rows x context, heads"]: row for row in reference["rows"]}
    for row in sorted(
        (row for result in of_codes for row in result["rows"]),
        key=lambda row: ([*minmax].index(row["rows x context, heads"]), row["budget"]),
    ):
        other = minmax[row["rows x context, heads"]]
        yield {
            "rows x context, heads": row["rows x context, heads"],
            "budget (tokens)": str(row["budget"]),
            "scoring, `codes` (µs)": _us(row["score µs"]),
            "QUEST, `codes` (µs)": _us(row["total µs"]),
            "QUEST, `minmax`, 2048 (µs)": _us(other["total µs"]),
            "FA3 (µs)": _us(other["FA3 µs"]),
            "speed-up of `codes` over FA3": f"{other['FA3 µs'] / row['total µs']:.1f}x",
        }


def in_fp8(fp8: Result, bf16: Result) -> Iterable[Cells]:
    """Of `kernels.py`, with `--kv-cache-dtype fp8` and without, the same cases."""
    for row, other in _same_cases(fp8, bf16, "rows x context, heads"):
        yield {
            "rows x context, heads": row["rows x context, heads"],
            "QUEST, fp8 (µs)": _us(row["total µs"]),
            "QUEST, bf16 (µs)": _us(other["total µs"]),
            "FA3, fp8 (µs)": _us(row["FA3 µs"]),
            "FA3, bf16 (µs)": _us(other["FA3 µs"]),
            "QUEST's bytes, fp8 (µs)": _us(row["limit µs"]),
            "speed-up over FA3, fp8": f"{row['ratio']:.1f}x",
            "speed-up over FA3, bf16": f"{other['ratio']:.1f}x",
            "layer, QUEST, fp8 (µs)": _us(row["layer µs"]),
            "layer, QUEST, bf16 (µs)": _us(other["layer µs"]),
            "layer's speed-up, fp8": f"{row['layer ratio']:.1f}x",
        }


def served_in_fp8(fp8: Result, bf16: Result) -> Iterable[Cells]:
    """Of `gpu_serving.py`, with `--kv-cache-dtype fp8` and without, the same cases."""
    for row, other in _same_cases(fp8, bf16, "model", "requests", "context"):
        measured = {
            f"{backend}, {cache}": (of_cache[f"{backend} ms"], of_cache[f"{backend} tok/s"])
            for cache, of_cache in (("bf16", other), ("fp8", row))
            for backend in ("FLASH_ATTN", "QUEST")
        }
        yield {
            "model": MODELS[row["model"]],
            "requests x context (tokens)": f"{row['requests']} x {in_k(row['context'])}",
            **{f"{name} (ms)": _or_dash(ms, _ms) for name, (ms, _) in measured.items()},
            "speed-up, fp8": _or_dash(row["speed"], "{:.2f}x".format),
            **{
                f"{name} (tokens/s)": _or_dash(rate, "{:.0f}".format)
                for name, (_, rate) in measured.items()
            },
        }


def _same_cases(
    fp8: Result, bf16: Result, *case: str
) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of both, which have to agree in what names their case."""
    for row, other in zip(fp8["rows"], bf16["rows"], strict=True):
        first, second = ([of_cache[key] for key in case] for of_cache in (row, other))
        if first != second:
            raise ValueError(f"{first} in one file is {second} in the other")
        yield row, other


def captures(result: Result) -> Iterable[Cells]:
    """Of `kernels.py --captured-for`: a case's row, a column for each capture."""
    cases: dict[str, Cells] = {}
    for row in result["rows"]:
        name = row["rows x context, heads"]
        cells = cases.setdefault(name, {"rows x context, heads": name})
        cells[f"graph for {row['captured for']} (µs)"] = _us(row["layer µs"])
    return cases.values()


def prefills(result: Result) -> Iterable[Cells]:
    """Of `prefill.py`: a chunk's write and attention."""
    for row in result["rows"]:
        yield {
            "requests x chunk, heads": row["requests x chunk, heads"],
            "write, vLLM (µs)": _us(row["FLASH_ATTN write µs"]),
            "write, QUEST (µs)": _us(row["QUEST write µs"]),
            "attention, FLASH_ATTN (µs)": _us(row["FLASH_ATTN attention µs"]),
            "attention, QUEST (µs)": _us(row["QUEST attention µs"]),
            "speed-up of both": f"{row['layer ratio']:.2f}x",
        }


def cpu_models(result: Result) -> Iterable[Cells]:
    """Of `cpu_serving.py`: prefill and decoding of a whole model."""
    for row in result["rows"]:
        yield {
            "context (tokens)": in_k(row["context"]),
            "backend": row["backend"],
            "prefill (s)": _ms(row["prefill s"]),
            "decode (ms per token)": _ms(row["ms per token"]),
            "decode speed-up": f"{row['decode speed']:.2f}x",
        }


def cpu_stages(result: Result) -> Iterable[Cells]:
    """Of `cpu_ops.py --scores`: the stages of one layer's decode step."""
    for row in result["rows"]:
        yield {
            "rows x context": f"{row['rows']} x {in_k(row['context'])}",
            "score": f"`{row['score']}`",
            "budget (tokens)": str(row["budget"]),
            "write (µs)": _us(row["write_kv µs"]),
            "scoring (µs)": _us(row["score µs"]),
            "selection (µs)": _us(row["select µs"]),
            "attention to the budget (µs)": _us(row["sparse_decode µs"]),
            "QUEST (µs)": _us(row["quest µs"]),
            "CPU_ATTN (µs)": _us(row["CPU_ATTN µs"]),
            "speed-up over CPU_ATTN": f"{row['CPU_ATTN / quest']:.1f}x",
        }


def in_k(tokens: int) -> str:
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else str(tokens)


def _us(time: float) -> str:
    return f"{time:.1f}" if time < 100 else f"{time:.0f}"


def _ms(time: float) -> str:
    return f"{time:.2f}" if time < 10 else _us(time)


# Accuracy: options come as text.


def accuracy(
    *results: Result, task: str, context: str, dense: str, interval: str = "1024"
) -> Iterable[Cells]:
    """All methods of one context: a column for each budget, and an interval at one of them."""
    lines: dict[str, dict[int, Any]] = {}
    for result in results:
        for row in _of(result, task, int(context), int(dense)):
            name = METHODS[row["method"]] + _settings(result, row["method"])
            lines.setdefault(name, {})[row["token_budget"]] = row["estimate"]
    columns = sorted({budget for cells in lines.values() for budget in cells} - {FULL})
    for name in sorted(lines, key=lambda name: [*METHODS.values()].index(name.split(",")[0])):
        cells = {_unit(task): name}
        cells |= {str(budget): _mean(lines[name].get(budget), task) for budget in columns}
        cells["no limit"] = _mean(lines[name].get(FULL), task)
        at = lines[name].get(int(interval)) or lines[name].get(FULL)
        cells[f"95 % interval at {interval}"] = _interval(at, task)
        yield cells


def by_context(result: Result, *, task: str, method: str = "quest") -> Iterable[Cells]:
    """One method at all contexts and dense layers, with full attention beside it."""
    rows = [row for row in result["rows"] if row["task"] == task]
    columns = sorted({row["token_budget"] for row in rows} - {FULL})
    for context, dense in dict.fromkeys((r["context_tokens"], r["dense_layers"]) for r in rows):
        found = {
            row["token_budget"]: row["estimate"]
            for row in _of(result, task, context, dense)
            if row["method"] in (method, "full")
        }
        yield {
            "context (tokens)": in_k(context),
            "dense layers": str(dense),
            **{str(budget): _mean(found.get(budget), task) for budget in columns},
            "full attention": _mean(found[FULL], task),
        }


def choices(*results: Result, measure: str) -> Iterable[Cells]:
    """Of `benchmarks.choosing`: agreement with full attention, or facts answered.

    A later report gives the methods that those before it lack, and its number of windows.
    """
    lines: dict[str, Cells] = {}
    for result in results:
        windows = "" if result is results[0] else f" ({result['windows']} windows)"
        budgets = result["settings"]["budgets"]
        for method, choice in CHOICES.items():
            found = {
                row["token_budget"]: row[measure]
                for row in result["rows"]
                if row["method"] == method and row[measure] is not None
            }
            is_certain = method == "full attention" and measure == "agreement"
            if found and not is_certain and method not in lines:
                lines[method] = {
                    f"{measure} (%) by token budget": choice + windows,
                    **{str(budget): _with_interval(found.get(budget)) for budget in budgets},
                    "no limit": _with_interval(found.get(0)),
                }
    return [lines[method] for method in CHOICES if method in lines]


def smallest_budgets(*results: Result, share: str) -> Iterable[Cells]:
    """For each report of accuracy and score, the smallest budget that keeps a share, in percent.

    Results of `kernels.py` and `gpu_serving.py` among the others give its speed; of two with the
    same case, the later.
    """
    kernels, models = _speeds(results)
    for result in results:
        for (measure, score), kept in _kept(result).items():
            reaching = [budget for budget in kept if 100 * kept[budget] >= float(share)]
            budget = min(reaching, default=max(kept))
            settings = result["settings"]
            trained = TRAINED.get(settings["model"])
            model = f"the {trained} model" if trained else Path(settings["model"]).name
            context = settings.get("context") or result["rows"][0]["context_tokens"]
            cells = {
                "model, context (tokens)": f"{model}, {in_k(context)}",
                "kept": measure,
                "score": f"`{score}`",
                f"smallest budget that keeps {share} %": str(budget) if reaching else "none",
                "kept there (%)": f"{100 * kept[budget]:.1f}"
                + ("" if reaching else f" at {budget}"),
            }
            if kernels:
                time = kernels.get((score, budget))
                cells[f"attention, {SPEED_CASE['kernels']} (µs)"] = _us(time) if time else "-"
            if models:
                model, requests, context = SPEED_CASE["models"]
                head = f"decode step, {MODELS[model]}, {requests} x {in_k(context)} (ms)"
                time = models.get((score, budget))
                cells[head] = _ms(time) if time else "-"
            yield cells


def _speeds(
    results: Iterable[Result],
) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float]]:
    """µs of attention and ms of a model's decode step in SPEED_CASE, by score and budget."""
    kernels, models = {}, {}
    for result in results:
        for row in result["rows"]:
            key = (row.get("score") or "minmax", row.get("budget", 2048))
            if row.get("rows x context, heads") == SPEED_CASE["kernels"]:
                kernels[key] = row["total µs"]
            if (row.get("model"), row.get("requests"), row.get("context")) == SPEED_CASE["models"]:
                models[key] = row["QUEST ms"]
    return kernels, models


def _kept(result: Result) -> dict[tuple[str, str], dict[int, float]]:
    """By what a report counts and score: the share of it that each budget keeps.

    Counted is agreement and, of facts inside vLLM, right answers relative to full attention's.
    """
    kept: dict[tuple[str, str], dict[int, float]] = {}

    def add(measure: str, score: str, row: dict[str, Any], share: float) -> None:
        kept.setdefault((measure, score), {})[row["token_budget"]] = share

    if "windows" in result:
        names = {choice: score for score, choice in CHOICES_OF_SCORES.items()}
        for row in result["rows"]:
            if row["method"] in names:
                add("agreement", names[row["method"]], row, row["agreement"]["mean"])
    elif "settings" in result:
        full = {r["task"]: r["estimate"]["mean"] for r in result["rows"] if r["method"] == "full"}
        for row in result["rows"]:
            if row["method"].startswith("quest ("):
                score = _score_of(row).strip("`")
                if row.get("agreement"):
                    add("agreement", score, row, row["agreement"]["mean"])
                elif row["task"] == "key_value":
                    add("right answers", score, row, row["estimate"]["mean"] / full["key_value"])
    return kept


def countings(result: Result, *, context: str, dense: str, budget: str) -> Iterable[Cells]:
    """The same answers counted as wholes, by their numbers, and by tokens of right ones."""
    ways = {
        "whole answers": ("key_value", "estimate"),
        "numbers of an answer, in their places": ("key_value", "tokens_right"),
        "answer tokens under teacher forcing": ("perplexity", "tokens_right"),
    }
    for way, (task, field) in ways.items():
        found = {
            (row["method"], row["token_budget"]): row[field]
            for row in _of(result, task, int(context), int(dense))
        }
        yield {
            "counted by (% right)": way,
            "full attention": _mean(found["full", FULL], "key_value"),
            f"QUEST, {budget} tokens": _mean(found["quest", int(budget)], "key_value"),
        }


def scores(
    result: Result, *, task: str, context: str, dense: str = "0", measure: str = "estimate"
) -> Iterable[Cells]:
    """QUEST's page scores and what else has a budget, a column for each budget.

    `measure` is `estimate` (right answers, perplexity) or `agreement` with full attention's tokens.
    """
    unit = "agreement (%) by token budget" if measure == "agreement" else _unit(task)
    of_task = "key_value" if measure == "agreement" else task
    lines: dict[str, Cells] = {}
    for row in _of(result, task, int(context), int(dense)):
        if row["token_budget"] != FULL:
            score = _score_of(row).replace("`oracle-mass`", "oracle by mass")
            line = lines.setdefault(score, {unit: score})
            line[str(row["token_budget"])] = _mean(row[measure], of_task)
    return lines.values()


def cache_dtypes(*results: Result) -> Iterable[Cells]:
    """Of runs that differ in backend and KV cache, with `--agree-with` the same run: full attention
    and QUEST, a row for each budget."""
    for result in results:
        engine = result["settings"]["engine_args"]
        backend = engine.get("attention_backend", "QUEST")
        lines: dict[int, Cells] = {}
        for row in sorted(result["rows"], key=lambda row: row["token_budget"]):
            budget, task = row["token_budget"], row["task"]
            line = lines.setdefault(
                budget,
                {
                    "backend": backend,
                    "KV cache": engine.get("kv_cache_dtype", "auto"),
                    "token budget": "all" if budget == FULL else str(budget),
                },
            )
            if task == "perplexity":
                line["perplexity"] = f"{row['estimate']['mean']:.3f}"
                line["agreement (%)"] = _with_interval(row["agreement"])
            else:
                line["facts answered (%)"] = _with_interval(row["estimate"])
        yield from lines.values()


def page_scores(*results: Result, budget: str) -> Iterable[Cells]:
    """QUEST's page scores, a column for each report."""
    lines: dict[str, Cells] = {}
    for result in results:
        settings = result["settings"]
        head = f"{TRAINED[settings['model']]} model, {FILLERS[settings['filler']]}"
        for row in result["rows"]:
            if row["token_budget"] == int(budget):
                score = _score_of(row)
                line = lines.setdefault(score, {f"right answers (%) at {budget} tokens": score})
                line[head] = _mean(row["estimate"], "key_value")
    return lines.values()


def _score_of(row: dict[str, Any]) -> str:
    """The page score of a row that QUEST was measured with."""
    return f"`{row['method'].removeprefix('quest (').removesuffix(')')}`"


def _of(result: Result, task: str, context: int, dense: int) -> list[dict[str, Any]]:
    case = {"task": task, "context_tokens": context, "dense_layers": dense}
    return [row for row in result["rows"] if case.items() <= row.items()]


def _settings(result: Result, method: str) -> str:
    """What QUEST's name needs where its pages were not of the default size, or some were kept.

    Reports that do not say what was kept are from before the first page was kept by default.
    """
    if method != "quest":
        return ""
    settings = result["settings"]
    quest = settings["engine_args"].get("additional_config", {}).get("quest", {})
    kept = settings.get("kept", {})
    first = kept.get("first_pages", quest.get("keep_first_pages", 0))
    newest = kept.get("newest_percent", quest.get("keep_newest_percent", 0))
    parts = [f"pages of {quest['page_size']}"] if "page_size" in quest else []
    parts += [f"first {'page' if first == 1 else f'{first} pages'} kept"] if first else []
    parts += [f"newest {newest} % kept"] if newest else []
    return "".join(f", {part}" for part in parts)


def _unit(task: str) -> str:
    what = "perplexity" if task == "perplexity" else "right answers (%)"
    return f"{what} by token budget"


def _mean(estimate: dict[str, float] | None, task: str) -> str:
    if estimate is None:
        return "-"
    mean = estimate["mean"]
    return f"{mean:.1f}" if task == "perplexity" else f"{100 * mean:.0f}"


def _interval(estimate: dict[str, float] | None, task: str) -> str:
    if estimate is None:
        return "-"
    low, high = estimate["low"], estimate["high"]
    return f"{low:.1f}-{high:.1f}" if task == "perplexity" else f"{100 * low:.0f}-{100 * high:.0f}"


def _with_interval(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "-"
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


# Long runs.


def soaks(*results: Result) -> Iterable[Cells]:
    """Of `tests.soak`: what became of the requests, and the server's memory."""
    for result in results:
        yield {
            "machine": result["machine"]["device"],
            "time (minutes)": f"{result['minutes']:g}",
            "clients": str(result["clients"]),
            "finished (requests)": str(result["finished"]),
            "cut (requests)": str(result["cut"]),
            "refused (requests)": str(result["refused"]),
            "lost (requests)": str(result["lost"]),
            **_memory(result, "rss_mib", "resident"),
            **_memory(result, "gpu_mib", "GPU"),
            "start again (s)": f"{result['kill']['started_again_in_s']:.1f}",
        }


def _memory(result: Result, key: str, name: str) -> Cells:
    """Memory at the first and the last sample, and its growth; dashes where there is none."""
    has = [sample[key] / 1024 for sample in result["samples"] if key in sample]
    share = result["growth"].get(key)
    return {
        f"{name}, first and last (GiB)": f"{has[0]:.2f}, {has[-1]:.2f}" if has else "-",
        f"growth, {name} (%)": "-" if share is None else f"{100 * share:+z.1f}",
    }


RENDERERS: dict[str, Callable[..., Iterable[Cells]]] = {
    renderer.__name__: renderer
    for renderer in (
        whole_models,
        scaling,
        first_tokens,
        layers,
        budgets,
        captures,
        coded,
        in_fp8,
        served_in_fp8,
        prefills,
        cpu_models,
        cpu_stages,
        accuracy,
        by_context,
        choices,
        smallest_budgets,
        countings,
        scores,
        page_scores,
        cache_dtypes,
        soaks,
    )
}


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(render(document.read_text()))


if __name__ == "__main__":
    main()
