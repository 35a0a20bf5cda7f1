"""Training batches, drawn on the device: the language of `vllm_quest.pass_keys` as token ids.

Facts lie anywhere in the filler, in the middle of a sentence too; `pass_keys` puts them between
sentences. Filler is half sentences, half words in random order.
"""

import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_quest import pass_key_words as words
from vllm_quest import pass_keys

UNKNOWN_RATE = 0.01
"""Share of unknown words in filler of random order, so that foreign text does no harm."""


@dataclass(frozen=True)
class Batch:
    """Token rows and the places whose tokens are to be predicted."""

    tokens: Tensor  # [rows, tokens] int64
    answers: Tensor  # [rows, answers] int64, indices of answer tokens
    texts: Tensor | None = None  # [rows, n] int64, indices of text tokens to be predicted as well

    @property
    def targets(self) -> Tensor:
        """The answer tokens, `[rows, answers]`."""
        return self.tokens.gather(1, self.answers)


@dataclass(frozen=True)
class Range:
    """Token ids of one kind of word: start <= id < start + size."""

    start: int
    size: int


class Haystacks:
    """A stream of random batches."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._rng = random.Random(seed)
        self._ids = {token: index for index, token in enumerate(pass_keys.vocabulary())}
        self._adjectives = self._range(words.KEY_ADJECTIVES)
        self._nouns = self._range(words.KEY_NOUNS)
        self._codes = self._range(words.CODES)
        first_filler = self._ids["the"]
        self._filler = Range(first_filler, len(self._ids) - first_filler)
        self._any_word = Range(self._adjectives.start, len(self._ids) - self._adjectives.start)
        slots = [self._slots(pattern) for pattern in pass_keys.SENTENCES]
        self._slot_starts = self._tensor([[slot.start for slot in row] for row in slots])
        self._slot_sizes = self._tensor([[slot.size for slot in row] for row in slots])

    def copies(self, rows: int, length: int) -> Batch:
        """Random words repeated with a random period; the second half is to be predicted.

        Each row draws from an alphabet of its own; in a small one, words repeat by chance and only
        several of them together tell the place.
        """
        any_word = self._any_word
        size = 2 ** (5 + self._uniform(rows, 1) * 4.5)
        start = any_word.start + self._uniform(rows, 1) * (any_word.size - size)
        pattern = (start + self._uniform(rows, length // 2) * size).long()
        period = self._integers(length // 16, length // 2 + 1, rows, 1)
        tokens = pattern.gather(1, torch.arange(length - 1, device=self.device) % period)
        tokens = torch.cat((self._bos(rows), tokens), dim=1)
        answers = torch.arange(length // 2 + 1, length, device=self.device).expand(rows, -1)
        return Batch(tokens, answers)

    def questions(self, rows: int, length: int, num_facts: int, num_questions: int) -> Batch:
        """A haystack of `length` tokens, then questions, each followed by its answer."""
        facts = self._facts(rows, num_facts)
        filler = self._fillers(rows, length - num_facts * pass_keys.FACT_TOKENS)
        haystack = self._hide(self._fill(pass_keys.FACT, facts), filler)
        asked = self._choose(rows, num_facts, num_questions)
        facts = facts.gather(1, asked[..., None].expand(-1, -1, facts.shape[-1]))
        question = pass_keys.STATEMENT if self._rng.random() < 0.2 else pass_keys.QUESTION
        turns = self._fill(f"{question} {{code}} {pass_keys.EOS}", facts)
        tokens = torch.cat((self._bos(rows), haystack, turns.flatten(1)), dim=1)
        num_answer_tokens = pass_keys.CODE_WORDS + 1
        ends = 1 + length + turns.shape[2] * torch.arange(1, num_questions + 1, device=self.device)
        answers = ends[:, None] + torch.arange(-num_answer_tokens, 0, device=self.device)
        return Batch(tokens, answers.flatten().expand(rows, -1))

    def _facts(self, rows: int, num_facts: int) -> Tensor:
        """Distinct keys and their codes, as ids: `[rows, num_facts, 2 + CODE_WORDS]`."""
        keys = self._choose(rows, self._adjectives.size * self._nouns.size, num_facts)
        adjectives = self._adjectives.start + keys // self._nouns.size
        nouns = self._nouns.start + keys % self._nouns.size
        codes = self._codes.start + self._integers(
            0, self._codes.size, rows, num_facts, pass_keys.CODE_WORDS
        )
        return torch.cat((adjectives[..., None], nouns[..., None], codes), dim=-1)

    def _fill(self, template: str, facts: Tensor) -> Tensor:
        """A template with each fact put in, as ids: `[rows, facts, tokens]`."""
        holes = [f"HOLE{index}" for index in range(facts.shape[-1])]
        text = template.format(key=" ".join(holes[:2]), code=" ".join(holes[2:]))
        return torch.stack(
            [
                facts[..., holes.index(token)]
                if token in holes
                else torch.full_like(facts[..., 0], self._ids[token])
                for token in tokens_of(text)
            ],
            dim=-1,
        )

    def _fillers(self, rows: int, length: int) -> Tensor:
        """`[rows, length]`: sentences in half of the rows, words in random order in the others."""
        num_sentences = length // pass_keys.SENTENCE_TOKENS + 2
        patterns = self._integers(0, len(self._slot_starts), rows, num_sentences)
        starts = self._slot_starts[patterns]
        sizes = self._slot_sizes[patterns]
        sentences = (starts + (self._uniform(*sizes.shape) * sizes).long()).flatten(1)
        cut = self._rng.randrange(pass_keys.SENTENCE_TOKENS)
        sentences = sentences[:, cut : cut + length]
        in_random_order = self._filler.start + self._integers(0, self._filler.size, rows, length)
        unknown = self._uniform(rows, length) < UNKNOWN_RATE
        in_random_order = in_random_order.masked_fill(unknown, self._ids[pass_keys.UNKNOWN])
        return torch.where(self._uniform(rows, 1) < 0.5, sentences, in_random_order)

    def _hide(self, sentences: Tensor, filler: Tensor) -> Tensor:
        """Put sentences `[rows, n, tokens]` at random places of the filler `[rows, length]`."""
        rows, num_sentences, size = sentences.shape
        places = self._integers(0, filler.shape[1] + 1, rows, num_sentences).sort(dim=1).values
        starts = places + size * torch.arange(num_sentences, device=self.device)
        within = torch.arange(size, device=self.device)
        indices = torch.arange(filler.shape[1], device=self.device).expand(rows, -1).contiguous()
        shifted = indices + size * torch.searchsorted(places, indices, right=True)
        text = torch.empty(
            rows, filler.shape[1] + num_sentences * size, dtype=torch.int64, device=self.device
        )
        text.scatter_(1, (starts[..., None] + within).flatten(1), sentences.flatten(1))
        return text.scatter_(1, shifted, filler)

    def _choose(self, rows: int, total: int, count: int) -> Tensor:
        """`[rows, count]`: distinct numbers below `total`, in random order."""
        return self._uniform(rows, total).topk(count, dim=1).indices

    def _bos(self, rows: int) -> Tensor:
        return self._tensor([[self._ids[pass_keys.BOS]]]).expand(rows, -1)

    def _range(self, kind: tuple[str, ...]) -> Range:
        return Range(self._ids[kind[0]], len(kind))

    def _slots(self, pattern: str) -> list[Range]:
        """For each token of a sentence pattern the ids that may stand there."""
        text = pattern.format(**{slot: slot.upper() for slot in pass_keys.SLOTS})
        return [
            self._range(pass_keys.SLOTS[token.lower()])
            if token.isupper()
            else Range(self._ids[token], 1)
            for token in tokens_of(text)
        ]

    def _uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self._generator, device=self.device)

    def _integers(self, low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=self._generator, device=self.device)

    def _tensor(self, values: list[list[int]]) -> Tensor:
        return torch.tensor(values, device=self.device)


def tokens_of(text: str) -> list[str]:
    """Words and punctuation marks, as the tokenizer splits them."""
    return re.findall(r"</?\w+>|\w+|[^\w\s]", text)
