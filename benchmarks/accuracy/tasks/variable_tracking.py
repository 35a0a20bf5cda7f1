"""A chain of variables, each set to the one before (in the style of RULER, arXiv 2404.06654).

Five lines lie in order in the filler; the question asks for all variables that hold the number
which the first was set to. The score is the share of them that the answer names.
"""

import random
import re
import string

from benchmarks.accuracy.interface import Answer, Prompt
from benchmarks.accuracy.tasks.base import Request, Sample, Unit
from benchmarks.accuracy.tasks.haystacks import fill
from benchmarks.accuracy.tasks.passkey import FILLER

CHAIN = 5
NAME_LETTERS = 5
OPENING = "Variables are set in the text below. Keep track of which holds which number."
QUESTION = (
    "\n\nWhich variables hold the number {number} at the end of the text? "
    "Answer: the variables that hold {number} are"
)
ANSWER_TOKENS = 48


class VariableTracking:
    name = "variable_tracking"
    title = "Variable tracking"
    unit: Unit = "share right"

    def refusal(self, request: Request) -> str | None:
        if request.language == "demo":
            return "the model's language has no variables"
        return None

    def samples(self, request: Request) -> list[Sample]:
        rng = random.Random(request.seed)
        return [_sample(request, rng) for _ in range(request.num_samples)]

    def grade(self, sample: Sample, answer: Answer, text: str) -> float:
        named = set(re.findall(r"\w+", text))
        return sum(name in named for name in sample.targets) / len(sample.targets)


def _sample(request: Request, rng: random.Random) -> Sample:
    number = str(rng.randint(10_000, 99_999))
    names = ["".join(rng.choices(string.ascii_uppercase, k=NAME_LETTERS)) for _ in range(CHAIN)]
    values = [number, *(f"VAR {name}" for name in names)]
    lines = [f"VAR {name} = {value}" for name, value in zip(names, values, strict=False)]
    places = sorted(rng.random() for _ in lines)
    question = QUESTION.format(number=number)

    def material(num_fillers: int) -> str:
        text = [FILLER] * num_fillers
        for inserted, (place, line) in enumerate(zip(places, lines, strict=True)):
            text.insert(int(place * num_fillers) + inserted, line)
        return "\n".join([OPENING, *text])

    room = request.context_tokens - request.tokens.count(question)
    ids = request.tokens.split(fill(material, request.tokens, room), question)
    return Sample(Prompt(*ids, ANSWER_TOKENS), tuple(names))
