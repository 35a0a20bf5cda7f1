"""Ask a model for pass keys under sparse attention, in plain PyTorch.

    python training/evaluate.py vllm_quest/demo_model
    python training/evaluate.py second_model --fillers words sources --dense-layers 2 0

Text and question are read with dense attention; every answer token comes from attention to a
chosen set of pages, in all layers but the dense ones. Results go to `evaluation.json` beside the
weights.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import checkpoint
import sources
from llama import Llama, causal_attention
from vllm_quest import pass_keys

PAGE_SIZE = 16
BUDGETS = (64, 128, 256, 512, 1024, 2048)
LENGTHS = (4096, 16_384, 32_768)
FILLERS = ("sentences", "words", "sources")
ROWS = 32  # questions answered at once
MAX_QUESTIONS = 128


@dataclass(frozen=True)
class Keys:
    """What a layer knows of the keys: those of the shared text, and those of each row's question.

    The text ends with a page; the question begins one.
    """

    text: Tensor  # [kv_heads, text_tokens, head_size]
    question: Tensor  # [rows, kv_heads, question_tokens, head_size]

    def dot(self, query: Tensor) -> Tensor:
        """q·k of every key: `[rows, kv_heads, group, queries, tokens]`."""
        text = torch.einsum("rhgqd,hkd->rhgqk", query, self.text)
        question = torch.einsum("rhgqd,rhkd->rhgqk", query, self.question)
        return torch.cat((text, question), dim=-1)


Score = Callable[[Tensor, Keys, Tensor], Tensor]
"""(query, keys, q·k) -> `[rows, kv_heads, group, queries, pages]`, higher is better."""


def score_min_max(query: Tensor, keys: Keys, dots: Tensor) -> Tensor:
    """QUEST's bound: the sum over dimensions of the larger of q·min and q·max."""
    positive, negative = query.clamp(min=0), query.clamp(max=0)
    text, question = pages_of(keys.text), pages_of(keys.question)
    low_text, high_text = text.amin(-2), text.amax(-2)
    low_question, high_question = question.amin(-2), question.amax(-2)
    of_text = torch.einsum("rhgqd,hpd->rhgqp", positive, high_text)
    of_text += torch.einsum("rhgqd,hpd->rhgqp", negative, low_text)
    of_question = torch.einsum("rhgqd,rhpd->rhgqp", positive, high_question)
    of_question += torch.einsum("rhgqd,rhpd->rhgqp", negative, low_question)
    return torch.cat((of_text, of_question), dim=-1)


def score_mean_std(query: Tensor, keys: Keys, dots: Tensor) -> Tensor:
    """The page's mean q·k by dimension, and its standard deviation added."""
    return _score_spread(query, keys, lambda keys: (keys.mean(-2), keys.std(-2, correction=0)))


def score_mid_dev(query: Tensor, keys: Keys, dots: Tensor) -> Tensor:
    """The middle between minimum and maximum, and the mean deviation from it added."""

    def describe(keys: Tensor) -> tuple[Tensor, Tensor]:
        mid = (keys.amin(-2) + keys.amax(-2)) / 2
        return mid, (keys - mid[..., None, :]).abs().mean(-2)

    return _score_spread(query, keys, describe)


