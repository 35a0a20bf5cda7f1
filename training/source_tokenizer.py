"""The second model's tokenizer: byte-level BPE of Python sources.

    python training/source_tokenizer.py tokenizer.json

Every word and number of `vllm_quest.pass_keys` is one token after a space, and a line break is a
token of its own, so that facts and questions are the same tokens wherever they stand.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import sources
from vllm_quest import pass_keys

VOCABULARY = 8192
MAX_BYTES = 30_000_000
WORD_COUNT = 100_000
"""How often a word of `pass_keys` is shown: more often than any other word occurs."""

PIECE = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""A word, a number of up to two digits or a run of marks, each with a space before it."""


def train(seed: int = 0) -> Tokenizer:
    """Learn the merges from sources at hand."""
    special = [pass_keys.PADDING, pass_keys.BOS, pass_keys.EOS, pass_keys.UNKNOWN]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    bos = tokenizer.token_to_id(pass_keys.BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{pass_keys.BOS} $A", special_tokens=[(pass_keys.BOS, bos)]
    )
    split = [word for word in pass_key_words() if len(_plain(tokenizer, f" {word}")) != 1]
    if split:
        raise RuntimeError(f"these words are no single tokens: {' '.join(split)}")
    return tokenizer


def pass_key_words() -> list[str]:
    return [token for token in pass_keys.vocabulary() if token.isalnum()]


def _texts(seed: int) -> Iterator[str]:
    yield from sources.texts(sources.training_files(seed), MAX_BYTES)
    for word in pass_key_words():
        yield f" {word}" * WORD_COUNT


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    train().save(str(args.file))


if __name__ == "__main__":
    main()
