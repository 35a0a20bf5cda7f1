"""A model's tokenizer, as the tasks need it, and which language the model reads."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from transformers import AutoTokenizer

from vllm_quest import pass_keys

Language = Literal["demo", "english"]

SEAM_CHARACTERS = 400
ENGLISH_PROBE = "There is important information hidden inside a lot of irrelevant text."
DEMO_PROBE = pass_keys.FACT.format(key="amber falcon", code="47 19 82 05 63")


class Tokens:
    """Text to token ids and back."""

    def __init__(self, model: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)

    @lru_cache(maxsize=256)  # noqa: B019  (one object per report)
    def ids(self, text: str) -> tuple[int, ...]:
        """A text's token ids, with whatever the tokenizer puts first.

        A text may be longer than what the model takes, which tasks cut to their contexts: the
        tokenizer is not to warn of it.
        """
        return tuple(self._tokenizer(text, verbose=False).input_ids)

    def count(self, text: str) -> int:
        return len(self.ids(text))

    def split(self, material: str, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the two together, cut where the question's own begin.

        Only the seam is looked at: no token is as long as `SEAM_CHARACTERS`.
        """
        tail = material[-SEAM_CHARACTERS:]
        whole, alone = self.ids(tail + question), self.ids(tail)
        shared = 0
        while shared < len(alone) and whole[shared] == alone[shared]:
            shared += 1
        material_ids = self.ids(material)
        return material_ids[: len(material_ids) - len(alone) + shared], whole[shared:]

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def unknown_share(self, text: str) -> float:
        """The share of a text's tokens that stand for words the tokenizer does not know."""
        unknown = self._tokenizer.unk_token_id
        ids = self.ids(text)
        return 0.0 if unknown is None else ids.count(unknown) / len(ids)

    def language(self) -> Language:
        """What the model reads, told by the words that its tokenizer knows.

        Raises:
            ValueError: neither language.
        """
        if self.unknown_share(ENGLISH_PROBE) == 0:
            return "english"
        if self.unknown_share(DEMO_PROBE) == 0:
            return "demo"
        raise ValueError(
            "the model's tokenizer knows neither English nor the demo model's words; "
            "say --language english to ask it in English all the same"
        )