def _score_spread(
    query: Tensor, keys: Keys, describe: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """q·center + |q|·spread; `describe` gives both of `[..., pages, PAGE_SIZE, head_size]`."""
    center, spread = describe(pages_of(keys.text))
    of_text = torch.einsum("rhgqd,hpd->rhgqp", query, center)
    of_text += torch.einsum("rhgqd,hpd->rhgqp", query.abs(), spread)
    center, spread = describe(pages_of(keys.question))
    of_question = torch.einsum("rhgqd,rhpd->rhgqp", query, center)
    of_question += torch.einsum("rhgqd,rhpd->rhgqp", query.abs(), spread)
    return torch.cat((of_text, of_question), dim=-1)


def score_best(query: Tensor, keys: Keys, dots: Tensor) -> Tensor:
    """The page's largest true q·k: what no bound can beat."""
    padding = -dots.shape[-1] % PAGE_SIZE
    padded = F.pad(dots, (0, padding), value=-math.inf)
    return padded.unflatten(-1, (-1, PAGE_SIZE)).amax(-1)


def score_recent(query: Tensor, keys: Keys, dots: Tensor) -> Tensor:
    """The newest pages."""
    num_pages = math.ceil(dots.shape[-1] / PAGE_SIZE)
    return torch.arange(num_pages, device=dots.device).float().expand(*dots.shape[:-1], -1)


def score_first_and_recent(query: Tensor, keys: Keys, dots: Tensor) -> Tensor:
    """The first page and the newest ones (StreamingLLM)."""
    scores = score_recent(query, keys, dots).clone()
    scores[..., 0] = math.inf
    return scores


METHODS: dict[str, Score] = {
    "best": score_best,
    "quest": score_min_max,
    "mean and std": score_mean_std,
    "mid and deviation": score_mid_dev,
    "recent": score_recent,
    "first and recent": score_first_and_recent,
}


def pages_of(keys: Tensor) -> Tensor:
    """`[..., tokens, head_size]` to `[..., pages, PAGE_SIZE, head_size]`.

    Zeros fill the last page up. It is some query's newest page, which is chosen without a score.
    """
    padded = F.pad(keys, (0, 0, 0, -keys.shape[-2] % PAGE_SIZE))
    return padded.unflatten(-2, (-1, PAGE_SIZE))


class SharedText:
    """The keys and values of a text, read once, and attention to it from many questions."""

    def __init__(self, model: Llama, tokens: Tensor) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.num_tokens = tokens.shape[0]
        model(tokens[None], attend=self._read, wanted=tokens.new_zeros(1, 1))

    def _read(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys.append(key[0])
        self.values.append(value[0])
        return causal_attention(layer, query, key, value)

    def attention(
        self, score: Score | None, budget: int, *, num_dense: int, dense_layers: int
    ) -> "SparseAttention":
        """Attention of questions.

        Their first `num_dense` tokens and the first `dense_layers` layers attend to everything.
        """
        return SparseAttention(self, score, budget // PAGE_SIZE, num_dense, dense_layers)


@dataclass(frozen=True)
class SparseAttention:
    """Attention to the text and to the row's own question, over chosen pages."""

    text: SharedText
    score: Score | None  # None attends to everything
    num_pages: int
    num_dense: int
    dense_layers: int

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.unflatten(1, (key.shape[1], -1)).float()  # [rows, kv_heads, group, q, d]
        keys = Keys(self.text.keys[layer].float(), key.float())
        dots = keys.dot(grouped)
        positions = self.text.num_tokens + torch.arange(query.shape[2], device=query.device)
        tokens = torch.arange(dots.shape[-1], device=query.device)
        allowed = tokens <= positions[:, None]  # [q, tokens]
        if self.score is not None and layer >= self.dense_layers:
            chosen = self._choose(self.score(grouped, keys, dots), positions)
            chosen[..., : self.num_dense, :] = True
            allowed = allowed & chosen.repeat_interleave(PAGE_SIZE, dim=-1)[..., : len(tokens)]
        weights = dots.mul_(query.shape[-1] ** -0.5).masked_fill_(~allowed, -math.inf).softmax(-1)
        of_text, of_question = weights.split([self.text.num_tokens, query.shape[2]], dim=-1)
        out = torch.einsum("rhgqk,hkd->rhgqd", of_text, self.text.values[layer].float())
        out += torch.einsum("rhgqk,rhkd->rhgqd", of_question, value.float())
        return out.flatten(1, 2).to(query.dtype)

    def _choose(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Per KV head the newest page and the best others: `[rows, kv_heads, 1, q, pages]`."""
        scores = scores.amax(dim=2, keepdim=True)
        newest = positions[:, None] // PAGE_SIZE
        pages = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(pages > newest, -math.inf)
        scores = scores.masked_fill(pages == newest, math.inf)
        best = scores.topk(min(self.num_pages, len(pages)), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


@dataclass(frozen=True)
class Result:
    """How many answers were right."""

    length: int
    filler: str
    dense_layers: int
    method: str
    budget: int | None  # tokens
    num_facts: int
    num_questions: int
    answer_tokens_right: float
    decoded_tokens_right: float  # without each answer's first, which comes from the prompt
    answers_right: float
    token_right: tuple[float, ...]  # by place in the answer


@torch.inference_mode()
def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    length: int,
    filler: str,
    dense_layers: int,
    max_questions: int,
) -> list[Result]:
    """All methods and budgets on one text."""
    device = model.lm_head.weight.device
    num_facts = length // 128
    haystack = make_haystack(tokenizer, length, num_facts, filler)
    facts = haystack.facts[:max_questions]
    text = tokenizer.encode(haystack.text).ids
    whole_pages = len(text) // PAGE_SIZE * PAGE_SIZE
    turns = [
        tokenizer.encode(f" {fact.question} {fact.code}", add_special_tokens=False).ids
        for fact in facts
    ]
    rows = torch.tensor([text[whole_pages:] + turn for turn in turns], device=device)
    shared = SharedText(model, torch.tensor(text[:whole_pages], device=device))

    def measure(method: str, score: Score | None, budget: int | None) -> Result:
        num_dense = rows.shape[1] - pass_keys.CODE_WORDS
        attend = shared.attention(
            score, budget or 0, num_dense=num_dense, dense_layers=dense_layers
        )
        places = torch.arange(num_dense, rows.shape[1], device=device)
        right = []
        for chunk in rows.split(ROWS):
            wanted = (places - 1).expand(len(chunk), -1)
            logits = model(chunk, attend, first_position=whole_pages, wanted=wanted)
            right.append(logits.argmax(-1) == chunk[:, places])
        hits = torch.cat(right).float()  # [questions, CODE_WORDS]
        return Result(
            length=length,
            filler=filler,
            dense_layers=dense_layers,
            method=method,
            budget=budget,
            num_facts=num_facts,
            num_questions=len(facts),
            answer_tokens_right=hits.mean().item(),
            decoded_tokens_right=hits[:, 1:].mean().item(),
            answers_right=hits.prod(dim=1).mean().item(),
            token_right=tuple(hits.mean(dim=0).tolist()),
        )

    results = [measure("full", None, None)]
    for method, score in METHODS.items():
        results += [measure(method, score, budget) for budget in BUDGETS]
    return results


def make_haystack(
    tokenizer: Tokenizer, length: int, num_facts: int, filler: str
) -> pass_keys.Haystack:
    """A text of `length` tokens; `sources` is held-out Python source, else see `pass_keys`."""
    if filler != "sources":
        return pass_keys.make_haystack(length, num_facts, seed=length, filler=filler)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    text = "\n".join(sources.texts(sources.held_out_files(), max_bytes=2**62))
    return pass_keys.hide_in_text(text, length, num_facts, seed=length, count_tokens=count_tokens)


def run(
    folder: Path,
    lengths: list[int],
    device: torch.device,
    fillers: Sequence[str] = ("sentences", "words"),
    dense_layers: Sequence[int] = (0,),
    max_questions: int = MAX_QUESTIONS,
) -> None:
    """Evaluate a checkpoint, print a table and write `evaluation.json`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = checkpoint.read(folder, device, dtype)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    results = []
    for length in lengths:
        for filler, num_dense_layers in itertools.product(fillers, dense_layers):
            start = time.monotonic()
            found = evaluate(model, tokenizer, length, filler, num_dense_layers, max_questions)
            print(table(found) + f"\n({time.monotonic() - start:.0f} s)\n", flush=True)
            results += found
    record = {
        "page_size": PAGE_SIZE,
        "dtype": str(dtype).removeprefix("torch."),
        "results": [asdict(result) for result in results],
    }
    (folder / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")


def table(results: list[Result]) -> str:
    """The share of decoded answer tokens that are right, by method and budget, as Markdown."""
    full = results[0]
    lines = [
        f"{full.length} tokens of {full.filler}, {full.num_facts} facts, {full.dense_layers} dense "
        f"layers, dense attention: {full.decoded_tokens_right:.3f}",
        "",
        "| budget (tokens) | " + " | ".join(map(str, BUDGETS)) + " |",
        "| --- " * (len(BUDGETS) + 1) + "|",
    ]
    for method in METHODS:
        cells = [f"{r.decoded_tokens_right:.3f}" for r in results if r.method == method]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--fillers", nargs="+", choices=FILLERS, default=["sentences", "words"])
    parser.add_argument("--dense-layers", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=MAX_QUESTIONS, help="per text, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    run(args.folder, args.lengths, device, args.fillers, args.dense_layers, args.questions)


if __name__ == "__main__":
    main()
