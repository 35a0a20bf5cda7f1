"""One pass key in a long text, at any depth.

In English with the wording of arXiv 2305.16300 (Mohtashami and Jaggi), which QUEST's paper uses:
keys from 1 to 50000, the last 400 characters of the prompt fed token by token; an answer is right
if its first number is the key. The demo model is asked for one fact of its own language, and must
give the whole code.
"""

import random
import re

from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.tasks import facts
from benchmarks.accuracy.tasks.base import Request, Sample, Unit
from benchmarks.accuracy.tasks.haystacks import fill
from vllm_quest.pass_keys import CODE_WORDS

OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
MAX_KEY = 50_000
QUESTION_CHARACTERS = 400
ANSWER_TOKENS = 8


class PassKey:
    name = "passkey"
    title = "Pass key"
    unit: Unit = "share right"

    def refusal(self, request: Request) -> str | None:
        return None

    def samples(self, request: Request) -> list[Sample]:
        rng = random.Random(request.seed)
        make = {"demo": _demo_sample, "english": _english_sample}[request.language]
        return [make(request, depth, rng) for depth in request.depths()]

    def grade(self, sample: Sample, answer: Answer, text: str) -> float:
        (target,) = sample.targets
        if " " in target:
            return float(text.strip() == target)
        number = re.search(r"\d+", text)
        return float(number is not None and number.group() == target)


def _english_sample(request: Request, depth: float, rng: random.Random) -> Sample:
    key = str(rng.randint(1, MAX_KEY))

    def text(num_fillers: int) -> str:
        before = int(num_fillers * depth)
        lines = [OPENING, *[FILLER] * before, KEY.format(key=key)]
        return "\n".join([*lines, *[FILLER] * (num_fillers - before), QUESTION])

    whole = fill(text, request.tokens, request.context_tokens)
    cut = max(len(whole) - QUESTION_CHARACTERS, len(OPENING))
    material, question = request.tokens.split(whole[:cut], whole[cut:])
    return Sample(Prompt(material, question, ANSWER_TOKENS), (key,), depth)


def _demo_sample(request: Request, depth: float, rng: random.Random) -> Sample:
    haystack = facts.haystack(request, request.context_tokens, 1, rng.randrange(2**32))
    (fact,) = haystack.facts
    if request.filler == "text":
        pieces = haystack.text.splitlines(keepends=True)
        hidden = next(piece for piece in pieces if fact.sentence in piece)
        pieces.remove(hidden)
    else:
        before, _, after = haystack.text.partition(fact.sentence)
        pieces = [f"{word} " for word in (before + after).split()]
        hidden = f"{fact.sentence} "
    place = int(len(pieces) * depth)
    text = "".join([*pieces[:place], hidden, *pieces[place:]]).removesuffix(" ")
    material, question = request.tokens.split(text, f" {fact.question}")
    code = tuple(fact.code.split())
    return Sample(Prompt(material, question, CODE_WORDS + 1), (fact.code,), depth, code=code)
