"""The command `vllm-quest explain`: options, the printed table, the files it writes."""

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_quest.config import SCORES, QuestConfig
from vllm_quest.pass_keys import make_haystack

if TYPE_CHECKING:
    from vllm_quest.explain.request import Explanation, Request

BUNDLED_CONTEXT_TOKENS = 16384


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `explain`."""
    defaults = QuestConfig()
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="name or path, as for vllm serve (default: the bundled model)",
    )
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="the prompt, plain text, longer than the budget (default, for the bundled model: a "
        f"text of {BUNDLED_CONTEXT_TOKENS} tokens with pass keys, and a question for one of them)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    parser.add_argument(
        "--max-tokens",
        type=_answer_tokens,
        default=32,
        metavar="TOKENS",
        help="longest answer, 2 or more; each token but the first is a decode step "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on to --max-tokens past the answer's end"
    )
    parser.add_argument(
        "--token-budget",
        type=int,
        default=defaults.token_budget,
        metavar="TOKENS",
        help="tokens attended per KV head in one decode step (default: %(default)s)",
    )
    parser.add_argument(
        "--dense-layers",
        type=int,
        metavar="LAYERS",
        help=f"layers at the front that attend in full (default: {defaults.dense_layers}; "
        "for the bundled model, where none is named, no layer)",
    )
    parser.add_argument(
        "--score",
        choices=SCORES,
        default=defaults.score,
        help="what pages are scored by (default: %(default)s)",
    )
    parser.add_argument(
        "--answer",
        metavar="TEXT",
        help="mark where this text lies in the prompt (default: what the model answers)",
    )
    parser.add_argument(
        "--layers", type=_numbers, metavar="LIST", help="layers to show, such as 0,2,8-15"
    )
    parser.add_argument(
        "--heads", type=_numbers, metavar="LIST", help="KV heads to show; over four are averaged"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("explain.png"),
        metavar="PNG",
        help="the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the numbers and the pages read"
    )


def run_explain(options: argparse.Namespace) -> int:
    """Run the request, print the table, write the files. Returns the exit status."""
    # In this process, where the layers can be watched; read when vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_quest.explain.request import CannotExplain, explain

    try:
        request = _request(options)
        print(f"Starting {request.model} with QUEST; the prompt is read, then answered.")
        explanation = explain(request)
        _print(explanation)
        _write(explanation, options)
    except CannotExplain as error:
        print(f"vllm-quest explain: {error}", file=sys.stderr)
        return 1
    return 0


def _request(options: argparse.Namespace) -> "Request":
    from vllm_quest import demo
    from vllm_quest.explain.request import CannotExplain, Request

    if find_spec("matplotlib") is None:
        raise CannotExplain(
            "matplotlib is missing, which draws the picture: pip install 'vllm-quest[plot]'"
        )
    for path in filter(None, (options.output, options.json)):
        if not path.parent.is_dir():
            raise CannotExplain(f"the folder {path.parent} of {path.name} does not exist")
        if path.is_dir():
            raise CannotExplain(f"{path} is a folder; name a file in it")
    is_bundled = options.model is None
    dense_layers = options.dense_layers
    if dense_layers is None:
        dense_layers = (demo.SETTINGS if is_bundled else QuestConfig()).dense_layers
    try:
        quest = QuestConfig(
            token_budget=options.token_budget, dense_layers=dense_layers, score=options.score
        )
    except ValueError as error:
        raise CannotExplain(str(error)) from error
    return Request(
        model=str(demo.MODEL) if is_bundled else options.model,
        prompt=_prompt(options.prompt_file, is_bundled),
        quest=quest,
        max_tokens=options.max_tokens,
        is_chat=options.chat,
        ignore_eos=options.ignore_eos,
        expected=options.answer,
        layers=options.layers,
        heads=options.heads,
    )


def _prompt(path: Path | None, is_bundled: bool) -> str:
    from vllm_quest.demo import TOKENS_PER_FACT
    from vllm_quest.explain.request import CannotExplain

    if path is None:
        if not is_bundled:
            raise CannotExplain("--prompt-file is missing: a text longer than the token budget")
        num_facts = BUNDLED_CONTEXT_TOKENS // TOKENS_PER_FACT
        haystack = make_haystack(BUNDLED_CONTEXT_TOKENS, num_facts, seed=0)
        by_place = sorted(haystack.facts, key=lambda fact: haystack.text.index(fact.sentence))
        return haystack.prompt(by_place[len(by_place) // 3])
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CannotExplain(f"the prompt file cannot be read: {error}") from error


def _print(explanation: "Explanation") -> None:
    request = explanation.request
    print(
        f"{explanation.prompt_tokens} tokens of prompt, {len(explanation.fed_tokens)} decode steps "
        f"under a budget of {request.quest.token_budget}; the answer: {explanation.answer!r}\n"
    )
    score = request.quest.score
    meant = "the logarithm of the page's share" if score == "codes" else "the page's largest q·k"
    print("Share of the true attention that the pages read held, over KV heads and steps;")
    print("best possible: as many pages, chosen by the true attention;")
    print(f"error of score: by how much a page's score exceeds {meant},")
    print(f"mean ± standard deviation over the pages, in logits (score {score}).\n")
    print(f"{'layer':>5}{'mean':>10}{'lowest':>10}{'best possible':>16}{'error of score':>18}")
    for number, layer in explanation.layers.items():
        if isinstance(layer, str):
            print(f"{number:>5}   {layer}")
        else:
            held, best = layer.held, layer.best
            error, deviation = layer.error.mean(axis=(0, 1))
            print(
                f"{number:>5}{held.mean():>10.1%}{held.min():>10.1%}{best.mean():>16.1%}"
                f"{f'{error:+.2f} ± {deviation:.2f}':>18}"
            )
    print()


def _write(explanation: "Explanation", options: argparse.Namespace) -> None:
    from vllm_quest.explain.drawing import draw
    from vllm_quest.explain.request import CannotExplain

    try:
        draw(explanation, options.output)
        print(f"Wrote {options.output}")
        if options.json is not None:
            options.json.write_text(json.dumps(_numbers_of(explanation)) + "\n")
            print(f"Wrote {options.json}")
    except OSError as error:
        raise CannotExplain(f"cannot write: {error}") from error


def _numbers_of(explanation: "Explanation") -> dict[str, Any]:
    """What `--json` writes. Shares are lists `[step][KV head][query head of the group]`, errors of
    scores `[step][KV head]`: mean and standard deviation, or null where no page has an estimate."""
    request = explanation.request
    layers: list[dict[str, Any]] = []
    for number, layer in explanation.layers.items():
        if isinstance(layer, str):
            layers.append({"layer": number, "kind": layer})
            continue
        layers.append(
            {
                "layer": number,
                "kind": "sparse",
                "held_mean": float(layer.held.mean()),
                "held_lowest": float(layer.held.min()),
                "best_mean": float(layer.best.mean()),
                "held": layer.held.tolist(),
                "best": layer.best.tolist(),
                "score_error": _finite(layer.error),
                "pages": [[head.nonzero()[0].tolist() for head in step] for step in layer.read],
            }
        )
    return {
        "model": request.model,
        "token_budget": request.quest.token_budget,
        "dense_layers": request.quest.dense_layers,
        "page_size": request.quest.page_size,
        "score": request.quest.score,
        "prompt_tokens": explanation.prompt_tokens,
        "kv_heads": explanation.heads,
        "answer": explanation.answer,
        "fed_tokens": explanation.fed_tokens,
        "answer_places": explanation.places,
        "layers": layers,
    }


def _finite(errors: np.ndarray) -> list[list[list[float] | None]]:
    """`[num_steps, num_kv_heads, 2]` as lists; JSON has no NaN."""
    return [
        [None if np.isnan(error).any() else error.tolist() for error in step] for step in errors
    ]


def _answer_tokens(text: str) -> int:
    """The first token comes from the prefill, and no decode step reads anything for it."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 2 or more")
    return number


def _numbers(text: str) -> list[int]:
    """`0,2,8-11` is [0, 2, 8, 9, 10, 11]."""
    numbers: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            run = range(int(first), int(last or first) + 1)
            if not run:
                raise ValueError
            numbers.update(run)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 0,2,8-15") from None
    return sorted(numbers)
