"""Training batches of the second model: pass keys hidden in Python sources, or in their own filler.

Batches are drawn in the numbers of `pass_keys.vocabulary()`, followed by those of the tokenizer;
then a table turns both into the tokenizer's.
"""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from haystacks import Batch, Haystacks, Range
from vllm_quest import pass_keys

SOURCE_SHARE = 0.6
"""Share of batches whose filler is source text."""
MAX_TEXT_TARGETS = 2**16
"""Text tokens of a batch that are to be predicted beside the answers."""


class SourceHaystacks(Haystacks):
    """A stream of random batches in the tokens of a tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, stream: Tensor, device: torch.device, seed: int
    ) -> None:
        """
        Args:
            tokenizer: from `source_tokenizer`.
            stream: `[num_tokens]` int32 on the device, source text.
            device: where batches are made.
            seed: equal seeds give equal batches.
        """
        super().__init__(device, seed)
        self._stream = stream
        words = [tokenizer.token_to_id(in_sentence(word)) for word in pass_keys.vocabulary()]
        size = tokenizer.get_vocab_size()
        self._table = torch.tensor([*words, *range(size)], device=device)
        self._first_text = len(words)
        self._any_word = Range(self._first_text + 4, size - 4)
        self._is_source = False

    def copies(self, rows: int, length: int) -> Batch:
        batch = super().copies(rows, length)
        return Batch(self._table[batch.tokens], batch.answers)

    def questions(self, rows: int, length: int, num_facts: int, num_questions: int) -> Batch:
        self._is_source = self._rng.random() < SOURCE_SHARE
        batch = super().questions(rows, length, num_facts, num_questions)
        texts = None
        if self._is_source:
            texts = 1 + self._choose(rows, length, min(length, MAX_TEXT_TARGETS // rows))
        return Batch(self._table[batch.tokens], batch.answers, texts)

    def _fillers(self, rows: int, length: int) -> Tensor:
        if not self._is_source:
            return super()._fillers(rows, length)
        starts = self._integers(0, len(self._stream) - length, rows, 1)
        places = starts + torch.arange(length, device=self.device)
        return self._first_text + self._stream[places].long()


def in_sentence(word: str) -> str:
    """A word of `pass_keys` as the tokenizer writes it: words follow a space (`Ġ`)."""
    return f"Ġ{word}" if word.isalnum() else word
